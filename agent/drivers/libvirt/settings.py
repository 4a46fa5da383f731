"""The settings of the libvirt driver (`[driver.settings]` of the configuration)."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from agent.errors import InvalidArgument
from agent.messages.types import NAME_PATTERN

_SCHEMES = {"qemu", "qemu+unix", "test", "test+unix"}
_QEMU_PATHS = {"/system", "/session"}


class FileBackendSettings(BaseModel):
    """Disks as files. `dir`: folder of the instances' folders, by default `instances_dir`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["qcow2", "raw"]
    dir: Path | None = None


class LvmBackendSettings(BaseModel):
    """Disks as logical volumes of a volume group, or of a thin pool in it.

    `wipe`: what a thick volume is overwritten with when it is removed. `program`: LVM's own, or one that takes its
    subcommands. `device_dir`: where `<volume group>/<volume>` appears.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["lvm"]
    volume_group: str = Field(pattern=r"^[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,63}$")
    thin_pool: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,63}$")
    wipe: Literal["zero", "discard", "none"] = "zero"
    program: str = "lvm"
    device_dir: Path = Path("/dev")
    timeout_s: float = Field(default=60.0, gt=0, le=3600)


BackendSettings = Annotated[FileBackendSettings | LvmBackendSettings, Field(discriminator="type")]
BackendName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

BUILT_IN: Final = "instances"
"""The back end that is always there: files in `instances_dir`, qcow2 unless the configuration says otherwise."""


class LibvirtSettings(BaseModel):
    """What an operator can set; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str = "qemu:///system"
    """A daemon on this host (`qemu:///system`, `qemu:///session`, either with `qemu+unix` and `?socket=`), or
    libvirt's simulated hypervisor (`test:///default`, `test+unix:///default?socket=`)."""
    virt_type: Literal["auto", "kvm", "qemu"] = "auto"
    """`auto` takes KVM where it is proven to work, else emulation (slow)."""
    machine: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """The machine type; by default `q35` on x86, `virt` on ARM."""
    emulator: Path | None = None
    """The QEMU binary; by default libvirt's choice."""
    cpu_mode: Literal["auto", "host-passthrough", "host-model", "maximum", "custom", "default"] = "auto"
    """`auto`: `host-passthrough` under KVM, `maximum` under emulation; `default` leaves it to QEMU."""
    cpu_model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The CPU model of `cpu_mode` `custom`."""
    disk_cache: Literal["none", "writeback", "writethrough", "directsync", "unsafe"] = "none"
    """Cache mode of disks whose spec says `auto`. On storage without O_DIRECT `none` becomes `writeback`, and
    `directsync` `writethrough`."""
    disk_io: Literal["auto", "threads", "native", "io_uring"] = "auto"
    """How QEMU waits for disks whose spec says `auto`. `auto`: `native` for block devices without the host's cache,
    else `threads`. `native` needs cache `none` or `directsync`, `io_uring` a kernel and QEMU that have it; else
    it becomes `threads`."""
    backends: dict[BackendName, BackendSettings] = Field(default_factory=dict)
    """Where disks can be kept, by the name that specs use. `instances` is always there: qcow2 files in
    `instances_dir`."""
    default_backend: str = BUILT_IN
    """The back end of disks whose spec names none. Disks that are there stay where they are."""
    keys_dir: Path | None = None
    """Folder of the keys of encrypted disks: one file per key, not accessible for others, no links. The file's
    content is the passphrase, byte for byte."""
    luks_iter_time_ms: int = Field(default=2000, ge=10, le=60_000)
    """How long it takes to derive a disk's key from its passphrase, on the host that makes the disk. Keys that are
    long and random need little."""
    vnc_listen: str = "127.0.0.1"
    """The address that VNC servers listen on; there is no password, so keep it private."""
    instances_dir: Path | None = None
    """Folder of the instances' files, by default `instances` in the state directory. QEMU must be able to
    enter it and all folders above it."""
    qemu_img: str = "qemu-img"
    qemu_img_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    min_free_mib: int = Field(default=64, ge=0)
    """Free space in MiB below which no disk is made."""
    connect_timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Longest wait for one attempt to connect, so that a frozen daemon does not hold a thread for ever."""
    reconnect_max_s: float = Field(default=10.0, gt=0, le=300)
    """Longest pause between two attempts to reconnect."""

    @field_validator("uri")
    @classmethod
    def _local_uri(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in _SCHEMES or parts.netloc:
            raise ValueError("give a qemu or test URI of this host; the agent works on local files")
        if parts.scheme.startswith("qemu") and parts.path not in _QEMU_PATHS:
            raise ValueError("the path of a qemu URI must be /system or /session")
        if set(parse_qs(parts.query, keep_blank_values=True)) - {"socket", "mode"}:
            raise ValueError("only the parameters socket and mode are allowed")
        return value

    @field_validator("vnc_listen")
    @classmethod
    def _address(cls, value: str) -> str:
        return str(ipaddress.ip_address(value))

    @field_validator("instances_dir", "emulator", "keys_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("the path must be absolute")
        return value

    @model_validator(mode="after")
    def _model_for_custom(self) -> LibvirtSettings:
        if (self.cpu_mode == "custom") != (self.cpu_model is not None):
            raise ValueError("cpu_mode 'custom' and cpu_model belong together")
        return self

    @model_validator(mode="after")
    def _known_backend(self) -> LibvirtSettings:
        if self.default_backend != BUILT_IN and self.default_backend not in self.backends:
            raise ValueError(f"default_backend {self.default_backend!r} is none of the backends")
        for name, backend in self.backends.items():
            folder = backend.dir if isinstance(backend, FileBackendSettings) else backend.device_dir
            if folder is not None and not folder.is_absolute():
                raise ValueError(f"backends.{name}: the path must be absolute")
        return self

    @property
    def simulated(self) -> bool:
        """True for libvirt's simulated hypervisor (the test driver)."""
        return self.uri.startswith("test")

    @property
    def in_process(self) -> bool:
        """True where the hypervisor lives in this process and has no daemon."""
        return self.uri.startswith("test:")


def parse_settings(raw: Mapping[str, Any]) -> LibvirtSettings:
    """Validate the driver's settings. Raises `InvalidArgument` (code `driver_settings`) that names the key."""
    try:
        return LibvirtSettings.model_validate(dict(raw))
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "cpu_mode"
        raise InvalidArgument(f"driver setting {key!r}: {first['msg']}", code="bad_driver_settings", key=key) from exc
