"""`python -m agent` is `compute-agent`."""

from agent.cli import main

if __name__ == "__main__":
    main()
