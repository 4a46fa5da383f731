"""Exporting disks, as steps of whatever operation needs it: `instance.export`, `instance.backup`, the shelf."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.core.operation import Json, Operation, require
from agent.drivers.verbs.snapshot import DiskExport, ExportRequest
from agent.errors import InvalidArgument, Unsupported
from agent.exports import files
from agent.exports.service import Destination
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk
from agent.messages.types import DiskFormat
from agent.messages.verbs_snapshot import ExportedDisk, ExportTarget


def data_disks(spec: InstanceSpec) -> list[str]:
    """Names of the disks that can be exported, the root disk first."""
    return ["root", *(disk.name for disk in spec.disks if not isinstance(disk, CdromDisk))]


async def check_export(op: Operation, disks: Sequence[str], target: ExportTarget, format: DiskFormat) -> None:
    """Refuse what cannot be exported, or not there. To be called before the first step, unless `op.begun`.

    Raises `InvalidArgument` (`unknown_disk`, `export_store_unknown`, `export_target_forbidden`), `Unsupported`
    (`export_unsupported`), `AlreadyExists` (`export_exists`), `FailedPrecondition`.
    """
    record = op.ctx.instances.get(op.instance_id)
    require(record.life.shelf is None, "the instance is shelved: its disks are exported already and no longer here")
    known = data_disks(record.spec)
    for name in disks:
        if name not in known:
            raise InvalidArgument(
                f"the instance has no disk {name} that holds data; it has: {', '.join(known)}",
                code="unknown_disk",
                disk=name,
            )
        if _is_encrypted(record.spec, name):
            raise Unsupported(
                f"disk {name} is encrypted; an export would hold its data in the clear",
                code="export_unsupported",
                disk=name,
            )
    for name in disks:
        await op.ctx.exports.check_free(op.ctx.exports.destination(target, name, format, op.id))


def _is_encrypted(spec: InstanceSpec, name: str) -> bool:
    options = spec.root_disk if name == "root" else next(disk for disk in spec.disks if disk.name == name)
    return getattr(options, "encryption", None) is not None


async def export_disks(
    op: Operation,
    disks: Sequence[str],
    target: ExportTarget,
    *,
    format: DiskFormat = "qcow2",
    compress: bool = False,
) -> list[ExportedDisk]:
    """Export disks to a target, as steps of `op`: `export`, `publish-<disk>` for each, `export-clean`.

    Flattened images, all of one point in time; live where the guest runs, without a change to its disks. Each has its
    sha256. Call `check_export` first. Undone (in reverse) if a later step of the operation fails before its point of
    no return: what was published is withdrawn, what was staged removed. Raises what `Driver.export_disks` and
    `Exports.publish` raise.
    """
    return (await export_with_facts(op, disks, target, format=format, compress=compress))[0]


async def export_with_facts(
    op: Operation, disks: Sequence[str], target: ExportTarget, *, format: DiskFormat, compress: bool
) -> tuple[list[ExportedDisk], bool]:
    """As `export_disks`; also tells whether it was live."""
    exports, folder = op.ctx.exports, op.ctx.exports.staging(op.id)
    spec = op.ctx.instances.get(op.instance_id).spec
    staged = {name: folder / f"{name}.{format}" for name in disks}

    async def copy() -> Json:
        await op.mutate(op.ctx.driver.abort_export, op.instance_id, folder)
        await asyncio.to_thread(files.remove_folder, folder)
        await asyncio.to_thread(files.make_folder, folder)
        request = ExportRequest(staged, format, compress, _reporter(op))
        made = await op.long(op.ctx.driver.export_disks, op.instance_id, spec, request)
        return {name: await _described(op, path, made[name]) for name, path in staged.items()}

    async def discard() -> None:
        await op.mutate(op.ctx.driver.abort_export, op.instance_id, folder)
        await asyncio.to_thread(files.remove_folder, folder)

    async def clean() -> Json:
        for destination in destinations.values():
            await exports.settle(destination)
        await asyncio.to_thread(files.remove_folder, folder)
        return None

    facts = await op.step("export", copy, undo=discard) or {}
    destinations = {name: exports.destination(target, name, format, op.id) for name in disks}
    exported = [
        ExportedDisk(
            name=name, url=destinations[name].shown, sha256=facts[name]["sha256"], size_bytes=facts[name]["size_bytes"],
            virtual_size_bytes=facts[name]["virtual_size_bytes"], format=format,
        )
        for name in disks
    ]  # fmt: skip
    for disk in exported:
        await _publish(op, staged[disk.name], destinations[disk.name], disk)
    await op.step("export-clean", clean, harmless=True)
    return exported, all(fact["live"] for fact in facts.values())


async def _publish(op: Operation, source: Path, destination: Destination, disk: ExportedDisk) -> None:
    """One step that makes an exported disk public, and whose undo takes it back."""
    done: list[str] = []

    async def publish() -> Json:
        def report(done_bytes: int, total_bytes: int) -> None:
            op.progress(done_bytes=done_bytes, total_bytes=total_bytes)

        await op.ctx.exports.publish(source, destination, disk.sha256, report)
        return {"published": True}

    async def withdraw() -> None:
        await op.ctx.exports.withdraw(source, destination, disk.sha256 if done else None)

    # A copy into a store goes on in its thread, whoever waits for it: only an upload can be cut off.
    if await op.step(f"publish-{disk.name}", publish, undo=withdraw, cancellable=destination.slot is None):
        done.append(disk.sha256)


def _reporter(op: Operation) -> _Report:
    return _Report(op, asyncio.get_running_loop())


class _Report:
    """Carries figures from a driver's thread to the operation."""

    def __init__(self, op: Operation, loop: asyncio.AbstractEventLoop) -> None:
        self._op = op
        self._loop = loop

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        with suppress(RuntimeError):  # the loop is closed, the thread was left behind
            self._loop.call_soon_threadsafe(self._tell, done_bytes, total_bytes)

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        self._op.progress(done_bytes=done_bytes, total_bytes=total_bytes)


async def _described(op: Operation, path: Path, made: DiskExport) -> dict[str, object]:
    """Hash a finished file, and have it written to the disk meanwhile."""
    size = (await asyncio.to_thread(path.stat)).st_size
    report, stop = _reporter(op), threading.Event()

    def hashed() -> str:
        return files.digest(
            path, lambda done: report(done, size), lambda: stop.is_set() or bool(op.record.cancel_requested)
        )

    try:
        digest, _ = await asyncio.gather(asyncio.to_thread(hashed), asyncio.to_thread(files.sync, path))
    finally:
        stop.set()
    return {
        "sha256": digest,
        "size_bytes": size,
        "virtual_size_bytes": made.virtual_size_bytes,
        "live": made.live,
    }
