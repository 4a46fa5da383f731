from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libvirt_specs import INSTANCE_ID, SPECS
from lxml import etree

from agent.drivers.libvirt import xml, xml_devices
from agent.drivers.libvirt.definition import HostFacts, InstanceFiles, Tuning
from agent.drivers.libvirt.encryption import sealed
from agent.drivers.libvirt.volumes import Location
from agent.errors import InvalidArgument
from agent.messages.spec import InstanceSpec, RootDisk, Seed, UserNic
from agent.messages.spec_disks import CdromDisk

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
ODD = Path("/srv/it's <odd> & \"strange\"")


def files(spec: InstanceSpec, tuning: Tuning | None = None) -> InstanceFiles:
    """Where the spec's disks would be: every other one on a block device."""
    places, access = {}, {}
    for number, (name, disk) in enumerate(spec.disks_by_name().items()):
        encrypted = getattr(disk, "encryption", None)
        seal = sealed(INSTANCE_ID, name, encrypted.key) if encrypted else None
        if number % 2 and not isinstance(disk, CdromDisk):
            places[name] = Location("block", Path("/dev/vg") / name, "raw", seal)
        else:
            places[name] = Location("file", ODD / f"{name}.qcow2", "qcow2", seal)
        if tuning is not None:
            access[name] = tuning
    return InstanceFiles(
        disks=places,
        seed=Path("/srv/i/seed.iso"),
        console_log=Path("/srv/i/console.log"),
        tuning=access,
        kernel=ODD / "kernel" if spec.boot.kernel else None,
        initrd=ODD / "initrd" if spec.boot.kernel and spec.boot.kernel.initrd else None,
    )


TUNINGS = st.builds(
    Tuning,
    cache=st.sampled_from(["none", "writeback", "writethrough", "directsync", "unsafe"]),
    io=st.sampled_from([None, "threads", "native", "io_uring"]),
    discard=st.booleans(),
    detect_zeroes=st.booleans(),
)
FACTS = st.builds(
    HostFacts,
    domain_type=st.sampled_from(["kvm", "qemu"]),
    architecture=st.sampled_from(["x86_64", "aarch64"]),
    machine=st.sampled_from([None, "q35", "pc", "pc-q35-7.2", "pc-i440fx-7.2", "virt"]),
    cpu_mode=st.sampled_from(["auto", "host-passthrough", "host-model", "maximum", "default"]),
    cpu_model=st.none(),
    emulator=st.sampled_from([None, Path("/usr/bin/qemu-system-x86_64")]),
    vnc_listen=st.sampled_from(["127.0.0.1", "::1"]),
)
PLAIN = HostFacts(
    domain_type="qemu",
    architecture="x86_64",
    machine="q35",
    cpu_mode="auto",
    cpu_model=None,
    emulator=None,
    vnc_listen="127.0.0.1",
)
SMALL = InstanceSpec(name="vm", vcpus=1, memory_mib=64, root_disk=RootDisk(size_mib=1))


def build(spec: InstanceSpec, facts: HostFacts = PLAIN, tuning: Tuning | None = None) -> etree._Element:
    text = xml.build(INSTANCE_ID, spec, generation=7, host="h1", facts=facts, files=files(spec, tuning))
    return etree.fromstring(text)


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    if not SCHEMA.exists():
        pytest.skip(f"libvirt's schemas are not installed ({SCHEMA})")
    return etree.RelaxNG(etree.parse(SCHEMA))


@settings(max_examples=150, deadline=None)
@given(spec=SPECS, facts=FACTS, tuning=TUNINGS)
def test_every_definition_is_valid_by_libvirts_own_schema(schema, spec, facts, tuning):
    document = build(spec, facts, tuning)
    assert schema.validate(document), schema.error_log
    assert document.find("devices/disk/source").get("file") == str(files(spec).disks["root"].path)
    devices = [target.get("dev") for target in document.iterfind("devices/disk/target")]
    assert len(set(devices)) == len(devices) == 1 + len(spec.disks) + (spec.seed is not None)
    orders = sorted(int(boot.get("order")) for boot in document.iterfind("devices/disk/boot"))
    assert orders == list(range(1, len(orders) + 1))
    assert "passphrase" in etree.tostring(document).decode() or not any(
        getattr(disk, "encryption", None) for disk in spec.disks_by_name().values()
    )


@settings(max_examples=30, deadline=None)
@given(spec=SPECS)
def test_a_simulated_domain_is_valid_too(schema, spec):
    facts = HostFacts("test", "i686", None, "auto", None, None, "127.0.0.1")
    document = build(spec, facts)
    assert schema.validate(document), schema.error_log
    assert document.find("devices/serial") is None


def test_custom_cpu_model_is_valid(schema):
    facts = HostFacts("qemu", "x86_64", "q35", "custom", "qemu64", None, "127.0.0.1")
    document = build(SMALL, facts)
    assert schema.validate(document), schema.error_log
    assert document.findtext("cpu/model") == "qemu64"


def test_the_schema_can_fail(schema):
    document = build(SMALL)
    etree.SubElement(document.find("devices"), "nonsense")
    assert not schema.validate(document)


@given(spec=SPECS)
def test_macs_are_stable_distinct_and_unicast(spec):
    first = xml_devices.mac_addresses(INSTANCE_ID, spec.nics)
    assert first == xml_devices.mac_addresses(INSTANCE_ID, spec.nics)
    assert len(set(first)) == len(spec.nics)
    for nic, mac in zip(spec.nics, first, strict=True):
        assert mac == nic.mac if nic.mac else mac.startswith("52:54:00:")


def test_another_instance_gets_other_macs():
    nics = [UserNic(type="user")]
    other = INSTANCE_ID.replace("1", "9")
    assert xml_devices.mac_addresses(INSTANCE_ID, nics) != xml_devices.mac_addresses(other, nics)


@pytest.mark.parametrize(
    ("machine", "bus", "seed_target"),
    [("q35", "virtio", ("sda", "sata")), ("q35", "sata", ("sdb", "sata")), ("pc", "virtio", ("hdc", "ide"))],
)
def test_the_seed_drive_is_on_a_bus_the_machine_has(machine, bus, seed_target):
    spec = SMALL.model_copy(update={"root_disk": RootDisk(size_mib=1, bus=bus), "seed": Seed()})
    facts = HostFacts("qemu", "x86_64", machine, "auto", None, None, "127.0.0.1")
    target = build(spec, facts).find("devices/disk[@device='cdrom']/target")
    assert (target.get("dev"), target.get("bus")) == seed_target


def test_power_actions_are_fixed():
    document = build(SMALL)
    actions = [document.findtext(f"on_{event}") for event in ("poweroff", "reboot", "crash")]
    assert actions == ["destroy", "restart", "destroy"]


@pytest.mark.parametrize(("domain_type", "mode"), [("kvm", "host-passthrough"), ("qemu", "maximum")])
def test_auto_cpu_follows_the_accelerator(domain_type, mode):
    facts = HostFacts(domain_type, "x86_64", "q35", "auto", None, None, "127.0.0.1")
    assert build(SMALL, facts).find("cpu").get("mode") == mode


def test_a_definition_that_libvirt_could_not_take_is_refused():
    meta = {f"key-{number}": "x" * 65_000 for number in range(60)}
    spec = SMALL.model_copy(update={"seed": Seed(meta_data=meta)})
    with pytest.raises(InvalidArgument) as caught:
        build(spec)
    assert caught.value.code == "spec_too_large"
