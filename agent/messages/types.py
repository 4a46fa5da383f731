"""Validated primitive types of the wire contract.

Names, paths and URLs that come in with a command end up in domain XML, file names and process arguments, so each
is a type that admits only characters which mean nothing to a shell, a path or XML. Sizes have an upper bound far
above real hardware but far below what overflows libvirt's 64-bit KiB arithmetic.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, StringConstraints
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

HOST_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
UUID_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


class LongPattern:
    """As `StringConstraints(pattern=...)`, for patterns that repeat something many times.

    pydantic's own engine unrolls repeats: `{16,16384}` costs every process 7 MiB.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._compiled = re.compile(pattern)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "pattern": self._pattern}

    def _check(self, value: str) -> str:
        # Not `match`: Python's `$` would let a newline through at the end.
        if self._compiled.fullmatch(value) is None:
            raise PydanticKnownError("string_pattern_mismatch", {"pattern": self._pattern})
        return value


HostName = Annotated[str, StringConstraints(pattern=HOST_PATTERN)]
"""A hypervisor host: letters, digits, dot, dash, underscore. `all` is reserved for broadcasts."""

InstanceId = Annotated[str, StringConstraints(pattern=UUID_PATTERN)]
"""A lower-case UUID; the domain's UUID and the key of its lane."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A domain, network or volume name of at most 63 characters."""

InterfaceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$")]
"""A Linux network device name (15 characters, the kernel's IFNAMSIZ less one)."""

MacAddress = Annotated[str, StringConstraints(pattern=r"^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$")]
"""A unicast MAC address in lower case."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

CommandId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
"""A command's id: its idempotency key, unique for ever among one host's commands."""

Generation = Annotated[int, Field(ge=0, le=2**63 - 1)]
Vcpus = Annotated[int, Field(ge=1, le=1024)]
MemoryMib = Annotated[int, Field(ge=16, le=16 * 1024 * 1024)]
DiskMib = Annotated[int, Field(ge=1, le=64 * 1024 * 1024)]
TimeoutS = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]

ImageFormat = Literal["qcow2", "raw", "vmdk", "vhdx"]
"""Image formats a disk can be made from."""

DiskFormat = Literal["qcow2", "raw"]
"""Formats that disks have on the host, and images in the cache."""


class Inbound(BaseModel):
    """Base of all that a controller sends: unknown fields and coerced types are errors that name the field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Outbound(BaseModel):
    """Base of all that the agent sends: readers ignore what they do not know, so fields may be added."""

    model_config = ConfigDict(extra="ignore", frozen=True)
