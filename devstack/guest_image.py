"""A small guest that boots for real: Debian's kernel, busybox, an init that reports on the serial console.

``guest_image`` builds it once per cache directory, without mounting anything, from packages that apt can
download; afterwards it only reads a small file. What the guest prints is described in ``guest_init.sh``. The
image is a qcow2 that boots from a BIOS with 96 MiB, and from a UEFI (through its shell) with 256 MiB; kernel
and initramfs are there too, for guests that boot a kernel directly.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from devstack.process import DevstackError

_INIT = Path(__file__).resolve().with_name("guest_init.sh")
_META_PACKAGE = "linux-image-amd64"
_SYSLINUX_MBR = Path("/usr/lib/syslinux/mbr/mbr.bin")
_BUSYBOX = ("/bin/busybox", "/usr/bin/busybox")
# What the init calls.
_APPLETS = (
    "cat dd echo find grep head insmod mount poweroff printf sed sh sha256sum sleep swapon sync tr umount".split()  # noqa: SIM905
)

# Loaded before the guest says that it is up, and after it: storage for seeds is slow to probe.
_FIRST_MODULES = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_mem",
    "virtio_console",
    "virtio-rng",
    "button",
    "evdev",
    "acpiphp",
]
_SECOND_MODULES = [
    "isofs", "sr_mod", "sd_mod", "ata_piix", "ahci", "virtio_scsi", "i6300esb", "virtiofs", "pvpanic", "pvpanic-mmio",
]  # fmt: skip

_SECTOR = 512
_DISK_BYTES = 64 << 20
_PARTITION_START = 1 << 20
COMMAND_LINE = (
    "console=ttyS0 quiet panic=1 mitigations=off no_timer_check random.trust_cpu=on"
    " nokaslr init_on_alloc=0 cryptomgr.notests audit=0"  # for the sake of time
)
"""What the image's boot loader passes to the kernel; for direct kernel boot use the same."""


@dataclass(frozen=True)
class GuestImage:
    """The files of one build; all of them stay where they are as long as the cache directory does."""

    path: Path
    """The bootable qcow2."""
    sha256: str
    """Of the qcow2 file, in hexadecimal."""
    virtual_size_bytes: int
    """The size of the disk that a guest sees."""
    kernel: Path
    initrd: Path
    command_line: str = COMMAND_LINE


def guest_image(cache_dir: Path) -> GuestImage:
    """Return the guest image of this version; build it first (10 seconds and a download) when needed.

    Idempotent and safe in parallel: a build is renamed into place when it is complete.

    Raises:
        DevstackError: a program is missing or a package cannot be downloaded; nothing is left in the cache.

    """
    final = cache_dir.resolve() / f"guest-{_version()}"
    if not (final / "image.json").exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".guest-", dir=cache_dir.resolve()))
        try:
            result = work / "result"
            result.mkdir()
            _build(work, result)
            try:
                result.rename(final)
            except OSError:
                if not (final / "image.json").exists():
                    raise  # not the other builder who was faster
        finally:
            shutil.rmtree(work)
    facts = json.loads((final / "image.json").read_text(encoding="utf-8"))
    return GuestImage(
        path=final / "guest.qcow2",
        sha256=facts["sha256"],
        virtual_size_bytes=facts["virtual_size_bytes"],
        kernel=final / "vmlinuz",
        initrd=final / "initrd.img",
    )


def _version() -> str:
    """Return a name for what this code would build: it changes with the code, not with Debian's updates."""
    digest = hashlib.sha256()
    for source in (Path(__file__), _INIT):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _build(work: Path, result: Path) -> None:
    _say("downloading the kernel")
    tree = _kernel_package(work)
    kernel = next((tree / "boot").glob("vmlinuz-*"), None)
    if kernel is None:
        raise DevstackError(f"{_META_PACKAGE}: the package has no kernel in it")
    shutil.copyfile(kernel, result / "vmlinuz")
    _say("making the initramfs")
    (result / "initrd.img").write_bytes(gzip.compress(_initramfs(tree), 9, mtime=0))
    _say("making the disk")
    raw = work / "guest.raw"
    _make_disk(raw, result / "vmlinuz", result / "initrd.img")
    image = result / "guest.qcow2"
    # Not compressed: the kernel in it is already, and the BIOS reads in small pieces of a cluster, which would be
    # unpacked for each of them (a second of each boot).
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
    facts = {"sha256": _sha256(image), "virtual_size_bytes": _DISK_BYTES, "kernel": kernel.name}
    (result / "image.json").write_text(json.dumps(facts), encoding="utf-8")
    _say(f"guest image is ready: {image.stat().st_size / 1e6:.1f} MB, {kernel.name}")


def _kernel_package(work: Path) -> Path:
    """Download the newest kernel and unpack it; return the root of the unpacked tree."""
    shown = _run("apt-cache", "depends", "--important", _META_PACKAGE)
    match = re.search(r"Depends: (linux-image-\S+)", shown)
    if match is None:
        raise DevstackError(f"apt does not know {_META_PACKAGE}; run apt-get update")
    # The whole directory is ours: apt's own unprivileged user could not write to it.
    _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", match[1], directory=work)
    package = next(work.glob("linux-image-*.deb"))
    tree = work / "tree"
    _run("dpkg-deb", "-x", str(package), str(tree))
    return tree


# -- initramfs -----------------------------------------------------------------------------------------------


def _initramfs(tree: Path) -> bytes:
    """Return an uncompressed newc archive: busybox, init, modules and their order."""
    busybox = next((Path(path) for path in _BUSYBOX if os.path.exists(path)), None)
    if busybox is None:
        raise DevstackError("busybox is not installed (package busybox-static)")
    archive = _Cpio()
    for name in ("bin", "dev", "modules", "proc", "seed", "share", "sys"):
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, _INIT.read_bytes())
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    for applet in _APPLETS:
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    files = {path.stem: path for path in tree.rglob("*.ko")}
    done: list[str] = []
    for stage, wanted in (("first", _FIRST_MODULES), ("second", _SECOND_MODULES)):
        start = len(done)
        for module in wanted:
            _in_load_order(module, files, done)
        archive.add(f"modules/{stage}", stat.S_IFREG | 0o644, "".join(f"{m}\n" for m in done[start:]).encode())
    for module in done:
        archive.add(f"modules/{module}.ko", stat.S_IFREG | 0o644, files[module].read_bytes())
    return archive.finish()


def _in_load_order(module: str, files: dict[str, Path], done: list[str]) -> None:
    """Append a module to ``done`` behind those that it needs; a built-in one has no file and is left out."""
    # Dependencies are written with underscores, some file names with dashes.
    name = module if module in files else module.replace("_", "-")
    if name in done or name not in files:
        return
    found = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
    for needed in found[1].decode().split(",") if found else []:
        _in_load_order(needed, files, done)
    done.append(name)


class _Cpio:
    """Writes the archive format of initramfs files, also nodes that only root could make in a file system."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Append one entry, owned by root, of time 0."""
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._pad()
        self._data += content
        self._pad()

    def finish(self) -> bytes:
        """Return the archive with its end mark."""
        self.add("TRAILER!!!", 0)
        return bytes(self._data)

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


# -- disk ----------------------------------------------------------------------------------------------------


def _make_disk(raw: Path, kernel: Path, initrd: Path) -> None:
    """Write a disk with one FAT partition and SYSLINUX: both can be made without a loop device."""
    if not _SYSLINUX_MBR.exists():
        raise DevstackError(f"{_SYSLINUX_MBR} is missing (package syslinux-common)")
    first, sectors = _PARTITION_START // _SECTOR, (_DISK_BYTES - _PARTITION_START) // _SECTOR
    code = _SYSLINUX_MBR.read_bytes()[:440].ljust(446, b"\0")
    # Active, no CHS addresses, FAT16 with LBA.
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x0E, b"\xfe\xff\xff", first, sectors)
    with raw.open("wb") as disk:
        disk.write((code + entry).ljust(510, b"\0") + b"\x55\xaa")
        disk.truncate(_DISK_BYTES)
    config = raw.with_name("syslinux.cfg")
    config.write_text(
        f"DEFAULT guest\nPROMPT 0\nLABEL guest\n  LINUX /vmlinuz.efi\n  INITRD /initrd.img\n  APPEND {COMMAND_LINE}\n",
        encoding="ascii",
    )
    # The shell of a UEFI runs this when it finds no boot loader; Debian's kernel is an EFI program, too.
    script = raw.with_name("startup.nsh")
    script.write_text(f"\\vmlinuz.efi initrd=\\initrd.img {COMMAND_LINE}\r\n", encoding="ascii")
    partition = f"{raw}@@{_PARTITION_START}"
    _run("mformat", "-i", partition, "-T", str(sectors), "-h", "255", "-s", "63", "-H", str(first), "::")
    files = {"vmlinuz.efi": kernel, "initrd.img": initrd, "syslinux.cfg": config, "startup.nsh": script}
    for name, source in files.items():
        _run("mcopy", "-i", partition, str(source), f"::/{name}")
    _run("syslinux", "--install", "--offset", str(_PARTITION_START), str(raw))


# -- small things --------------------------------------------------------------------------------------------


def _run(*command: str, directory: Path | None = None) -> str:
    environment = os.environ | {"LC_ALL": "C", "MTOOLS_SKIP_CHECK": "1"}
    try:
        done = subprocess.run(
            command, cwd=directory, env=environment, check=False, timeout=300.0,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DevstackError(f"{command[0]} is not installed; run devstack/bootstrap.sh packages") from error
    if done.returncode != 0:
        raise DevstackError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _say(text: str) -> None:
    print(f"guest-image: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Build the image in the directory named on the command line and print where it is, as JSON."""
    if len(sys.argv) != 2:
        print("usage: python3 -m devstack.guest_image DIR", file=sys.stderr)
        return 2
    try:
        image = guest_image(Path(sys.argv[1]))
    except DevstackError as error:
        print(f"guest-image: {error}", file=sys.stderr)
        return 1
    print(json.dumps({name: str(value) for name, value in vars(image).items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
