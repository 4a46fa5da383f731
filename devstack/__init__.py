"""Real servers for development and tests: private, disposable, any number of them side by side.

The package uses the standard library alone, because ``devstack/bootstrap.sh`` and ``make up`` need it before
the virtual environment exists. It knows nothing of the agent: ``stack`` starts the agent as a command,
nothing more.
"""
