"""Settings, states, events and host facts of the libvirt driver: its tables, without a hypervisor."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.drivers.base import DriverContext, PowerChanged, Reported
from agent.drivers.libvirt.settings import parse_settings
from agent.errors import InvalidArgument
from agent.messages.events import (
    InstanceAgentLifecycle,
    InstanceBalloon,
    InstanceBlockJob,
    InstanceDeviceRemoved,
    InstanceIoError,
    InstanceJobCompleted,
    InstanceMigrationIteration,
    InstanceRebooted,
    InstanceWatchdog,
)

libvirt = pytest.importorskip("libvirt", reason="the Python binding of libvirt is not installed")

from agent.drivers.libvirt import LibvirtDriver, capacity, events, states  # noqa: E402

ID = "11111111-2222-4333-8444-555555555555"


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"url": "x"}, "url"),
        ({"uri": "qemu+ssh://host/system"}, "uri"),
        ({"uri": "qemu+tcp://host/system"}, "uri"),
        ({"uri": "qemu://host/system"}, "uri"),
        ({"uri": "qemu:///embed?root=/x"}, "uri"),
        ({"uri": "xen:///system"}, "uri"),
        ({"uri": "qemu+unix:///system?command=/bin/sh"}, "uri"),
        ({"virt_type": "xen"}, "virt_type"),
        ({"machine": "pc,accel=kvm"}, "machine"),
        ({"instances_dir": "relative"}, "instances_dir"),
        ({"vnc_listen": "localhost"}, "vnc_listen"),
        ({"qemu_img_timeout_s": 0}, "qemu_img_timeout_s"),
        ({"cpu_mode": "custom"}, "cpu_mode"),
        ({"cpu_model": "qemu64"}, "cpu_mode"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, settings, key):
    context = DriverContext(host="h", state_dir=tmp_path, settings=settings, emit=lambda _event: None)
    with pytest.raises(InvalidArgument) as caught:
        LibvirtDriver(context)
    assert caught.value.details["key"] == key
    assert repr(key) in caught.value.message


@pytest.mark.parametrize(
    ("uri", "simulated", "in_process"),
    [
        ("qemu:///system", False, False),
        ("qemu:///session", False, False),
        ("qemu+unix:///system?socket=/run/x/libvirt-sock", False, False),
        ("test:///default", True, True),
        ("test+unix:///default?socket=/run/x/libvirt-sock", True, False),
    ],
)
def test_uris_of_this_host_are_taken(uri, simulated, in_process):
    settings = parse_settings({"uri": uri})
    assert (settings.simulated, settings.in_process) == (simulated, in_process)


def test_the_constructor_does_no_io(tmp_path):
    settings = {"uri": "qemu+unix:///system?socket=/nonexistent"}
    driver = LibvirtDriver(
        DriverContext(host="h", state_dir=tmp_path / "none", settings=settings, emit=lambda _event: None)
    )
    assert not driver.is_connected()
    assert list(tmp_path.iterdir()) == []


def test_without_the_binding_the_import_works_and_the_constructor_says_what_to_install():
    script = """
import sys
sys.modules["libvirt"] = None
import agent.drivers.libvirt as package
from agent.errors import ComputeError
try:
    package.LibvirtDriver(None)
except ImportError as exc:
    assert isinstance(exc, ComputeError) and exc.code == "libvirt_missing", exc
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "install compute-agent[libvirt]" in done.stdout


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "reason", "managed_save", "expected"),
    [
        ("RUNNING", "RUNNING_BOOTED", False, ("running", "booted")),
        ("BLOCKED", None, False, ("running", "unknown")),
        ("PAUSED", "PAUSED_USER", False, ("paused", "paused")),
        ("PAUSED", "PAUSED_IOERROR", False, ("paused", "io-error")),
        ("PAUSED", "PAUSED_WATCHDOG", False, ("paused", "watchdog")),
        ("SHUTDOWN", "SHUTDOWN_USER", False, ("running", "shutting-down")),
        ("SHUTOFF", "SHUTOFF_SHUTDOWN", False, ("stopped", "shutdown")),
        ("SHUTOFF", "SHUTOFF_DESTROYED", False, ("stopped", "destroyed")),
        ("SHUTOFF", "SHUTOFF_FAILED", False, ("stopped", "failed")),
        ("SHUTOFF", "SHUTOFF_CRASHED", False, ("crashed", "crashed")),
        ("SHUTOFF", "SHUTOFF_SAVED", False, ("stopped", "saved")),
        ("SHUTOFF", "SHUTOFF_SAVED", True, ("suspended", "saved")),
        ("SHUTOFF", None, True, ("suspended", "saved")),
        ("CRASHED", "CRASHED_PANICKED", False, ("crashed", "panicked")),
        ("PMSUSPENDED", None, False, ("suspended", "unknown")),
        ("NOSTATE", None, False, ("unknown", "unknown")),
    ],
)
def test_state(state, reason, managed_save, expected):
    number = getattr(libvirt, f"VIR_DOMAIN_{reason}") if reason else 0
    assert states.of_state(getattr(libvirt, f"VIR_DOMAIN_{state}"), number, managed_save=managed_save) == expected


def test_a_state_of_the_future_is_unknown():
    assert states.of_state(99, 99, managed_save=False) == ("unknown", "unknown")


def test_every_state_and_reason_of_the_binding_has_a_word():
    # Not SHUTDOWN_, which is also the prefix of flags.
    prefixes = ("RUNNING_", "PAUSED_", "SHUTOFF_", "CRASHED_")
    for name in dir(libvirt):
        short = name.removeprefix("VIR_DOMAIN_")
        if short == name or not short.startswith(prefixes) or short.endswith(("_UNKNOWN", "_LAST")):
            continue
        state = short.partition("_")[0]
        power = states.of_state(
            getattr(libvirt, f"VIR_DOMAIN_{state}"), getattr(libvirt, name), managed_save=False
        )
        assert power.reason != "unknown", name


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "detail", "expected"),
    [
        ("STARTED", "STARTED_BOOTED", ("running", "booted")),
        ("STARTED", "STARTED_RESTORED", ("running", "restored")),
        ("SUSPENDED", "SUSPENDED_PAUSED", ("paused", "paused")),
        ("SUSPENDED", "SUSPENDED_IOERROR", ("paused", "io-error")),
        ("SUSPENDED", "SUSPENDED_WATCHDOG", ("paused", "watchdog")),
        ("RESUMED", "RESUMED_UNPAUSED", ("running", "resumed")),
        ("STOPPED", "STOPPED_SHUTDOWN", ("stopped", "shutdown")),
        ("STOPPED", "STOPPED_DESTROYED", ("stopped", "destroyed")),
        ("STOPPED", "STOPPED_CRASHED", ("crashed", "crashed")),
        ("STOPPED", "STOPPED_FAILED", ("crashed", "failed")),
        ("STOPPED", "STOPPED_SAVED", ("suspended", "saved")),
        ("STOPPED", "STOPPED_MIGRATED", ("stopped", "migrated")),
        ("PMSUSPENDED", "PMSUSPENDED_MEMORY", ("suspended", "suspended-to-memory")),
        ("CRASHED", "CRASHED_PANICKED", ("crashed", "panicked")),
        ("DEFINED", "DEFINED_ADDED", ("unknown", "defined")),
        ("UNDEFINED", "UNDEFINED_REMOVED", ("unknown", "undefined")),
        ("SHUTDOWN", "SHUTDOWN_FINISHED", None),
    ],
)
def test_lifecycle_event(event, detail, expected):
    numbers = (getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), getattr(libvirt, f"VIR_DOMAIN_EVENT_{detail}"))
    assert states.of_event(*numbers) == expected


def test_lifecycle_events_of_the_future_are_harmless():
    assert states.of_event(99, 0) is None
    assert states.of_event(libvirt.VIR_DOMAIN_EVENT_STOPPED, 99) == ("stopped", "unknown")


class FakeDomain:
    def UUIDString(self) -> str:
        return ID


class FakeConnection:
    """Keeps callbacks, and fires them as libvirt does."""

    def __init__(self, lacking: frozenset[int] = frozenset()) -> None:
        self.lacking = lacking
        self.callbacks: dict[int, object] = {}

    def domainEventRegisterAny(self, _domain, number, callback, _opaque):
        if number in self.lacking:
            raise libvirt.libvirtError("unsupported")
        self.callbacks[number] = callback
        return number

    def domainEventDeregisterAny(self, number):
        raise libvirt.libvirtError("the connection is dead")

    def fire(self, name: str, *arguments):
        self.callbacks[getattr(libvirt, f"VIR_DOMAIN_EVENT_ID_{name}")](self, FakeDomain(), *arguments, None)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("LIFECYCLE", (libvirt.VIR_DOMAIN_EVENT_STARTED, 0), PowerChanged(ID, "running", "booted")),
        ("REBOOT", (), Reported(InstanceRebooted(instance_id=ID))),
        (
            "IO_ERROR_REASON",
            ("/srv/d.qcow2", "virtio-disk0", libvirt.VIR_DOMAIN_EVENT_IO_ERROR_PAUSE, "enospc"),
            Reported(
                InstanceIoError(
                    instance_id=ID, device="virtio-disk0", path="/srv/d.qcow2", reason="enospc", action="pause"
                )
            ),
        ),
        (
            "IO_ERROR_REASON",
            ("", "", 77, ""),
            Reported(InstanceIoError(instance_id=ID, device="unknown", reason="unknown", action="none")),
        ),
        (
            "WATCHDOG",
            (libvirt.VIR_DOMAIN_EVENT_WATCHDOG_RESET,),
            Reported(InstanceWatchdog(instance_id=ID, action="reset")),
        ),
        (
            "BLOCK_JOB_2",
            ("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT, libvirt.VIR_DOMAIN_BLOCK_JOB_READY),
            Reported(InstanceBlockJob(instance_id=ID, device="vda", job="active-commit", status="ready")),
        ),
        ("DEVICE_REMOVED", ("net0",), Reported(InstanceDeviceRemoved(instance_id=ID, alias="net0"))),
        (
            "DEVICE_REMOVAL_FAILED",
            ("net0",),
            Reported(InstanceDeviceRemoved(instance_id=ID, alias="net0", removed=False)),
        ),
        (
            "AGENT_LIFECYCLE",
            (1, 2),
            Reported(InstanceAgentLifecycle(instance_id=ID, state="connected", reason="channel")),
        ),
        (
            "JOB_COMPLETED",
            ({"operation": libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE, "success": False, "data_total": 5, "x": "y"},),
            Reported(
                InstanceJobCompleted(instance_id=ID, operation="save", succeeded=False, figures={"data_total": 5})
            ),
        ),
        (
            "MIGRATION_ITERATION",
            (3,),
            Reported(InstanceMigrationIteration(instance_id=ID, iteration=3)),
        ),
        ("BALLOON_CHANGE", (65536,), Reported(InstanceBalloon(instance_id=ID, actual_mib=64))),
    ],
)
def test_event(name, arguments, expected):
    seen = []
    connection = FakeConnection()
    events.Subscription(connection, seen.append)
    connection.fire(name, *arguments)
    assert seen == [expected]


def test_a_burst_of_resets_is_one_reboot():
    seen = []
    connection = FakeConnection()
    events.Subscription(connection, seen.append)
    for _ in range(5):
        connection.fire("REBOOT")
    assert seen == [Reported(InstanceRebooted(instance_id=ID))]


def test_a_callback_never_raises():
    def broken(_event):
        raise RuntimeError("the loop is closed")

    connection = FakeConnection()
    events.Subscription(connection, broken)
    connection.fire("REBOOT")
    connection.fire("BALLOON_CHANGE", "no number")


def test_after_its_end_a_subscription_is_silent_even_on_a_dead_connection():
    seen = []
    connection = FakeConnection()
    subscription = events.Subscription(connection, seen.append)
    subscription.end()
    connection.fire("REBOOT")
    assert seen == []


def test_a_missing_extra_event_is_not_announced():
    lacking = frozenset({libvirt.VIR_DOMAIN_EVENT_ID_WATCHDOG})
    kinds = events.Subscription(FakeConnection(lacking), print).kinds
    assert "instance.watchdog" not in kinds
    assert "instance.io-error" in kinds


def test_without_lifecycle_events_there_is_no_driver():
    with pytest.raises(libvirt.libvirtError):
        events.Subscription(FakeConnection(frozenset({libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE})), print)


# --- host -------------------------------------------------------------------------------------------------------------

CAPABILITIES = """<capabilities><host><cpu><arch>x86_64</arch><model>EPYC</model></cpu>
<topology><cells num='2'><cell id='0'><memory unit='KiB'>2097152</memory>
<cpus num='2'><cpu id='1'/><cpu id='0'/></cpus></cell><cell id='1'><cpus num='0'/></cell></cells></topology></host>
<guest><arch name='i686'><domain type='kvm'/></arch></guest>
<guest><arch name='x86_64'><domain type='qemu'/>{kvm}</arch></guest></capabilities>"""
WITH_KVM = CAPABILITIES.format(kvm="<domain type='kvm'/>")


def test_capabilities_are_read():
    description = capacity.parse_capabilities(WITH_KVM)
    assert (description.architecture, description.cpu_model, description.kvm_offered) == ("x86_64", "EPYC", True)
    assert [(cell.id, cell.cpus, cell.memory_mib) for cell in description.numa_cells] == [
        (0, [0, 1], 2048),
        (1, [], 0),
    ]
    assert not capacity.parse_capabilities(CAPABILITIES.format(kvm="")).kvm_offered


@pytest.mark.parametrize(
    ("document", "flags", "failure", "works"),
    [
        (WITH_KVM, "fpu vmx", None, True),
        (WITH_KVM, "fpu svm", None, True),
        (WITH_KVM, "fpu", None, False),
        (WITH_KVM, "fpu vmx", errno.ENOENT, False),
        (WITH_KVM, "fpu vmx", errno.ENXIO, False),
        (WITH_KVM, "fpu vmx", errno.EACCES, True),
        (CAPABILITIES.format(kvm=""), "fpu vmx", None, False),
    ],
)
def test_kvm_must_be_proven(tmp_path, monkeypatch, document, flags, failure, works):
    device, cpuinfo = tmp_path / "kvm", tmp_path / "cpuinfo"
    device.touch()
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    if failure:
        real_open = os.open

        def refuse(path, *rest, **more):
            if Path(path) == device:
                raise OSError(failure, os.strerror(failure))
            return real_open(path, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    description = capacity.parse_capabilities(document)
    assert capacity.kvm_works(description, device=device, cpuinfo=cpuinfo) is works


def test_traits_have_the_names_of_os_traits():
    found = capacity.traits("x86_64", frozenset({"sse4_2", "aes", "avx2", "unheard_of"}))
    assert {"HW_CPU_X86_SSE42", "HW_CPU_X86_AESNI", "HW_CPU_X86_AVX2", "HW_ARCH_X86_64"} <= found
    assert not any("UNHEARD" in trait for trait in found)
