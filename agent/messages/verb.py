"""The base of every command's `data`. One module per family of verbs builds on it (`verbs_*`)."""

from __future__ import annotations

from typing import ClassVar

from agent.messages.types import Inbound


class CommandData(Inbound):
    """Base of every command's `data`. `verb` is `<noun>.<verb>`; `subject_required` says if it names an instance."""

    verb: ClassVar[str]
    subject_required: ClassVar[bool] = True
