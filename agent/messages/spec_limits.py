"""How much of the host's time and bandwidth a guest may take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from agent.messages.types import Inbound

Rate = Annotated[int, Field(ge=1, le=2**40)]


class CpuLimits(Inbound):
    """`shares` is the weight against other guests (libvirt's `cpu_shares`; 1024 is usual). `quota_percent` caps each
    vCPU: 50 is half a CPU.
    """

    shares: Annotated[int, Field(ge=2, le=262_144)] | None = None
    quota_percent: Annotated[int, Field(ge=1, le=1000)] | None = None


class DiskLimits(Inbound):
    """A disk's limits per second. A total excludes the separate limits for reading and writing (QEMU's rule)."""

    total_bytes_s: Rate | None = None
    read_bytes_s: Rate | None = None
    write_bytes_s: Rate | None = None
    total_iops: Rate | None = None
    read_iops: Rate | None = None
    write_iops: Rate | None = None

    @model_validator(mode="after")
    def _total_or_parts(self) -> DiskLimits:
        for total, parts in (
            (self.total_bytes_s, (self.read_bytes_s, self.write_bytes_s)),
            (self.total_iops, (self.read_iops, self.write_iops)),
        ):
            if total is not None and any(part is not None for part in parts):
                raise ValueError("give a total, or limits for reading and writing, not both")
        return self


class NicLimits(Inbound):
    """Average rates in KiB/s as libvirt counts them, `inbound` being what the guest receives."""

    inbound_kib_s: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    outbound_kib_s: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
