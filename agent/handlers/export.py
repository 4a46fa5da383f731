"""`instance.export`: disks as flattened images, out of the host."""

from __future__ import annotations

from agent.core.operation import Operation
from agent.core.registry import Route
from agent.handlers.exporting import check_export, export_with_facts
from agent.messages.verbs_snapshot import ExportResult, InstanceExport


async def export(op: Operation, data: InstanceExport) -> ExportResult:
    """Export disks to a store or by HTTP PUT."""
    if not op.begun:
        await check_export(op, data.disks, data.target, data.format)
    disks, live = await export_with_facts(op, data.disks, data.target, format=data.format, compress=data.compress)
    return ExportResult(instance_id=op.instance_id, disks=disks, live=live)


ROUTES = (Route("instance.export", "build", export),)
