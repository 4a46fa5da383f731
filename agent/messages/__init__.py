"""The wire contract: envelopes, commands, events, routing keys. Imports nothing of the agent but its errors."""
