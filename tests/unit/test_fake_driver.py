"""What only the fake can: scripted faults, steering by label and by file, simulated guests, files that outlive it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.drivers.base import (
    OPTIONAL_VERBS,
    CallContext,
    ConnectionChanged,
    DriverContext,
    DriverEvent,
    PowerChanged,
    Reported,
)
from agent.drivers.fake import FakeDriver, Fault
from agent.errors import (
    AlreadyExists,
    Cancelled,
    ComputeError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from agent.messages.spec import InstanceSpec

LONG_S = 60.0


class World:
    """A driver, its events, and short names for what tests do."""

    def __init__(self, state_dir: Path, **settings: Any) -> None:
        self.state_dir = state_dir
        self.settings = settings
        self.events: list[DriverEvent] = []
        self.changed = threading.Condition()
        self.driver = self.make()

    def make(self) -> FakeDriver:
        context = DriverContext(host="h", state_dir=self.state_dir, settings=self.settings, emit=self.emit)
        return FakeDriver(context)

    def emit(self, event: DriverEvent) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def wait(self, *expected: DriverEvent) -> None:
        """Wait until these events have come, in this order, with others between them."""

        def come() -> bool:
            events = iter(self.events)
            return all(event in events for event in expected)

        with self.changed:
            assert self.changed.wait_for(come, LONG_S), (expected, self.events)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for what nothing announces to the test, such as a file being polled."""
        limit = time.monotonic() + LONG_S
        while not ready():
            assert time.monotonic() < limit
            threading.Event().wait(0.01)

    def create(self, *, start: bool = True, **changes: Any) -> str:
        instance_id, made = str(uuid.uuid4()), spec(**changes)
        self.driver.create_storage(instance_id, made, {}, CallContext())
        self.driver.define(instance_id, made, generation=1)
        if start:
            self.driver.start(instance_id)
        return instance_id

    def power(self, instance_id: str) -> str:
        return self.driver.get(instance_id).power

    def restart(self) -> None:
        """Begin anew as a new process would, without the old driver's good end."""
        self.driver.close()
        self.driver = self.make()
        self.driver.connect()

    def script(self, content: object) -> None:
        folder = self.state_dir / "fake"
        folder.mkdir(exist_ok=True)
        temporary = folder / "faults.new"
        temporary.write_text(content if isinstance(content, str) else json.dumps(content))
        temporary.replace(folder / "faults.json")


def spec(**changes: Any) -> InstanceSpec:
    data: dict[str, Any] = {
        "name": f"vm-{uuid.uuid4().hex[:8]}",
        "vcpus": 1,
        "memory_mib": 64,
        "root_disk": {"size_mib": 10},
    }
    return InstanceSpec.model_validate(data | changes)


Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[World] = []

    def make_world(**settings: Any) -> World:
        world = World(tmp_path, **settings)
        made.append(world)
        world.driver.connect()
        return world

    yield make_world
    for world in made:
        world.driver.close()


# --- settings and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"cpu": 1}, "cpu"),
        ({"faults": [{"call": "begin"}]}, "faults.0.call"),
        ({"faults": [{"call": "start", "error": "no_such"}]}, "no_such"),
        ({"latency_s": {"strat": 1}}, "latency_s.strat"),
        ({"lacks": ["instance.start"]}, "lacks.0"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidArgument, match=key):
        World(tmp_path, **settings)


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        ({"fake.strat-error": "internal"}, "unknown_fake_label"),
        ({"fake.start-error": "no_such"}, "bad_fake_label"),
        ({"fake.crash-after-s": "soon"}, "bad_fake_label"),
        ({"fake.crash-after-s": "nan"}, "bad_fake_label"),
        ({"fake.start-hang-s": "-1"}, "bad_fake_label"),
    ],
)
def test_wrong_labels_are_refused(make: Make, labels: dict[str, str], code: str) -> None:
    world = make()
    with pytest.raises(InvalidArgument) as caught:
        world.driver.define(str(uuid.uuid4()), spec(labels=labels), generation=1)
    assert caught.value.code == code
    assert world.driver.recover() == []


def test_error_by_label_strikes_as_often_as_told(make: Make) -> None:
    world = make()
    labels = {"fake.start-error": "internal", "fake.start-error-times": "2"}
    steered, other = world.create(start=False, labels=labels), world.create(start=False)
    for _ in range(2):
        with pytest.raises(Internal):
            world.driver.start(steered)
        world.driver.start(other)
    world.driver.start(steered)
    assert world.power(steered) == "running"


def test_storage_error_by_label_comes_before_there_is_a_domain(make: Make) -> None:
    world = make()
    with pytest.raises(ResourceExhausted):
        world.create(labels={"fake.create_storage-error": "ResourceExhausted"})


def test_guest_steered_by_label(make: Make) -> None:
    world = make()
    crashes = world.create(labels={"fake.crash-after-s": "0.01"})
    world.wait(PowerChanged(crashes, "running", "booted"), PowerChanged(crashes, "crashed", "crashed"))
    stops = world.create(labels={"fake.stop-after-s": "0.01"})
    world.wait(PowerChanged(stops, "running", "booted"), PowerChanged(stops, "stopped", "shutdown"))
    fails = world.create(labels={"fake.io-error-after-s": "0.01"})
    world.wait(PowerChanged(fails, "paused", "io-error"))
    deaf = world.create(labels={"fake.guest-shutdown-s": "never"})
    world.driver.shutdown(deaf)
    assert [world.power(each) for each in (crashes, stops, fails, deaf)] == ["crashed", "stopped", "paused", "running"]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_fault_before_and_after_the_effect(make: Make) -> None:
    world = make()
    instance_id = world.create(start=False)
    world.driver.inject(Fault(call="start", error="unavailable", times=1))
    world.driver.inject(Fault(call="start", error="Internal", times=1, crash_after=True))
    with pytest.raises(Unavailable):
        world.driver.start(instance_id)
    assert world.power(instance_id) == "stopped"
    with pytest.raises(Internal):
        world.driver.start(instance_id)
    assert world.power(instance_id) == "running"
    world.driver.start(instance_id)


def test_fault_for_some_instances_and_all_calls(make: Make) -> None:
    world = make(faults=[{"call": "*", "instance": "bad-*", "error": "bug"}])
    with pytest.raises(RuntimeError):
        world.create(name="bad-1")
    world.create(name="good-1")
    world.driver.clear_faults()
    world.create(name="bad-1")


def test_hanging_call_is_released(make: Make) -> None:
    world = make()
    instance_id = world.create(start=False)
    world.driver.inject(Fault(call="start", hang_s=LONG_S))
    thread = threading.Thread(target=world.driver.start, args=(instance_id,))
    thread.start()
    assert world.power(instance_id) == "stopped"
    world.driver.clear_faults()
    thread.join(LONG_S / 2)
    assert world.power(instance_id) == "running"


def test_latency_is_that_of_the_call_or_the_default(make: Make) -> None:
    world = make(latency_s={"default": 0.0, "get": 0.05})
    instance_id = world.create()
    began = time.monotonic()
    world.driver.get(instance_id)
    assert time.monotonic() - began >= 0.05


def test_slow_storage_tells_progress_and_is_cancelled(make: Make) -> None:
    world = make(latency_s={"create_storage": LONG_S})
    seen: list[float] = []
    call = CallContext(progress=seen.append, cancelled=lambda: len(seen) >= 2)
    instance_id = str(uuid.uuid4())
    with pytest.raises(Cancelled):
        world.driver.create_storage(instance_id, spec(), {}, call)
    assert world.driver.capacity().disk_free_mib == world.driver.capacity().disk_total_mib


def test_connect_can_fail(tmp_path: Path) -> None:
    world = World(tmp_path, faults=[{"call": "connect", "error": "unavailable", "times": 1}])
    with pytest.raises(Unavailable):
        world.driver.connect()
    world.driver.connect()
    world.driver.close()


def test_faults_by_file_hold_over_a_restart(make: Make) -> None:
    world = make(persist=True)
    instance_id = world.create(start=False)
    world.script([{"call": "start", "error": "internal", "times": 2}])
    with pytest.raises(Internal):
        world.driver.start(instance_id)
    world.restart()
    with pytest.raises(Internal):
        world.driver.start(instance_id)
    world.restart()
    world.driver.start(instance_id)


def test_unreadable_file_keeps_the_old_faults(make: Make) -> None:
    world = make()
    instance_id = world.create(start=False)
    world.script([{"call": "start", "error": "internal"}])
    with pytest.raises(Internal):
        world.driver.start(instance_id)
    world.script('[{"call": "sta')
    with pytest.raises(Internal):
        world.driver.start(instance_id)
    (world.state_dir / "fake" / "faults.json").unlink()
    world.driver.start(instance_id)


def test_connection_by_file(make: Make) -> None:
    world = make()
    world.script({"disconnected": True})
    # No call is made: the fake looks at the file by itself.
    world.wait(ConnectionChanged(False, "as faults.json says"))
    assert not world.driver.is_connected()
    world.script({"disconnected": False})
    world.wait_until(world.driver.is_connected)
    world.driver.recover()
    world.wait(ConnectionChanged(False, "as faults.json says"), ConnectionChanged(True, "as faults.json says"))


_KILLED = """
import sys, uuid
from pathlib import Path
from agent.drivers.base import CallContext, DriverContext
from agent.drivers.fake import FakeDriver
from agent.messages.spec import InstanceSpec
settings = {"persist": True, "faults": [{"call": "start", "kill": True, "crash_after": sys.argv[2] == "after"}]}
driver = FakeDriver(DriverContext(host="h", state_dir=Path(sys.argv[1]), settings=settings, emit=lambda event: None))
driver.connect()
spec = InstanceSpec.model_validate({"name": "vm", "vcpus": 1, "memory_mib": 64, "root_disk": {"size_mib": 10}})
driver.create_storage(sys.argv[3], spec, {}, CallContext())
driver.define(sys.argv[3], spec, generation=5)
driver.start(sys.argv[3])
"""


@pytest.mark.parametrize(("when", "power"), [("before", "stopped"), ("after", "running")])
def test_guests_outlive_a_killed_agent(tmp_path: Path, make: Make, when: str, power: str) -> None:
    instance_id = str(uuid.uuid4())
    command = [sys.executable, "-c", _KILLED, str(tmp_path), when, instance_id]
    assert subprocess.run(command, timeout=LONG_S * 3, check=False).returncode == -signal.SIGKILL
    world = make(persist=True)
    (info,) = world.driver.recover()
    assert (info.id, info.power, info.generation, info.owned) == (instance_id, power, 5, True)
    assert world.driver.capacity().disk_free_mib == world.driver.capacity().disk_total_mib - 10
    world.driver.destroy(instance_id)
    world.driver.undefine(instance_id)
    world.driver.delete_storage(instance_id)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- guests -----------------------------------------------------------------------------------------------------------


def test_guest_acts_while_the_agent_is_away(make: Make) -> None:
    world = make(persist=True, guest_shutdown_s=0.02)
    instance_id = world.create()
    world.driver.shutdown(instance_id)
    world.driver.close()
    world.events.clear()
    threading.Event().wait(0.03)  # the guest's own time, which nobody announces while no agent runs
    world.restart()
    assert world.power(instance_id) == "stopped"
    assert world.events == []


def test_guest_that_has_not_booted_ignores_the_button(make: Make) -> None:
    world = make(boot_s=LONG_S)
    instance_id = world.create()
    world.driver.shutdown(instance_id)
    world.driver.reboot(instance_id)
    assert world.driver.console_log(instance_id, 100).data.endswith(world.driver.get(instance_id).name.encode() + b"\n")
    assert world.power(instance_id) == "running"


def test_guest_that_ignores_acpi(make: Make) -> None:
    world = make(guest_shutdown_s=None)
    instance_id = world.create()
    world.driver.shutdown(instance_id)
    assert world.power(instance_id) == "running"


def test_paused_guest_does_not_act(make: Make) -> None:
    world = make(guest_shutdown_s=0.05)
    instance_id = world.create()
    world.driver.shutdown(instance_id)
    world.driver.pause(instance_id)
    threading.Event().wait(0.1)  # the guest's own time: nothing must happen
    assert world.power(instance_id) == "paused"
    world.driver.resume(instance_id)
    world.wait(PowerChanged(instance_id, "running", "resumed"), PowerChanged(instance_id, "stopped", "shutdown"))


def test_destroyed_guest_acts_no_more(make: Make) -> None:
    world = make(guest_shutdown_s=0.02)
    instance_id = world.create()
    world.driver.shutdown(instance_id)
    world.driver.destroy(instance_id)
    world.driver.start(instance_id)
    threading.Event().wait(0.05)  # the time at which the old guest would have stopped
    assert world.power(instance_id) == "running"


def test_hooks(make: Make) -> None:
    world = make()
    crashed, stopped, failed = (world.create() for _ in range(3))
    world.driver.simulate_crash(crashed)
    world.driver.simulate_guest_shutdown(stopped)
    world.driver.simulate_io_error(failed, "vdb", "eio")
    world.driver.emit(PowerChanged("x", "running", "migrated"))
    world.wait(
        PowerChanged(crashed, "crashed", "crashed"),
        PowerChanged(stopped, "stopped", "shutdown"),
        PowerChanged(failed, "paused", "io-error"),
        PowerChanged("x", "running", "migrated"),
    )
    (report,) = [event.event for event in world.events if isinstance(event, Reported)]
    assert report.model_dump(exclude_none=True) == {
        "instance_id": failed,
        "device": "vdb",
        "reason": "eio",
        "action": "pause",
    }
    world.driver.start(crashed)
    with pytest.raises(NotFound):
        world.driver.simulate_crash(str(uuid.uuid4()))
    world.driver.add_foreign("theirs")
    with pytest.raises(AlreadyExists):
        world.driver.add_foreign("theirs")


def test_events_are_lost_while_disconnected(make: Make) -> None:
    world = make()
    instance_id = world.create()
    world.wait(PowerChanged(instance_id, "running", "booted"))
    world.driver.disconnect()
    world.driver.disconnect()
    world.wait(ConnectionChanged(False, "the connection was cut by disconnect()"))
    world.driver.simulate_crash(instance_id)
    with pytest.raises(Unavailable):
        world.driver.get(instance_id)
    world.driver.reconnect()
    world.wait(ConnectionChanged(True, "reconnected"))
    assert world.power(instance_id) == "crashed"
    assert [type(event) for event in world.events].count(ConnectionChanged) == 2
    assert not [event for event in world.events if isinstance(event, PowerChanged) and event.power == "crashed"]


def test_console_log_of_two_boots(make: Make) -> None:
    world = make()
    instance_id = world.create(name="vm")
    world.driver.destroy(instance_id)
    world.driver.start(instance_id)
    once = b"booting vm\ncompute-agent guest is up\n"
    assert world.driver.console_log(instance_id, 1000).data == once * 2
    chunk = world.driver.console_log(instance_id, len(once) + 1)
    assert (chunk.data, chunk.truncated) == (b"\n" + once, True)


# --- the host ---------------------------------------------------------------------------------------------------------


def test_disk_space_is_used_and_runs_out(make: Make) -> None:
    world = make(disk_mib=25)
    first = world.create()
    assert world.driver.capacity().disk_free_mib == 15
    with pytest.raises(ResourceExhausted) as caught:
        world.create(root_disk={"size_mib": 16})
    assert caught.value.details == {"requested_mib": 16, "free_mib": 15}
    world.driver.delete_storage(first)
    assert world.driver.capacity().disk_free_mib == 25


def test_start_without_a_disk(make: Make) -> None:
    world = make()
    instance_id = world.create(start=False)
    world.driver.delete_storage(instance_id)
    with pytest.raises(FailedPrecondition) as caught:
        world.driver.start(instance_id)
    assert caught.value.code == "disk_missing"


def test_lacking_verbs(make: Make) -> None:
    world = make(lacks=["instance.pause", "console.log"])
    instance_id = world.create()
    assert world.driver.capabilities().verbs == OPTIONAL_VERBS - {"instance.pause", "console.log"}
    calls: list[Callable[[], object]] = [
        lambda: world.driver.pause(instance_id),
        lambda: world.driver.console_log(instance_id, 1),
    ]
    for call in calls:
        with pytest.raises(Unsupported):
            call()


def test_a_thousand_guests_need_one_thread(make: Make) -> None:
    before = threading.active_count()
    world = make(guest_shutdown_s=0.0)
    ids = [world.create() for _ in range(1000)]
    assert threading.active_count() == before + 1
    for instance_id in ids:
        world.driver.shutdown(instance_id)
    world.wait(PowerChanged(ids[-1], "stopped", "shutdown"))
    assert {info.power for info in world.driver.recover()} == {"stopped"}


@pytest.mark.parametrize("error", sorted(cls.default_code for cls in ComputeError.__subclasses__()))
def test_every_error_can_be_scripted(make: Make, error: str) -> None:
    world = make(faults=[{"call": "capacity", "error": error, "message": "as told"}])
    with pytest.raises(ComputeError, match="as told") as caught:
        world.driver.capacity()
    assert caught.value.code == error


def test_faults_that_are_cleared_release_a_call_that_is_just_about_to_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(DriverContext(host="h", state_dir=tmp_path, settings={}, emit=lambda _event: None))
    driver.connect()
    driver.inject(Fault(call="capacity", hang_s=5))
    strike = driver._plan.strike

    def struck_and_cleared(*args: Any) -> Any:
        struck = strike(*args)
        driver.clear_faults()
        return struck

    monkeypatch.setattr(driver._plan, "strike", struck_and_cleared)
    began = time.monotonic()
    driver.capacity()
    assert time.monotonic() - began < 4.0
    driver.close()
