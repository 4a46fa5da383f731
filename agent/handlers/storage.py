"""What handlers that remove storage share."""

from __future__ import annotations

from collections.abc import Callable

from agent.drivers.base import CallContext, Driver


def storage_removal(driver: Driver) -> Callable[[str, CallContext], None]:
    """`delete_storage` as a long call: wiping block devices takes as long as writing them. It cannot be cancelled."""

    def delete_storage(instance_id: str, _call: CallContext) -> None:
        driver.delete_storage(instance_id)

    return delete_storage
