"""`python -m agent.controller` is `computectl`."""

from agent.controller.cli import main

if __name__ == "__main__":
    main()
