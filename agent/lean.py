"""Keeps `rich` out of this process. To be imported before anything that imports structlog.

structlog loads rich where it is installed, which it is for `computectl`, only to print tracebacks in colour: 4 MiB in
a process that never does.
"""

from __future__ import annotations

import sys

if "structlog" not in sys.modules and "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
