"""Waits of driver threads: ended by the domain's events, by the connection's, and by a cancel."""

from __future__ import annotations

import threading

import pytest

from agent.drivers.base import CallContext, ConnectionChanged, DriverEvent, PowerChanged, Reported
from agent.drivers.libvirt.wakeups import Wakeups
from agent.messages.events import InstanceJobCompleted

DONE = InstanceJobCompleted(instance_id="one", operation="backup", succeeded=True, figures={})


@pytest.mark.parametrize(
    ("event", "wakes"),
    [
        (PowerChanged("one", "stopped", "shutdown"), True),
        (Reported(DONE), True),
        (ConnectionChanged(False, "lost"), True),
        (PowerChanged("two", "stopped", "shutdown"), False),
    ],
    ids=["power", "job", "connection", "another"],
)
def test_an_event_ends_the_wait_for_its_domain(event: DriverEvent, wakes: bool) -> None:
    wakeups = Wakeups()
    with wakeups.listening("one", CallContext()) as news, wakeups.listening("one", CallContext()) as other:
        wakeups.take(event)
        assert (news.is_set(), other.is_set()) == (wakes, wakes)


def test_a_cancel_ends_the_wait_of_its_call_only() -> None:
    wakeups, call = Wakeups(), CallContext()
    with wakeups.listening("one", call) as news, wakeups.listening("one", CallContext()) as other:
        call.wake()
        assert (news.is_set(), other.is_set()) == (True, False)


def test_nothing_is_kept_of_a_wait_that_has_ended() -> None:
    wakeups, call = Wakeups(), CallContext()
    with wakeups.listening("one", call) as news:
        pass
    call.wake()
    wakeups.take(ConnectionChanged(True, "back"))
    assert not news.is_set()
    assert not wakeups._waiting


def test_a_call_waits_on_from_another_thread() -> None:
    wakeups = Wakeups()
    with wakeups.listening("one", CallContext()) as news:
        threading.Thread(target=wakeups.take, args=(Reported(DONE),)).start()
        assert news.wait(10)
