"""The rebuild family of verbs: commands and results."""

from __future__ import annotations

from agent.messages.types import Outbound
from agent.messages.verb import CommandData

COMMANDS: tuple[type[CommandData], ...] = ()
RESULTS: dict[str, type[Outbound]] = {}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
