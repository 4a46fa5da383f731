"""Where this host may send images of its disks. Pure decisions: nothing here opens a file or a connection."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from agent.errors import InvalidArgument
from agent.images.policy import host_allowed, public_url
from agent.messages.types import NAME_PATTERN

Seconds = Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)]


class ExportPolicy(BaseModel):
    """The host's rules for exports; part of the agent's configuration.

    Unlike for images, no list means no permission: what is exported leaves the host.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stores: dict[str, Path] = Field(
        default_factory=dict, description="File stores: name = folder. The agent makes and removes files there."
    )
    staging_dir: Path | None = Field(
        default=None, description="Where exports are made; default: `exports` in state_dir. QEMU must reach it."
    )
    allowed_schemes: frozenset[Literal["http", "https"]] = Field(
        default=frozenset({"http", "https"}), description="URL schemes that exports may be sent by."
    )
    allowed_hosts: list[str] = Field(
        default_factory=list, description="Exact names, suffixes with a leading dot, or `*` for any; none: no uploads."
    )
    allow_private_addresses: bool = Field(default=True, description="Whether exports may go to private addresses.")
    connect_timeout_s: Seconds = Field(default=10, description="One connection.")
    stall_timeout_s: Seconds = Field(default=60, description="Longest time in which a server takes nothing.")
    total_timeout_s: Seconds = Field(default=4 * 3600, description="One upload with all its attempts.")
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(default=3, description="Attempts of one upload.")
    min_free_mib: Annotated[int, Field(ge=0)] = Field(
        default=64, description="Free space in MiB of the staging folder that an export must leave."
    )

    @field_validator("stores")
    @classmethod
    def _store_names(cls, value: dict[str, Path]) -> dict[str, Path]:
        for name, folder in value.items():
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(f"{name!r} is no name of a store")
            if not folder.is_absolute():
                raise ValueError(f"the folder of store {name} must be an absolute path")
        return value


def forbidden(message: str) -> InvalidArgument:
    """Make the refusal of a target; a retry cannot help."""
    return InvalidArgument(message, code="export_target_forbidden")


def store_folder(policy: ExportPolicy, store: str) -> Path:
    """Return a store's folder. Raises `InvalidArgument` (`export_store_unknown`)."""
    folder = policy.stores.get(store)
    if folder is None:
        known = ", ".join(sorted(policy.stores)) or "none"
        raise InvalidArgument(
            f"this host has no export store {store}; it has: {known}", code="export_store_unknown", store=store
        )
    return folder


def check_url(policy: ExportPolicy, url: str) -> None:
    """Refuse what can be refused by looking at a URL. Raises `InvalidArgument` (`export_target_forbidden`)."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower().rstrip(".")
        _port = parts.port  # it is parsed only when it is asked for
    except ValueError as exc:
        raise forbidden("the export's URL cannot be parsed") from exc
    if parts.scheme not in policy.allowed_schemes:
        raise forbidden(f"exports of scheme {parts.scheme!r} are not allowed on this host")
    if "@" in parts.netloc:
        raise forbidden("an export's URL must not hold a user or password: commands are journaled")
    if not host or not ("*" in policy.allowed_hosts or host_allowed(host, policy.allowed_hosts)):
        raise forbidden(f"host {host!r} is not among the allowed export hosts")


__all__ = ["ExportPolicy", "check_url", "forbidden", "public_url", "store_folder"]
