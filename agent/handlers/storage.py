"""What handlers that remove storage share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent.drivers.base import CallContext, Driver


def storage_removal(driver: Driver) -> Callable[[str, CallContext], None]:
    """`delete_storage` as a long call: wiping block devices takes as long as writing them. It cannot be cancelled."""

    def delete_storage(instance_id: str, _call: CallContext) -> None:
        driver.delete_storage(instance_id)

    return delete_storage


def uncancellable(call: Callable[..., None]) -> Callable[..., None]:
    """Any other call that may wipe or copy a device, as a long one: it is not told of a cancel."""

    def run(*args: Any) -> None:
        call(*args[:-1])

    run.__name__ = getattr(call, "__name__", "call")
    return run
