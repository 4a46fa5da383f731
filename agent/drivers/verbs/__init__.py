"""The optional part of the driver contract, one module per family of verbs.

Each class holds the methods of one family; a driver that can do them overrides them, and one that cannot inherits the
refusal. `VERBS` are the verbs that a driver announces when it has the family (`Capabilities.verbs`).
"""
