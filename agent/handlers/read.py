"""Reads: show, list, console log. They take no turn in the instance's lane, so they answer while it is busy."""

from __future__ import annotations

from agent.core.operation import Operation
from agent.core.registry import Route
from agent.errors import NotFound
from agent.handlers.observe import settle
from agent.handlers.view import instance_view
from agent.messages.commands import ConsoleLog, InstanceList, InstanceShow
from agent.messages.results import ConsoleLogResult, ForeignDomain, InstanceListResult, InstanceView
from agent.store.base import InstanceRecord

PAGE_BYTES = 512 * 1024
"""A list goes on in a next page beyond this, so that no answer exceeds what a broker takes."""


async def show(op: Operation, _data: InstanceShow) -> InstanceView:
    """Show one instance; while the hypervisor is away, what was known last, with `observed: unknown`."""
    record = op.ctx.instances.get(op.instance_id)
    if not op.ctx.state.connected.is_set() or record.reason == "creating":
        return instance_view(record)
    try:
        info = await op.query(op.ctx.driver.get, op.instance_id)
        details = await op.query(op.ctx.driver.details, op.instance_id)
    except NotFound:
        return instance_view(record)
    current = op.ctx.instances.find(op.instance_id)
    if current is not record:
        # Something newer was learned while we read: it stays, and there is no turn of ours to wait for.
        return instance_view(current or record, details)
    return instance_view(settle(op, info), details)


async def list_instances(op: Operation, data: InstanceList) -> InstanceListResult:
    """List from memory, which events keep current: no call to the hypervisor."""
    records = [r for r in op.ctx.instances.all() if data.after is None or r.id > data.after]
    page = _page(records, data.limit)
    foreign = None
    if data.include_foreign:
        foreign = [
            ForeignDomain(id=d.id, name=d.name, observed=d.power, vcpus=d.vcpus, memory_mib=d.memory_mib)
            for d in op.ctx.state.foreign.values()
        ]
    return InstanceListResult(
        instances=page,
        foreign=foreign,
        next_after=page[-1].id if len(records) > len(page) else None,
    )


def _page(records: list[InstanceRecord], limit: int) -> list[InstanceView]:
    """As many as are asked for, and as fit in one message."""
    page: list[InstanceView] = []
    size = 0
    for record in records[:limit]:
        view = instance_view(record)
        size += len(view.model_dump_json())
        if page and size > PAGE_BYTES:
            break
        page.append(view)
    return page


async def console_log(op: Operation, data: ConsoleLog) -> ConsoleLogResult:
    """Read the end of the serial console's log."""
    op.ctx.instances.get(op.instance_id)
    chunk = await op.query(op.ctx.driver.console_log, op.instance_id, data.max_bytes)
    return ConsoleLogResult(
        instance_id=op.instance_id, text=chunk.data.decode("utf-8", "replace"), truncated=chunk.truncated
    )


ROUTES = (
    Route("instance.show", "query", show, lane="none"),
    Route("instance.list", "query", list_instances, lane="none"),
    Route("console.log", "query", console_log, lane="none"),
)
