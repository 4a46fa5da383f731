"""`python -m bench [name ...] [--rounds N] [--write FILE]`: run measurements and print them as Markdown."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

NAMES = ("commands", "create", "creates", "events", "restart", "idle", "heartbeat", "images", "snapshot")


def main() -> None:
    """Run what is asked for, each in a folder of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="which (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per side")
    parser.add_argument("--write", type=Path, help="append the sections to this file")
    options = parser.parse_args()
    for name in options.names or NAMES:
        module = importlib.import_module(f"bench.{name}")
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            text = module.measure(Path(folder), options.rounds).markdown()
        print(text, flush=True)
        if options.write:
            with options.write.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
