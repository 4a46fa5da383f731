"""What must not be left on a host: domains, files, processes that no instance owns."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from devstack.daemon import Daemon
from devstack.process import all_pids

_UNFINISHED = (".tmp", ".part", ".new")


def leftovers(state_dir: Path, instances: Collection[str] = ()) -> list[str]:
    """Sentences about what lies below a state directory and belongs to none of `instances`.

    Holds for all drivers: `instances/` is the libvirt driver's, `fake/` the persistent fake's.
    """
    found = [f"unfinished file {path}" for path in _files(state_dir) if _unfinished(path)]
    for folder in (state_dir / "instances", state_dir / "fake" / "instances"):
        found += [f"files of no instance in {path}" for path in _entries(folder) if path.name not in instances]
    for path in _entries(state_dir / "fake" / "domains"):
        if path.stem not in instances:
            found.append(f"domain of no instance: {path}")
    found += [f"an export's folder: {path}" for path in _entries(state_dir / "exports")]
    images = {path.name for path in _entries(state_dir / "images")}
    found += [f"image without its description: {name}" for name in images if _lonely(name, images)]
    found += [f"process {pid} works on {state_dir}: {words}" for pid, words in _workers(state_dir)]
    return found


def domain_ids(libvirtd: Daemon) -> set[str]:
    """UUIDs of all domains, running or not."""
    return set(libvirtd.virsh("list", "--all", "--uuid").split())


def libvirt_leftovers(libvirtd: Daemon, state_dir: Path, instances: Collection[str] = ()) -> list[str]:
    """As `leftovers`, with the domains and QEMU processes of a daemon. Running instances have one QEMU each."""
    ids = domain_ids(libvirtd)
    found = leftovers(state_dir, instances)
    found += [f"domain of no instance: {name}" for name in ids - set(instances)]
    found += [f"instance without a domain: {name}" for name in set(instances) - ids]
    running = set(libvirtd.virsh("list", "--name").split())
    processes = set(libvirtd.qemu_pids())
    found += [f"QEMU of no running domain: {name}" for name in processes - running]
    return found


def clean_libvirt(libvirtd: Daemon) -> None:
    """Remove every domain and secret: what a failed test left must not fail the next one."""
    for name in domain_ids(libvirtd):
        with suppress(Exception):
            libvirtd.virsh("destroy", name)
        with suppress(Exception):
            libvirtd.virsh("undefine", name, "--managed-save", "--snapshots-metadata", "--nvram")
    for line in libvirtd.virsh("secret-list").splitlines():
        with suppress(Exception):
            libvirtd.virsh("secret-undefine", line.split()[0])


def _entries(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def _files(folder: Path) -> list[Path]:
    return [Path(where) / name for where, _, names in os.walk(folder) for name in names]


def _unfinished(path: Path) -> bool:
    return path.name.endswith(_UNFINISHED) or path.name.startswith(".partial-")


def _lonely(name: str, names: Collection[str]) -> bool:
    stem = name.removesuffix(".json")
    return stem not in names or f"{stem}.json" not in names


def _workers(state_dir: Path) -> list[tuple[int, str]]:
    """Helper processes (qemu-img) that name the state directory; QEMU itself is the hypervisor's affair."""
    found = []
    for pid in all_pids():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(words[0]).name == "qemu-img" and any(str(state_dir) in word for word in words):
                found.append((pid, " ".join(words)))
    return found
