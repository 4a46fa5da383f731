"""UEFI firmware for tests, unpacked from Debian's package and not installed: the tests do not depend on the host's.

``firmware`` gives a folder of firmware descriptors, as QEMU's own, that name the unpacked files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from devstack.process import DevstackError

_PACKAGE = "ovmf"


def firmware(cache_dir: Path) -> Path:
    """Return the folder of descriptors; download the package (8 MB) when it is not in the cache yet.

    Idempotent and safe in parallel: what is unpacked is renamed into place when it is complete.

    Raises:
        DevstackError: the package cannot be downloaded; nothing is left in the cache.

    """
    final = cache_dir.resolve() / "ovmf"
    if not final.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".ovmf-", dir=cache_dir.resolve()))
        try:
            _unpack(work, final)
            try:
                (work / "tree").rename(final)
            except OSError:
                if not final.exists():
                    raise  # not another one who was faster
        finally:
            shutil.rmtree(work)
    return final / "usr/share/qemu/firmware"


def _unpack(work: Path, final: Path) -> None:
    # The whole directory is ours: apt's own unprivileged user could not write to it.
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", _PACKAGE], work)
    package = next(work.glob(f"{_PACKAGE}_*.deb"))
    _run(["dpkg-deb", "-x", str(package), "tree"], work)
    for descriptor in (work / "tree/usr/share/qemu/firmware").glob("*.json"):
        text = descriptor.read_text(encoding="utf-8")
        descriptor.write_text(text.replace('"/usr/', f'"{final}/usr/'), encoding="utf-8")


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"LC_ALL": "C"}, check=False, timeout=300.0,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DevstackError(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        raise DevstackError(f"{' '.join(command)}: {done.stderr.strip()}")
