"""Which image sources this host may read, and the limits on what comes from them.

Pure decisions: nothing here opens a connection or reads an image. The one look at the outside is the
resolution of symlinks in `local_path`, which must therefore run in a worker thread.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field

from agent.errors import ImageRejected

MIB = 1024 * 1024

Scheme = Literal["file", "http", "https"]
PositiveSeconds = Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)]
PositiveMib = Annotated[int, Field(ge=1, le=64 * MIB)]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class ImagePolicy(BaseModel):
    """The host's rules for image sources; part of the agent's configuration.

    `file_roots`: file images must lie below one of these after symlinks are resolved; empty means no file
    images. `allowed_hosts`: exact names, or suffixes with a leading dot; empty means any.
    `allow_private_addresses`: if false, a connection to an address that is not globally reachable is
    refused when it is made, whatever name led there. Sizes are in MiB, times in seconds; `stall_timeout_s`
    bounds the wait for the next bytes, `total_timeout_s` the whole of one download with all its attempts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_schemes: frozenset[Scheme] = Field(
        default=frozenset({"file", "http", "https"}), description="URL schemes that images may come by."
    )
    file_roots: list[Path] = Field(
        default_factory=list, description="Folders that file images must lie below; none: no file images."
    )
    allow_private_addresses: bool = Field(default=True, description="Whether images may come from private addresses.")
    allowed_hosts: list[str] = Field(
        default_factory=list, description="Exact names, or suffixes with a leading dot; none: any."
    )
    max_size_mib: PositiveMib = Field(default=102_400, description="Largest download.")
    max_virtual_size_mib: PositiveMib | None = Field(default=None, description="Largest virtual size.")
    connect_timeout_s: PositiveSeconds = Field(default=10, description="One connection.")
    stall_timeout_s: PositiveSeconds = Field(default=30, description="Longest silence in a download.")
    total_timeout_s: PositiveSeconds = Field(default=4 * 3600, description="One download with all its attempts.")
    max_redirects: Annotated[int, Field(ge=0, le=20)] = Field(
        default=5, description="Redirects followed; each is checked."
    )

    def max_bytes(self, asked_mib: int | None) -> int:
        """The lower of the host's and the command's limit on the download, in bytes."""
        return min(self.max_size_mib, asked_mib or self.max_size_mib) * MIB


def forbidden(message: str) -> ImageRejected:
    """Make the refusal of a source: code `image_source_forbidden`; a retry cannot help."""
    return ImageRejected(message, code="image_source_forbidden")


def public_url(url: str) -> str:
    """Return `url` without user, query and fragment: those may hold a secret, and errors are published."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def check_source(policy: ImagePolicy, url: str) -> None:
    """Refuse what can be refused by looking at the URL alone, before anything is opened.

    Raises `ImageRejected` with code `image_source_forbidden`.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as exc:
        raise forbidden("the image's URL cannot be parsed") from exc
    if parts.scheme == "file":
        if "file" not in policy.allowed_schemes:
            raise forbidden("file images are not allowed on this host")
        if host not in {"", "localhost"}:
            raise forbidden(f"a file URL must be of this host, not of {host!r}; write file:///path")
        return
    check_hop(policy, parts.scheme, host, has_user="@" in parts.netloc)


def check_hop(policy: ImagePolicy, scheme: str, host: str, *, has_user: bool) -> None:
    """Check one HTTP request's target: the first URL and every redirect.

    The parts have to come from the parser that the HTTP client itself uses, else the two could disagree.
    Raises `ImageRejected` with code `image_source_forbidden`.
    """
    if scheme not in {"http", "https"} or scheme not in policy.allowed_schemes:
        raise forbidden(f"image sources of scheme {scheme!r} are not allowed on this host")
    if has_user:
        raise forbidden("an image's URL must not hold a user or password: commands are journaled")
    name = host.lower().rstrip(".")
    if not name:
        raise forbidden("the image's URL names no host")
    if policy.allowed_hosts and not host_allowed(name, policy.allowed_hosts):
        raise forbidden(f"host {name!r} is not among the allowed image hosts")


def host_allowed(name: str, rules: list[str]) -> bool:
    """Whether a host's name (lower case, no final dot) is one of the rules' names, or below one with a leading dot."""
    return any(_host_matches(name, rule) for rule in rules)


def _host_matches(name: str, rule: str) -> bool:
    rule = rule.lower().rstrip(".")
    return name.endswith(rule) if rule.startswith(".") else name == rule


def is_public_address(address: str) -> bool:
    """Tell whether an address is globally reachable, and so is the IPv4 address that an IPv6 one holds."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


def local_path(policy: ImagePolicy, url: str) -> Path:
    """Resolve a file URL to a path below one of the policy's roots. Reads directories: run it in a thread.

    A path that does not exist is returned as it is, if its place is allowed. Raises `ImageRejected` with code
    `image_source_forbidden`; the message is the same whether or not a file outside the roots exists.
    """
    text = unquote(urlsplit(url).path)
    if not text.startswith("/") or "\0" in text:
        raise forbidden("a file URL must hold an absolute path")
    try:
        path = Path(text).resolve()
        roots = [root.resolve() for root in policy.file_roots]
    except (OSError, RuntimeError) as exc:  # RuntimeError: a loop of symlinks
        raise forbidden(f"{text} cannot be resolved to a file below the allowed roots") from exc
    if not any(root in path.parents for root in roots):
        raise forbidden(f"{text} is not below one of the allowed image roots")
    return path
