from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from libvirt_specs import INSTANCE_ID

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.libvirt.programs import failure
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.storage import Storage
from agent.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unsupported,
)
from agent.messages.spec import InstanceSpec, RootDisk, Seed

MIB = 1024 * 1024
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def spec(size_mib: int = 8, *, with_seed: bool = True) -> InstanceSpec:
    seed = Seed() if with_seed else None
    return InstanceSpec(name="vm", vcpus=1, memory_mib=64, root_disk=RootDisk(size_mib=size_mib), seed=seed)


def storage(state_dir: Path, **settings) -> Storage:
    return Storage(LibvirtSettings(**{"min_free_mib": 0, **settings}), state_dir)


def fake_qemu_img(folder: Path, script: str) -> str:
    path = folder / "fake-qemu-img"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def image(tmp_path: Path) -> PreparedImage:
    path = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(4 * MIB)], check=True)
    return PreparedImage(path=path, format="qcow2", virtual_size_bytes=4 * MIB, sha256="0" * 64)


@needs_qemu_img
def test_an_overlay_has_the_asked_size_and_explicit_formats(tmp_path, image):
    kept = storage(tmp_path)
    kept.create(INSTANCE_ID, spec(), {"root": image}, CallContext())
    files = kept.files(INSTANCE_ID, spec())
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", str(files.disks["root"].path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f'"virtual-size": {8 * MIB}' in info
    assert f'"backing-filename": "{image.path}"' in info
    assert '"backing-filename-format": "qcow2"' in info
    assert files.seed.stat().st_size > 0
    assert stat.S_IMODE(files.disks["root"].path.parent.stat().st_mode) == 0o711
    assert sorted(path.name for path in files.disks["root"].path.parent.iterdir()) == ["console.log", "disk.qcow2", "seed.iso", "volumes.json"]


@needs_qemu_img
def test_finished_files_are_kept(tmp_path, image):
    kept = storage(tmp_path)
    kept.create(INSTANCE_ID, spec(), {"root": image}, CallContext())
    files = kept.files(INSTANCE_ID, spec())
    before = [path.stat().st_ino for path in (files.disks["root"].path, files.seed)]
    files.console_log.write_bytes(b"boot")
    kept.create(INSTANCE_ID, spec(), {"root": image}, CallContext())
    assert [path.stat().st_ino for path in (files.disks["root"].path, files.seed)] == before
    assert files.console_log.read_bytes() == b"boot"


@needs_qemu_img
def test_an_unfinished_disk_of_a_crash_is_made_again(tmp_path):
    kept = storage(tmp_path)
    files = kept.files(INSTANCE_ID, spec())
    files.disks["root"].path.parent.mkdir(parents=True)
    files.disks["root"].path.with_name("disk.qcow2.part").write_bytes(b"half")
    kept.create(INSTANCE_ID, spec(with_seed=False), {}, CallContext())
    assert files.disks["root"].path.read_bytes()[:4] == b"QFI\xfb"
    assert not files.seed.exists()
    assert not files.disks["root"].path.with_name("disk.qcow2.part").exists()


def test_a_disk_smaller_than_its_image_is_refused_before_any_file_is_made(tmp_path):
    image = PreparedImage(tmp_path / "x", "qcow2", 8 * MIB + 1, "0" * 64)
    with pytest.raises(InvalidArgument) as caught:
        storage(tmp_path).create(INSTANCE_ID, spec(8), {"root": image}, CallContext())
    assert caught.value.code == "disk_too_small"
    assert caught.value.details == {"disk": "root", "size_mib": 8, "image_mib": 9}
    assert not (tmp_path / "instances").exists()


def test_too_little_free_space_is_refused_with_figures(tmp_path):
    with pytest.raises(ResourceExhausted) as caught:
        storage(tmp_path, min_free_mib=2**40).create(INSTANCE_ID, spec(), {}, CallContext())
    assert caught.value.code == "no_space"
    assert caught.value.retryable
    assert caught.value.details["min_free_mib"] == 2**40


@pytest.mark.parametrize(
    ("script", "error", "code"),
    [
        ("echo 'qemu-img: x: No space left on device' >&2; exit 1", ResourceExhausted, "no_space"),
        ("echo 'qemu-img: broken' >&2; exit 1", Internal, "qemu_img_failed"),
        ("exec sleep 60", DeadlineExceeded, "qemu_img_timeout"),
    ],
)
def test_a_failing_qemu_img_leaves_no_disk(tmp_path, script, error, code):
    kept = storage(tmp_path, qemu_img=fake_qemu_img(tmp_path, script), qemu_img_timeout_s=0.2)
    with pytest.raises(error) as caught:
        kept.create(INSTANCE_ID, spec(), {}, CallContext())
    assert caught.value.code == code
    assert [path.name for path in tmp_path.glob("instances/*/*")] == ["volumes.json"]
    kept.delete(INSTANCE_ID)
    assert not list(tmp_path.glob("instances/*"))


def test_a_missing_qemu_img_is_named(tmp_path):
    kept = storage(tmp_path, qemu_img=str(tmp_path / "none"))
    with pytest.raises(Unsupported) as caught:
        kept.create(INSTANCE_ID, spec(), {}, CallContext())
    assert caught.value.code == "qemu_img_missing"


def test_a_full_disk_is_recognised_from_the_operating_system(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = storage(tmp_path, uri="test:///default")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceExhausted) as caught:
        kept.create(INSTANCE_ID, spec(), {}, CallContext())
    assert caught.value.code == "no_space"
    assert not list(tmp_path.glob("instances/*/*"))


def test_quota_is_full_too():
    assert failure("qemu-img", f"x: {os.strerror(errno.EDQUOT)}").code == "no_space"


def test_cancelling_stops_before_the_disk(tmp_path):
    with pytest.raises(Cancelled):
        storage(tmp_path).create(INSTANCE_ID, spec(), {}, CallContext(cancelled=lambda: True))
    assert not list(tmp_path.glob("instances/*/*"))


def test_the_simulation_gets_a_sparse_file_without_qemu_img(tmp_path):
    kept = storage(tmp_path, uri="test:///default", qemu_img="/nonexistent")
    kept.create(INSTANCE_ID, spec(1024), {}, CallContext())
    facts = kept.files(INSTANCE_ID, spec()).disks["root"].path.stat()
    assert facts.st_size == 1024 * MIB
    assert facts.st_blocks < 100


def test_delete_removes_everything_and_repeats(tmp_path):
    kept = storage(tmp_path, uri="test:///default")
    kept.create(INSTANCE_ID, spec(), {}, CallContext())
    (tmp_path / "instances" / INSTANCE_ID / "console.log.0").write_bytes(b"x")
    kept.delete(INSTANCE_ID)
    kept.delete(INSTANCE_ID)
    assert list((tmp_path / "instances").iterdir()) == []


@pytest.mark.parametrize("bad", ["../other", "", "x", INSTANCE_ID.upper().replace("1", "A"), INSTANCE_ID + "/.."])
def test_only_uuids_name_folders(tmp_path, bad):
    with pytest.raises(InvalidArgument):
        storage(tmp_path).delete(bad)


@pytest.mark.parametrize(
    ("limit", "data", "truncated"),
    [(100, b"oldernewer", False), (10, b"oldernewer", False), (7, b"ernewer", True), (5, b"newer", True)],
)
def test_console_tail_joins_rotated_parts(tmp_path, limit, data, truncated):
    kept = storage(tmp_path)
    log = kept.console_log(INSTANCE_ID)
    log.parent.mkdir(parents=True)
    log.write_bytes(b"newer")
    log.with_name("console.log.0").write_bytes(b"older")
    chunk = kept.console_tail(INSTANCE_ID, limit)
    assert chunk.data == data
    assert chunk.truncated == truncated


def test_console_tail_without_a_log_is_empty(tmp_path):
    assert storage(tmp_path).console_tail(INSTANCE_ID, 100).data == b""


@needs_qemu_img
@pytest.mark.parametrize("lacking", ["disk.qcow2", "base.qcow2"])
def test_cache_falls_back_where_the_disk_or_its_image_cannot_be_opened_directly(
    tmp_path, image, monkeypatch, lacking
):
    kept = storage(tmp_path)
    kept.create(INSTANCE_ID, spec(), {"root": image}, CallContext())
    real_open = os.open

    def no_direct(path, flags, *rest, **more):
        if flags & os.O_DIRECT and Path(path).name == lacking:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags & ~os.O_DIRECT, *rest, **more)

    monkeypatch.setattr(os, "open", no_direct)
    assert kept.files(INSTANCE_ID, spec()).tuning["root"].cache == "writeback"
    assert storage(tmp_path, disk_cache="unsafe").files(INSTANCE_ID, spec()).tuning["root"].cache == "unsafe"


@needs_qemu_img
def test_cache_stays_none_where_o_direct_works(tmp_path, image, monkeypatch):
    kept = storage(tmp_path)
    kept.create(INSTANCE_ID, spec(), {"root": image}, CallContext())
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest: real_open(path, flags & ~os.O_DIRECT, *rest))
    assert kept.files(INSTANCE_ID, spec()).tuning["root"].cache == "none"


@pytest.mark.parametrize("name", ["x/../../{other}/disk", "../x", "", "a b", "x" * 65])
def test_a_volume_whose_name_leads_elsewhere_is_not_removed(tmp_path, name):
    kept, other = storage(tmp_path), "99999999-2222-4333-8444-555555555555"
    for instance_id in (INSTANCE_ID, other):
        folder = kept.root / instance_id
        folder.mkdir(parents=True)
        (folder / "disk.qcow2").write_bytes(b"data")
    (kept.root / INSTANCE_ID / "disk-x").mkdir()
    entry = {"name": name.format(other=other), "backend": "instances", "kind": "file", "path": "/x", "format": "qcow2"}
    (kept.root / INSTANCE_ID / "volumes.json").write_text(json.dumps({"version": 1, "volumes": [entry]}))
    kept.delete(INSTANCE_ID)
    assert not (kept.root / INSTANCE_ID).exists()
    assert (kept.root / other / "disk.qcow2").exists()
