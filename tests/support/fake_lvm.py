"""Stands in for LVM where the kernel has no device-mapper: logical volumes are loop devices on files.

It takes the commands that the agent gives, with LVM's own options, refuses any other, and writes every one down. The
extents of a thick volume hold old bytes at first, as those of a real one do.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

MIB = 1024 * 1024
OLD = b"bytes of somebody else "
EXTENT = 4 * MIB


class FakeLvm:
    """A volume group `vg` with a thin pool `pool`. Use it with `with`: its loop devices must end."""

    def __init__(self, folder: Path, size_mib: int = 1024) -> None:
        self.folder = folder
        self.device_dir = folder / "dev"
        self.program = folder / "lvm"
        (self.device_dir / "vg").mkdir(parents=True)
        self.program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import fake_lvm\nfake_lvm.main({str(folder)!r}, sys.argv[1:])\n"
        )
        self.program.chmod(0o755)
        (folder / "state.json").write_text(json.dumps({"size": size_mib * MIB, "volumes": {}}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for loop in self.loops():
            subprocess.run(["losetup", "--detach", loop], check=False, timeout=20)
        assert not self.loops()

    def settings(self, **more: str) -> dict[str, object]:
        """A back end's settings."""
        known = {"program": str(self.program), "device_dir": str(self.device_dir), "volume_group": "vg", "type": "lvm"}
        return {**known, **more}

    def loops(self) -> list[str]:
        """The loop devices that are there."""
        shown = subprocess.run(
            ["losetup", "--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE"],
            check=True, capture_output=True, text=True, timeout=20,
        ).stdout  # fmt: skip
        return [line.split()[0] for line in shown.splitlines() if f" {self.folder}/" in line]

    @property
    def volumes(self) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = json.loads((self.folder / "state.json").read_text())["volumes"]
        return found

    @property
    def commands(self) -> list[str]:
        """All that was asked for, but for listings."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if not line.startswith(("lvs", "vgs"))]

    @property
    def discarded(self) -> Path:
        """Where the backing files of removed volumes are kept, so that a test can see that they were wiped."""
        return self.folder / "removed"

    def fail(self, command: str, message: str = "broken") -> None:
        """Let a command fail from now on; an empty message heals it."""
        (self.folder / f"fail-{command}").write_text(message)


@contextmanager
def _state(folder: Path) -> Iterator[dict]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "state.json"
        state = json.loads(path.read_text())
        yield state
        path.write_text(json.dumps(state))


def main(folder_name: str, arguments: list[str]) -> None:
    folder = Path(folder_name)
    command, rest = arguments[0], arguments[1:]
    with (folder / "log").open("a") as log:
        log.write(" ".join(arguments) + "\n")
    failing = folder / f"fail-{command}"
    if failing.exists() and failing.read_text():
        sys.exit(f"  {failing.read_text()}")
    options: dict[str, str] = {}
    names: list[str] = []
    words = iter(rest)
    for word in words:
        if word == "--yes" or word == "--nosuffix":
            continue
        if word.startswith("--"):
            options[word[2:]] = next(words)
        else:
            names.append(word)
    with _state(folder) as state:
        COMMANDS[command](folder, state, options, names)


def _lvcreate(folder: Path, state: dict, options: dict[str, str], names: list[str]) -> None:
    assert names == ["vg"]
    thin = "thinpool" in options
    assert not thin or options["thinpool"] == "pool"
    size = _rounded(options["virtualsize" if thin else "size"])
    name = options["name"]
    if name in state["volumes"]:
        sys.exit(f'  Logical Volume "{name}" already exists in volume group "vg"')
    if not thin and size > _free(state):
        sys.exit('  Volume group "vg" has insufficient free space (0 extents): 99 required.')
    state["volumes"][name] = {"size": size, "tags": options.get("addtag", ""), "thin": thin}
    backing = folder / f"{name}.img"
    with backing.open("wb") as file:
        file.truncate(size)
        if not thin:
            file.write(OLD * (MIB // len(OLD)))
            file.seek(size - len(OLD))
            file.write(OLD)
    _attach(folder, name)


def _attach(folder: Path, name: str) -> None:
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(folder / f"{name}.img")], check=True, capture_output=True, text=True
    ).stdout.strip()
    (folder / "dev" / "vg" / name).symlink_to(loop)


def _detach(folder: Path, name: str) -> None:
    link = folder / "dev" / "vg" / name
    subprocess.run(["losetup", "--detach", str(link.readlink())], check=True)
    link.unlink()


def _lvremove(folder: Path, state: dict, _options: dict[str, str], names: list[str]) -> None:
    name = names[0].removeprefix("vg/")
    del state["volumes"][name]
    _detach(folder, name)
    (folder / "removed").mkdir(exist_ok=True)
    (folder / f"{name}.img").rename(folder / "removed" / name)


def _lvextend(folder: Path, state: dict, options: dict[str, str], names: list[str]) -> None:
    name = names[0].removeprefix("vg/")
    size = _rounded(options["size"])
    assert size > state["volumes"][name]["size"]
    with (folder / f"{name}.img").open("r+b") as file:
        old = file.seek(0, os.SEEK_END)
        file.truncate(size)
        if not state["volumes"][name]["thin"]:
            file.seek(old)
            file.write(OLD)
    state["volumes"][name]["size"] = size
    subprocess.run(["losetup", "--set-capacity", str((folder / "dev" / "vg" / name).readlink())], check=True)


def _lvrename(folder: Path, state: dict, _options: dict[str, str], names: list[str]) -> None:
    group, old, new = names
    assert group == "vg"
    assert new not in state["volumes"]
    state["volumes"][new] = state["volumes"].pop(old)
    # The loop device stays open, as a device-mapper one does; only names change.
    (folder / f"{old}.img").rename(folder / f"{new}.img")
    (folder / "dev" / "vg" / old).rename(folder / "dev" / "vg" / new)


def _lvs(_folder: Path, state: dict, _options: dict[str, str], names: list[str]) -> None:
    if names == ["vg/pool"]:
        _answer("lv", [{"lv_size": str(state["size"]), "data_percent": "12.50"}])
        return
    assert names == ["vg"]
    rows = [{"lv_name": "root", "lv_size": str(EXTENT), "lv_tags": ""}]
    for name, known in state["volumes"].items():
        rows.append({"lv_name": name, "lv_size": str(known["size"]), "lv_tags": known["tags"]})
    _answer("lv", rows)


def _vgs(_folder: Path, state: dict, options: dict[str, str], names: list[str]) -> None:
    assert names == ["vg"]
    facts = {"vg_size": str(state["size"]), "vg_free": str(_free(state)), "vg_extent_size": str(EXTENT)}
    _answer("vg", [{field: facts[field] for field in options["options"].split(",")}])


def _answer(kind: str, rows: list[dict[str, str]]) -> None:
    print(json.dumps({"report": [{kind: rows}]}))


def _rounded(size: str) -> int:
    assert size.endswith("b")
    return -(-int(size[:-1]) // EXTENT) * EXTENT


def _free(state: dict) -> int:
    return int(state["size"]) - sum(known["size"] for known in state["volumes"].values() if not known["thin"])


COMMANDS = {
    "lvcreate": _lvcreate,
    "lvremove": _lvremove,
    "lvextend": _lvextend,
    "lvrename": _lvrename,
    "lvs": _lvs,
    "vgs": _vgs,
}
