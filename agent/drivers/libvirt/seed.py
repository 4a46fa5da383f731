"""First-boot data for cloud-init as an ISO image: NoCloud (`cidata`) or config-drive (`config-2`).

Files hold JSON, which is also YAML, so that no value can change the structure. User data is passed byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from agent.errors import InvalidArgument
from agent.messages.spec import InstanceSpec, Seed


def build(instance_id: str, spec: InstanceSpec) -> bytes:
    """Return the ISO image for a spec that has a seed.

    Raises `InvalidArgument` (code `network_config_not_json`) if a config-drive is given network data that is no
    JSON object, which would stop cloud-init in the guest.
    """
    seed = spec.seed or Seed()
    if seed.datasource == "nocloud":
        return _iso("cidata", nocloud_files(instance_id, spec, seed))
    return _iso("config-2", config_drive_files(instance_id, spec, seed))


def nocloud_files(instance_id: str, spec: InstanceSpec, seed: Seed) -> dict[str, bytes]:
    """Return the files of a NoCloud image. User data is there even if empty: cloud-init demands it."""
    meta: dict[str, Any] = {
        **seed.meta_data,
        "instance-id": instance_id,
        "local-hostname": seed.hostname or spec.name,
    }
    if seed.ssh_keys:
        meta["public-keys"] = seed.ssh_keys
    files = {"meta-data": _json(meta), "user-data": (seed.user_data or "").encode()}
    if seed.network_config is not None:
        files["network-config"] = seed.network_config.encode()
    return files


def config_drive_files(instance_id: str, spec: InstanceSpec, seed: Seed) -> dict[str, bytes]:
    """Return the files of an OpenStack config-drive. Raises `InvalidArgument`, see `build`."""
    hostname = seed.hostname or spec.name
    meta: dict[str, Any] = {
        "uuid": instance_id,
        "name": spec.name,
        "hostname": hostname,
        "meta": seed.meta_data,
    }
    if seed.ssh_keys:
        meta["public_keys"] = {f"key-{number}": key for number, key in enumerate(seed.ssh_keys)}
    files = {"openstack/latest/meta_data.json": _json(meta)}
    if seed.user_data is not None:
        files["openstack/latest/user_data"] = seed.user_data.encode()
    if seed.network_config is not None:
        files["openstack/latest/network_data.json"] = _checked_network_data(seed.network_config)
    return files


def _checked_network_data(text: str) -> bytes:
    try:
        usable = isinstance(json.loads(text), dict)
    except ValueError:
        usable = False
    if not usable:
        raise InvalidArgument(
            "network_config of a config-drive must be OpenStack network_data as a JSON object; "
            "use datasource nocloud for cloud-init's own format",
            code="network_config_not_json",
        )
    return text.encode()


def _json(value: Any) -> bytes:
    # One key per line, so that shell scripts in small guests can read it too.
    return (json.dumps(value, indent=1) + "\n").encode()


def _iso(label: str, files: Mapping[str, bytes]) -> bytes:
    # Only agents that make seeds pay for this import.
    import pycdlib  # noqa: PLC0415

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=label, sys_ident="LINUX")
    folders: set[str] = set()
    for number, (path, data) in enumerate(files.items()):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder not in folders:
                folders.add(folder)
                iso.add_directory(_plain(parts[:depth]), rr_name=parts[depth - 1], joliet_path=f"/{folder}")
        # Plain ISO names are short and upper case; readers use the Rock Ridge or Joliet names.
        plain = f"{_plain(parts[:-1])}/F{number}.;1"
        iso.add_fp(BytesIO(data), len(data), plain, rr_name=parts[-1], joliet_path=f"/{path}")
    image = BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()


def _plain(folders: list[str]) -> str:
    return "".join(f"/{name.upper()[:8]}" for name in folders)
