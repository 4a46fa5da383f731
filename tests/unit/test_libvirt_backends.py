"""The back ends of disks, each with its programs: what is made, grown, replaced, removed, and left after a failure."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from libvirt_specs import INSTANCE_ID
from support.fake_lvm import OLD, FakeLvm

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.libvirt.manifest import Manifest
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.storage import Storage
from agent.drivers.libvirt.volumes import Volume
from agent.errors import Cancelled, ComputeError, FailedPrecondition, InvalidArgument, ResourceExhausted
from agent.messages.spec import InstanceSpec, RootDisk
from agent.messages.spec_disks import CdromDisk, DataDisk, Encryption, EphemeralDisk, SwapDisk

MIB = 1024 * 1024
TEXT = b"text of the image "
KEY = "a passphrase of the test"
ROOT = Volume(INSTANCE_ID, "root")
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
pytestmark = needs_qemu_img


def _can_loop() -> bool:
    return os.geteuid() == 0 and Path("/dev/loop-control").exists()


class Bench:
    def __init__(self, folder: Path, lvm: FakeLvm | None) -> None:
        self.folder = folder
        self.lvm = lvm
        keys = folder / "keys"
        keys.mkdir()
        (keys / "k1").write_text(KEY)
        (keys / "k1").chmod(0o600)
        self.keys = keys
        self.storage = self.open()

    def open(self, **more) -> Storage:
        backends = {
            "flat": {"type": "raw", "dir": str(self.folder / "flat")},
            "cow": {"type": "qcow2", "dir": str(self.folder / "cow")},
        }
        if self.lvm is not None:
            backends |= {"thick": self.lvm.settings(), "thin": self.lvm.settings(thin_pool="pool")}
        settings = {"min_free_mib": 0, "keys_dir": str(self.keys), "luks_iter_time_ms": 10, "backends": backends}
        return Storage(LibvirtSettings.model_validate(settings | more), self.folder)

    def content(self, location, key: str | None = None, count: int = 64) -> bytes:
        """The first bytes as a guest would read them."""
        out = self.folder / "content"
        if location.sealed:
            secret = ["--object", f"secret,id=k,file={self.keys / 'k1'}"]
            own = "driver=qcow2,encrypt." if location.format == "qcow2" else "driver=luks,"
            kind = "host_device" if location.kind == "block" else "file"
            source = ["--image-opts", f"{own}key-secret=k,file.driver={kind},file.filename={location.path}"]
        else:
            secret, source = [], ["-f", location.format, str(location.path)]
        subprocess.run(["qemu-img", "convert", *secret, "-O", "raw", *source, str(out)], check=True)
        return out.read_bytes()

    def made(self) -> list[str]:
        """All files and volumes of instances."""
        found = [path for name in ("instances", "flat", "cow") for path in (self.folder / name).rglob("*")]
        return sorted(str(path.relative_to(self.folder)) for path in found) + sorted(self.lvm.volumes if self.lvm else [])


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    if not _can_loop():
        yield Bench(tmp_path, None)
        return
    with FakeLvm(tmp_path / "lvm") as lvm:
        yield Bench(tmp_path, lvm)


@pytest.fixture
def image(tmp_path: Path) -> PreparedImage:
    plain, path = tmp_path / "base.raw", tmp_path / "base.qcow2"
    plain.write_bytes(TEXT * (MIB // len(TEXT)))
    os.truncate(plain, 2 * MIB)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(plain), str(path)], check=True)
    return PreparedImage(path=path, format="qcow2", virtual_size_bytes=2 * MIB, sha256="0" * 64)


def spec(backend: str | None, *, sealed: bool = False, size_mib: int = 8, **more) -> InstanceSpec:
    encryption = Encryption(key="k1") if sealed else None
    disk = RootDisk(size_mib=size_mib, backend=backend, encryption=encryption)
    return InstanceSpec(name="vm", vcpus=1, memory_mib=64, root_disk=disk, **more)


KINDS = {
    "built-in": (None, False),
    "qcow2-luks": ("cow", True),
    "raw": ("flat", False),
    "raw-luks": ("flat", True),
    "lvm": ("thick", False),
    "lvm-thin": ("thin", False),
    "lvm-luks": ("thick", True),
}


@pytest.fixture
def wanted(request: pytest.FixtureRequest) -> InstanceSpec:
    backend, encrypted = KINDS[request.param]
    if backend in ("thick", "thin") and not _can_loop():
        pytest.skip("loop devices need root")
    return spec(backend, sealed=encrypted)


def kinds(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("wanted", names or KINDS, indirect=True)


@kinds()
def test_a_volume_lives_and_leaves_nothing(bench: Bench, image: PreparedImage, wanted: InstanceSpec):
    kept = bench.storage
    kept.create(INSTANCE_ID, wanted, {"root": image}, CallContext())
    kept.create(INSTANCE_ID, wanted, {"root": image}, CallContext())
    place = kept.files(INSTANCE_ID, wanted).disks["root"]
    backend = kept.backend(wanted, "root")
    data = bench.content(place)
    assert data.startswith(TEXT)
    assert len(data) >= 8 * MIB
    if not place.sealed or place.format == "qcow2":
        # Behind the image an encrypted raw volume has what its unwritten bytes happen to decrypt to, as always.
        assert not data[2 * MIB : 8 * MIB].strip(b"\0")
    assert backend.names(INSTANCE_ID) == ["root"]
    assert backend.exists(ROOT)
    if place.sealed:
        assert TEXT not in place.path.read_bytes()

    backend.grow(ROOT, 20 * MIB)
    backend.grow(ROOT, 20 * MIB)
    assert 20 * MIB <= backend.size_bytes(ROOT) <= 24 * MIB
    assert bench.content(place).startswith(TEXT)
    grown = bench.content(place)
    assert OLD not in grown

    if not place.sealed or place.kind == "file":  # making a key's slot takes two seconds
        other = Volume(INSTANCE_ID, "root.new")
        backend.create(other, 8 * MIB, None, CallContext())
        assert {"root", "root.new"} == set(backend.names(INSTANCE_ID))
        for _ in range(2):
            backend.replace(ROOT, other)
        assert backend.names(INSTANCE_ID) == ["root"]
        assert not bench.content(place).startswith(TEXT)
        assert list(Manifest(kept.root / INSTANCE_ID).read()) == ["root"]

    for _ in range(2):
        kept.delete(INSTANCE_ID)
    assert bench.made() == []
    if bench.lvm:
        assert not bench.lvm.loops()


@kinds("built-in", "raw", "lvm", "lvm-thin", "lvm-luks")
def test_a_failure_leaves_nothing(bench: Bench, image: PreparedImage, wanted: InstanceSpec):
    """qemu-img does its work and then says that it failed."""
    broken = bench.folder / "qemu-img"
    broken.write_text(f"#!/bin/sh\n{shutil.which('qemu-img')} \"$@\"\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    kept = bench.open(qemu_img=str(broken))
    with pytest.raises(ComputeError) as caught:
        kept.create(INSTANCE_ID, wanted, {"root": image}, CallContext())
    assert caught.value.code == "qemu_img_failed"
    assert [name for name in bench.made() if name.startswith("disk") or INSTANCE_ID + "." in name] == []
    kept.delete(INSTANCE_ID)
    assert bench.made() == []


@kinds("built-in", "raw", "lvm", "lvm-thin")
def test_a_cancel_in_the_middle_leaves_nothing(bench: Bench, image: PreparedImage, wanted: InstanceSpec):
    slow = bench.folder / "qemu-img"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 2

    if wanted.root_disk.backend is None:
        # No long copy to be interrupted: the cancel is seen before it.
        cancelled = lambda: True  # noqa: E731
    kept = bench.open(qemu_img=str(slow))
    with pytest.raises(Cancelled):
        kept.create(INSTANCE_ID, wanted, {"root": image}, CallContext(cancelled=cancelled))
    kept.delete(INSTANCE_ID)
    assert bench.made() == []


@pytest.mark.skipif(not _can_loop(), reason="loop devices need root")
def test_lvm_commands_sizes_and_wiping(bench: Bench):
    kept, wanted = bench.storage, spec("thick", size_mib=9)
    kept.create(INSTANCE_ID, wanted, {}, CallContext())
    name = f"{INSTANCE_ID}.root"
    assert bench.lvm.volumes[name]["size"] == 12 * MIB  # whole extents
    assert bench.lvm.commands == [
        f"lvcreate --yes --wipesignatures n --addtag compute-agent --name {name}.part --size {9 * MIB}b vg",
        f"lvrename --yes vg {name}.part {name}",
    ]
    device = kept.files(INSTANCE_ID, wanted).disks["root"].path
    assert not device.read_bytes().strip(b"\0")
    device.write_bytes(TEXT)
    kept.delete(INSTANCE_ID)
    assert bench.lvm.commands[-1] == f"lvremove --yes vg/{name}"
    assert not (bench.lvm.discarded / name).read_bytes().strip(b"\0")


@pytest.mark.skipif(not _can_loop(), reason="loop devices need root")
def test_thin_volumes_are_made_in_the_pool(bench: Bench):
    bench.storage.create(INSTANCE_ID, spec("thin"), {}, CallContext())
    (made, _renamed) = bench.lvm.commands
    assert made.endswith(f"--virtualsize {8 * MIB}b --thinpool pool vg")
    assert bench.storage.backend(spec("thin"), "root").space_mib() == (1024, 896)


@pytest.mark.skipif(not _can_loop(), reason="loop devices need root")
def test_a_full_group_and_a_broken_lvm_are_named(bench: Bench):
    with pytest.raises(ResourceExhausted) as caught:
        bench.storage.create(INSTANCE_ID, spec("thick", size_mib=1025), {}, CallContext())
    assert (caught.value.code, caught.value.details["needed_mib"]) == ("no_space", 1028)
    bench.lvm.fail("lvrename", "something is wrong")
    with pytest.raises(ComputeError) as failed:
        bench.storage.create(INSTANCE_ID, spec("thick"), {}, CallContext())
    assert failed.value.code == "program_failed"
    assert bench.lvm.volumes == {}
    bench.lvm.fail("lvrename", "")
    bench.lvm.fail("lvremove", "it is in use")
    bench.storage.create(INSTANCE_ID, spec("thick"), {}, CallContext())
    with pytest.raises(ComputeError):
        bench.storage.delete(INSTANCE_ID)
    assert Manifest(bench.storage.root / INSTANCE_ID).read()["root"].backend == "thick"
    bench.lvm.fail("lvremove", "")
    bench.storage.delete(INSTANCE_ID)
    assert bench.made() == []


@pytest.mark.skipif(not _can_loop(), reason="loop devices need root")
def test_what_a_crash_left_half_made_is_made_again(bench: Bench):
    name = f"{INSTANCE_ID}.root"
    subprocess.run(
        [bench.lvm.program, "lvcreate", "--yes", "--addtag", "compute-agent", "--name", f"{name}.part", "--size",
         f"{4 * MIB}b", "vg"], check=True,
    )  # fmt: skip
    bench.storage.create(INSTANCE_ID, spec("thick"), {}, CallContext())
    assert list(bench.lvm.volumes) == [name]
    # In the middle of `replace`, between the two renamings.
    backend = bench.storage.backend(spec("thick"), "root")
    backend.create(Volume(INSTANCE_ID, "new"), 4 * MIB, None, CallContext())
    subprocess.run([bench.lvm.program, "lvrename", "vg", name, f"{name}.old"], check=True)
    backend.replace(ROOT, Volume(INSTANCE_ID, "new"))
    assert {n: v["size"] for n, v in bench.lvm.volumes.items()} == {name: 4 * MIB}


@pytest.mark.skipif(not _can_loop(), reason="loop devices need root")
def test_volumes_of_others_are_not_touched(bench: Bench):
    name = f"{INSTANCE_ID}.root"
    subprocess.run([bench.lvm.program, "lvcreate", "--name", name, "--size", f"{4 * MIB}b", "vg"], check=True)
    with pytest.raises(ComputeError):
        bench.storage.create(INSTANCE_ID, spec("thick"), {}, CallContext())
    bench.storage.delete(INSTANCE_ID)
    assert list(bench.lvm.volumes) == [name]


def test_a_disk_stays_where_it_was_made(bench: Bench):
    """A change of the host's default moves nothing, and a back end that is gone is missed."""
    bench.storage.create(INSTANCE_ID, spec(None), {}, CallContext())
    place = bench.storage.files(INSTANCE_ID, spec(None)).disks["root"]
    later = bench.open(default_backend="flat")
    assert later.files(INSTANCE_ID, spec(None)).disks["root"] == place
    later.delete(INSTANCE_ID)
    later.create(INSTANCE_ID, spec(None), {}, CallContext())
    assert later.files(INSTANCE_ID, spec(None)).disks["root"].format == "raw"
    without = bench.open(backends={})
    for use in (lambda: without.delete(INSTANCE_ID), lambda: without.files(INSTANCE_ID, spec(None))):
        with pytest.raises(FailedPrecondition) as caught:
            use()
        assert caught.value.code == "backend_missing"
    later.delete(INSTANCE_ID)
    assert bench.made() == []


def test_all_is_refused_before_anything_is_made(bench: Bench):
    with pytest.raises(InvalidArgument) as caught:
        bench.storage.create(INSTANCE_ID, spec("nowhere"), {}, CallContext())
    assert caught.value.code == "unknown_backend"
    second = DataDisk(kind="data", name="d", size_mib=1, encryption=Encryption(key="none-such"))
    with pytest.raises(FailedPrecondition) as missing:
        bench.storage.create(INSTANCE_ID, spec(None, disks=[second]), {}, CallContext())
    assert missing.value.code == "encryption_key_missing"
    assert not (bench.folder / "instances").exists()
    for refused in (spec("nowhere"), spec(None, disks=[second])):
        with pytest.raises(ComputeError):
            bench.storage.check(refused)
    bench.storage.check(spec("cow", sealed=True))


@pytest.mark.parametrize("bad", ["link", "world-readable", "folder", "empty", "binary", "fifo"])
def test_unsafe_keys_are_refused(bench: Bench, bad: str):
    path = bench.keys / "bad"
    if bad == "link":
        path.symlink_to(bench.keys / "k1")
    elif bad == "folder":
        path.mkdir()
    elif bad == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.write_bytes({"empty": b"", "binary": b"\xff\xfe", "world-readable": b"x"}[bad])
        path.chmod(0o644 if bad == "world-readable" else 0o600)
    disk = RootDisk(size_mib=1, encryption=Encryption(key="bad"))
    with pytest.raises(FailedPrecondition) as caught:
        bench.storage.create(INSTANCE_ID, spec(None).model_copy(update={"root_disk": disk}), {}, CallContext())
    assert caught.value.code == "encryption_key_unusable"


def test_no_key_is_an_argument_or_in_a_file(bench: Bench, image: PreparedImage):
    spy = bench.folder / "qemu-img"
    log = bench.folder / "spied"
    spy.write_text(f"#!/bin/sh\necho \"$@\" >>{log}\nenv >>{log}\nexec {shutil.which('qemu-img')} \"$@\"\n")
    spy.chmod(0o755)
    kept = bench.open(qemu_img=str(spy))
    kept.create(INSTANCE_ID, spec("cow", sealed=True), {"root": image}, CallContext())
    assert "encrypt.format=luks" in log.read_text()
    assert KEY not in log.read_text()
    for path in (bench.folder / "instances").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    assert KEY not in repr(kept.seals(INSTANCE_ID))


@pytest.mark.parametrize("backend", [None, "flat"])
def test_ephemeral_and_swap_disks_have_their_file_systems(bench: Bench, backend: str | None):
    disks = [
        EphemeralDisk(kind="ephemeral", name="scratch", size_mib=16, backend=backend),
        EphemeralDisk(kind="ephemeral", name="bare", size_mib=2, backend=backend, filesystem="none"),
        SwapDisk(kind="swap", name="swap", size_mib=4, backend=backend),
    ]
    wanted = spec(None, disks=disks)
    bench.storage.create(INSTANCE_ID, wanted, {}, CallContext())
    places = bench.storage.files(INSTANCE_ID, wanted).disks
    content = bench.content(places["scratch"])
    (bench.folder / "fs.raw").write_bytes(content)
    subprocess.run(["/usr/sbin/e2fsck", "-fn", str(bench.folder / "fs.raw")], check=True, capture_output=True)
    assert content[1024 + 120 :].startswith(b"scratch\0")
    assert len(content) == 16 * MIB
    assert bench.content(places["swap"])[4086:4096] == b"SWAPSPACE2"
    assert not bench.content(places["bare"]).strip(b"\0")
    assert places["scratch"].path.stat().st_blocks * 512 < 4 * MIB
    names = sorted(path.name for path in (bench.storage.root / INSTANCE_ID).iterdir())
    assert not [name for name in names if name.endswith(".part")]


def test_the_file_system_of_a_disk_is_always_the_same(bench: Bench):
    wanted = spec(None, disks=[EphemeralDisk(kind="ephemeral", name="scratch", size_mib=4, backend="flat")])
    found = []
    for _ in range(2):
        bench.storage.create(INSTANCE_ID, wanted, {}, CallContext())
        found.append(bench.content(bench.storage.files(INSTANCE_ID, wanted).disks["scratch"])[1024 + 104 : 1024 + 120])
        bench.storage.delete(INSTANCE_ID)
    assert found[0] == found[1]


def test_boot_files_and_cds(bench: Bench, image: PreparedImage, tmp_path: Path):
    cd = CdromDisk(kind="cdrom", name="cd", image={"url": "file:///a.iso", "sha256": "0" * 64, "format": "raw"})
    boot = {"kernel": {"kernel": {"url": "file:///k", "sha256": "0" * 64}}}
    wanted = spec(None).model_copy(update={"disks": [cd]})
    wanted = InstanceSpec.model_validate(wanted.model_dump() | {"boot": boot})
    with pytest.raises(FailedPrecondition):
        bench.storage.files(INSTANCE_ID, wanted)
    images = {"cd": image, "boot.kernel": image}
    bench.storage.create(INSTANCE_ID, wanted, images, CallContext())
    files = bench.storage.files(INSTANCE_ID, wanted)
    assert files.disks["cd"].path == image.path
    assert files.kernel.read_bytes() == image.path.read_bytes()
    assert files.kernel.stat().st_ino != image.path.stat().st_ino
    assert files.initrd is None
    bench.storage.delete(INSTANCE_ID)
    assert image.path.exists()
    assert bench.made() == []


def test_the_manifest_is_there_before_a_volume_and_says_what_to_remove(bench: Bench, monkeypatch):
    seen: list[dict] = []
    real = subprocess.Popen

    def spying(command, *args, **more):
        path = bench.folder / "instances" / INSTANCE_ID / "volumes.json"
        seen.append(json.loads(path.read_text()))
        return real(command, *args, **more)

    monkeypatch.setattr(subprocess, "Popen", spying)
    data = DataDisk(kind="data", name="d", size_mib=1, backend="cow")
    bench.storage.create(INSTANCE_ID, spec(None, disks=[data]), {}, CallContext())
    monkeypatch.undo()
    names = [(entry["name"], entry["backend"], entry["kind"]) for entry in seen[0]["volumes"]]
    assert names == [("root", "instances", "file"), ("d", "cow", "file")]
    path = bench.folder / "instances" / INSTANCE_ID / "volumes.json"
    assert stat.S_ISREG(path.stat().st_mode)
    # Without a manifest, or with a damaged one, every back end is searched.
    path.write_text("{")
    with pytest.raises(FailedPrecondition) as caught:
        bench.storage.files(INSTANCE_ID, spec(None))
    assert caught.value.code == "manifest_damaged"
    bench.storage.delete(INSTANCE_ID)
    assert not list((bench.folder / "cow").iterdir())
    assert not list((bench.folder / "instances").iterdir())
