"""The durable machine: dispatch, lanes, operations. Knows protocols only: bus, store and driver."""
