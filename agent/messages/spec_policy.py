"""What is done, without a command, when a guest stops, crashes, hits an I/O error, or its host has booted."""

from __future__ import annotations

from typing import Literal

from agent.messages.types import Inbound


class Policy(Inbound):
    """What happens by itself, per instance. Each default leaves things as they are.

    `on_host_boot`: `last-state` starts what was running before the host went down. `on_stop` is about a guest that
    ends by itself, never about a command. `on_io_error`: `pause-and-retry` lets a guest that a full disk paused run
    on as soon as there is space again.
    """

    on_host_boot: Literal["stay-stopped", "last-state", "start"] = "last-state"
    on_stop: Literal["keep", "restart"] = "keep"
    on_crash: Literal["keep", "restart"] = "keep"
    on_io_error: Literal["keep", "pause-and-retry"] = "pause-and-retry"
