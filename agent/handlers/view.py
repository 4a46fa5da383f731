"""Records as the wire shows them."""

from __future__ import annotations

from agent.drivers.base import InstanceDetails
from agent.messages.life import ORDINARY
from agent.messages.results import InstanceView
from agent.store.base import InstanceRecord


def instance_view(record: InstanceRecord, details: InstanceDetails | None = None) -> InstanceView:
    """Show a record, with what the driver adds where it was asked.

    The seed is left out: it may hold secrets, and results go to every reader of the events exchange.
    """
    view = InstanceView(
        id=record.id,
        name=record.name,
        desired=record.desired,
        observed=record.observed,
        reason=record.reason,
        generation=record.generation,
        spec=record.spec.model_copy(update={"seed": None}),
        life=None if record.life == ORDINARY else record.life,
        created_at=record.created_at,
        updated_at=record.updated_at,
    )
    if details is None:
        return view
    return view.model_copy(
        update={
            "vnc_address": details.vnc_address,
            "mac_addresses": list(details.mac_addresses),
            "disk_paths": list(details.disk_paths),
            "console_log": details.console_log,
        }
    )
