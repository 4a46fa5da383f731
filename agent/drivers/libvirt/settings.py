"""The settings of the libvirt driver (`[driver.settings]` of the configuration)."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from agent.errors import InvalidArgument

_SCHEMES = {"qemu", "qemu+unix", "lxc", "lxc+unix", "test", "test+unix"}
_QEMU_PATHS = {"/system", "/session"}


class LibvirtSettings(BaseModel):
    """What an operator can set; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str = "qemu:///system"
    """A daemon on this host (`qemu:///system`, `qemu:///session`, either with `qemu+unix` and `?socket=`), containers
    instead of virtual machines (`lxc:///system`, `lxc+unix:///system?socket=`), or libvirt's simulated hypervisor
    (`test:///default`, `test+unix:///default?socket=`)."""
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
    """Cache mode of the root disk. `none` becomes `writeback` on file systems without O_DIRECT."""
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
            raise ValueError("give a qemu, lxc or test URI of this host; the agent works on local files")
        if parts.scheme.startswith("qemu") and parts.path not in _QEMU_PATHS:
            raise ValueError("the path of a qemu URI must be /system or /session")
        if parts.scheme.startswith("lxc") and parts.path != "/system":
            raise ValueError("the path of an lxc URI must be /system")
        if set(parse_qs(parts.query, keep_blank_values=True)) - {"socket", "mode"}:
            raise ValueError("only the parameters socket and mode are allowed")
        return value

    @field_validator("vnc_listen")
    @classmethod
    def _address(cls, value: str) -> str:
        return str(ipaddress.ip_address(value))

    @field_validator("instances_dir", "emulator")
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

    @property
    def simulated(self) -> bool:
        """True for libvirt's simulated hypervisor (the test driver)."""
        return self.uri.startswith("test")

    @property
    def containers(self) -> bool:
        """True where instances are containers (libvirt's lxc driver)."""
        return self.uri.startswith("lxc")

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
