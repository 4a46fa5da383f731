"""Named places at which a test can make the agent die, as a power cut would.

`COMPUTE_AGENT_FAILPOINT="<verb>:<step>:<before|after>[:n]"` kills the process with SIGKILL the n-th time it comes
past that place. Not set, a failpoint costs one comparison.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "COMPUTE_AGENT_FAILPOINT"
_armed = os.environ.get(VARIABLE, "")
_name, _, _nth = _armed.rpartition(":") if _armed.rpartition(":")[2].isdigit() else (_armed, "", "1")
_left = int(_nth)


def failpoint(name: str) -> None:
    """Die here if this place is armed."""
    global _left  # noqa: PLW0603 - one process has one armed place
    if _name and name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
