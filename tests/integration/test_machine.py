"""The virtual machine that a spec describes, on a real libvirtd: accepted, seen by the guest, kept when defined again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from support.spec_matrix import DISKS, matrix

from agent.drivers.base import CallContext, DriverContext, PreparedImage
from agent.drivers.libvirt import LibvirtDriver, xml, xml_keep
from agent.drivers.libvirt.capacity import parse_capabilities
from agent.drivers.libvirt.definition import HostFacts, InstanceFiles
from agent.drivers.libvirt.volumes import Location
from agent.drivers.verbs.host import Holding
from agent.errors import ComputeError, FailedPrecondition, ResourceExhausted
from agent.messages.life import ORDINARY
from agent.messages.spec import InstanceSpec
from devstack.firmware import firmware
from devstack.guest_image import guest_image
from devstack.libvirtd import PrivateLibvirtd

libvirt = pytest.importorskip("libvirt", reason="the Python binding of libvirt is not installed")
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private system libvirtd needs root"),
    pytest.mark.skipif(shutil.which("libvirtd") is None, reason="libvirtd is not installed"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

BOOT_S = 240.0
MIB = 2**20
UEFI = {"firmware": {"type": "uefi"}}
SECURE = {"firmware": {"type": "uefi", "secure_boot": True}}


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest) -> Iterator[PrivateLibvirtd]:
    folder = Path(tempfile.mkdtemp(prefix="lv-"))  # a Unix socket's path must be short
    private = PrivateLibvirtd(folder, capabilities_cache=Path(request.config.cache.mkdir("libvirt-capabilities")))
    try:
        private.start()
        yield private
    finally:
        private.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def uefi_folder(request: pytest.FixtureRequest) -> Path:
    return firmware(Path(request.config.cache.mkdir("firmware")))


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> PreparedImage:
    built = guest_image(Path(request.config.cache.mkdir("guest-image")))
    return PreparedImage(built.path, "qcow2", built.virtual_size_bytes, built.sha256)


class Bench:
    """Drivers on one private daemon, and the instances that a test makes."""

    def __init__(self, daemon: PrivateLibvirtd, folder: Path, uefi_folder: Path) -> None:
        self.daemon = daemon
        self.folder = folder
        self.share = folder / "share"
        self.share.mkdir()
        self._uefi_folder = uefi_folder
        self._drivers: list[LibvirtDriver] = []
        self.made: list[str] = []
        self.driver = self.another()

    def another(self, **settings: Any) -> LibvirtDriver:
        """Another driver on the same daemon and folder, as after a restart of the agent with other settings."""
        merged = {
            "uri": self.daemon.uri,
            "virt_type": "qemu",
            "min_free_mib": 0,
            "firmware_dirs": [self._uefi_folder],
            "shares": {"exported": self.share},
            **settings,
        }
        made = LibvirtDriver(DriverContext(host="h1", state_dir=self.folder, settings=merged, emit=lambda _event: None))
        made.connect()
        self._drivers.append(made)
        return made

    def make(self, image: PreparedImage | None = None, **fields: Any) -> tuple[str, InstanceSpec]:
        """Check, store and define, as create does."""
        instance_id = str(uuid.uuid4())
        made = spec(f"vm-{instance_id[:8]}", **fields)
        self.driver.check(made)
        self.made.append(instance_id)
        self.driver.create_storage(instance_id, made, {} if image is None else {"root": image}, CallContext())
        self.driver.define(instance_id, made, generation=1)
        return instance_id, made

    def xml(self, instance_id: str) -> ET.Element:
        connection = libvirt.open(self.daemon.uri)
        try:
            return ET.fromstring(connection.lookupByUUIDString(instance_id).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        finally:
            connection.close()

    def boot(self, instance_id: str, last: str = "guest: tick 1") -> str:
        """Start, and return the console when the guest has said all."""
        self.driver.start(instance_id)
        deadline = time.monotonic() + BOOT_S
        while True:
            console = self.driver.console_log(instance_id, MIB).data.decode(errors="replace")
            if last in console:
                return console
            assert time.monotonic() < deadline, f"{last!r} is not on the console:\n{console}"
            time.sleep(0.1)

    def close(self) -> None:
        for instance_id in self.made:
            with_domain = {info.id for info in self.driver.recover()}
            if instance_id in with_domain:
                self.driver.destroy(instance_id)
                self.driver.undefine(instance_id)
            self.driver.delete_storage(instance_id)
        for driver in self._drivers:
            driver.close()


@pytest.fixture
def bench(daemon: PrivateLibvirtd, tmp_path: Path, uefi_folder: Path) -> Iterator[Bench]:
    made = Bench(daemon, tmp_path, uefi_folder)
    yield made
    made.close()


def spec(name: str, **fields: Any) -> InstanceSpec:
    values: dict[str, Any] = {"name": name, "vcpus": 1, "memory_mib": 128, "root_disk": {"size_mib": 64}}
    return InstanceSpec.model_validate(values | fields)


# --- what libvirt takes ----------------------------------------------------------------------------------------------


def plain(domain: ET.Element | None) -> str:
    """A definition as text. libvirt lists controllers in another order each time; where they are is in their addresses."""
    assert domain is not None
    devices = domain if domain.tag == "devices" else domain.find("devices")
    if devices is not None:
        devices[:] = sorted(devices, key=lambda device: ET.canonicalize(ET.tostring(device), strip_text=True))
    return ET.canonicalize(ET.tostring(domain), strip_text=True)


def test_a_real_libvirtd_takes_every_definition_of_the_matrix(daemon: PrivateLibvirtd, uefi_folder: Path) -> None:
    connection = libvirt.open(daemon.uri)
    facts = HostFacts(
        "qemu", "x86_64", "q35", "auto", None, None, "127.0.0.1",
        machines=parse_capabilities(connection.getCapabilities()).machines, firmware_folders=(uefi_folder,),
        shared_cpus=frozenset({0}), shares={"data": Path("/srv/data")},
    )  # fmt: skip
    files = InstanceFiles(
        disks={name: Location("file", Path(f"/srv/{name}.qcow2"), "qcow2") for name in DISKS},
        seed=Path("/srv/seed.iso"),
        console_log=Path("/srv/console.log"),
    )

    def defined(instance_id: str, made: InstanceSpec, present: ET.Element | None) -> ET.Element:
        cpus = {vcpu: vcpu + 1 for vcpu in range(8)} if made.cpu.placement == "dedicated" else {}
        text = xml.build(
            instance_id, made, generation=1, host="h", facts=facts, files=files, cpus=cpus, present=present
        )
        try:
            domain = connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        except libvirt.libvirtError as exc:
            pytest.fail(f"{exc}: {made}")
        return ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

    try:
        for made in matrix():
            instance_id = str(uuid.uuid4())
            first = defined(instance_id, made, None)
            try:
                assert plain(defined(instance_id, made, first)) == plain(first)
            finally:
                connection.lookupByUUIDString(instance_id).undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    finally:
        connection.close()


# --- what stays ------------------------------------------------------------------------------------------------------


def addresses(domain: ET.Element) -> dict[str, dict[str, str]]:
    """Device → its address, under a name that a person would give it."""
    found: dict[str, dict[str, str]] = {}
    for device in domain.findall("devices/*"):
        address = device.find("address")
        if address is None:
            continue
        marks = [device.get("type"), device.get("index"), device.get("model"), device.get("device")]
        for path, name in (("mac", "address"), ("target", "dir"), ("target", "name"), ("model", "type")):
            mark = device.find(path)
            marks.append(None if mark is None else mark.get(name))
        source = device.find("source")
        if device.tag == "disk" and source is not None:
            marks.append(Path(source.get("file", "")).name)
        found[" ".join([device.tag, *(mark for mark in marks if mark)])] = dict(address.attrib)
    return found


NICS = [{"type": "user", "mac": f"52:54:00:00:00:0{number}"} for number in range(4)]


def test_the_hardware_stays_when_devices_come_and_go(bench: Bench) -> None:
    instance_id, made = bench.make(nics=NICS[:3], watchdog={}, vnc=True, seed={})
    first = addresses(bench.xml(instance_id))
    assert len([name for name in first if name.startswith("interface")]) == 3
    # The first NIC and the watchdog go, a NIC and a share come.
    fields: dict[str, Any] = {
        "nics": [NICS[3], *NICS[1:3]], "watchdog": None, "rng": False,
        "shares": [{"source": "exported", "tag": "data"}],
    }  # fmt: skip
    changed = InstanceSpec.model_validate(made.model_dump() | fields)
    bench.driver.define(instance_id, changed, generation=2)
    second = addresses(bench.xml(instance_id))
    gone = {name for name in first if name not in second}
    assert {name.split()[0] for name in gone} == {"interface", "watchdog", "rng"}
    assert {name: second[name] for name in first if name in second} == {
        name: address for name, address in first.items() if name in second
    }
    assert any("filesystem" in name for name in second)
    assert len({tuple(sorted(address.items())) for address in second.values()}) == len(second)
    # And back: what was there all the time has still not moved.
    bench.driver.define(instance_id, made, generation=3)
    third = addresses(bench.xml(instance_id))
    stayed = set(first) & set(second)
    assert {name: third[name] for name in stayed} == {name: first[name] for name in stayed}
    bench.driver.start(instance_id)
    assert bench.driver.get(instance_id).power == "running"


@pytest.mark.parametrize(("bus", "machine", "count"), [("sata", "q35", 14), ("scsi", "q35", 32), ("ide", "pc", 4)])
def test_disks_have_the_places_that_we_expect_libvirt_to_choose(
    daemon: PrivateLibvirtd, bus: str, machine: str, count: int
) -> None:
    prefix = "hd" if bus == "ide" else "sd"
    names = [
        prefix + letters for letters in ([*ascii_lowercase] + [f"a{letter}" for letter in ascii_lowercase])[:count]
    ]
    disks = "".join(f"<disk device='disk'><target dev='{name}' bus='{bus}'/></disk>" for name in names)
    disks = disks.replace("<target", "<source file='/srv/x'/><target").replace("<disk ", "<disk type='file' ")
    if bus == "scsi":
        disks += "".join(f"<controller type='scsi' index='{index}' model='virtio-scsi'/>" for index in range(3))
    connection = libvirt.open(daemon.uri)
    try:
        domain = connection.defineXML(
            f"<domain type='qemu'><name>places</name><memory>65536</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='{machine}'>hvm</type></os><devices>{disks}</devices></domain>"
        )
        found = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).findall("devices/disk")
        domain.undefine()
    finally:
        connection.close()
    assert {
        disk.find("target").get("dev"): xml_keep._place(disk.find("address"))  # type: ignore[union-attr,arg-type]
        for disk in found
    } == {name: xml_keep._natural(bus, name) for name in names}


def test_other_defaults_change_no_machine_that_is_there(bench: Bench) -> None:
    instance_id, made = bench.make(vnc=True, nics=NICS[:1], machine=UEFI)
    before = bench.xml(instance_id)
    assert before.find("os/type").get("machine").startswith("pc-q35-")  # type: ignore[union-attr]
    other = bench.another(machine="pc", cpu_mode="custom", cpu_model="Nehalem", firmware_dirs=["/nonexistent"])
    relabelled = made.model_copy(update={"labels": {"colour": "green"}})
    other.define(instance_id, relabelled, generation=2)
    after = bench.xml(instance_id)
    for path in ("os", "cpu", "features", "clock", "devices"):
        assert plain(after.find(path)) == plain(before.find(path))
    assert bench.driver.get(instance_id).spec == relabelled
    # A new instance gets the new defaults.
    new_id = str(uuid.uuid4())
    bench.made.append(new_id)
    newer = spec("new-one")
    other.create_storage(new_id, newer, {}, CallContext())
    other.define(new_id, newer, generation=1)
    assert bench.xml(new_id).find("os/type").get("machine").startswith("pc-i440fx-")  # type: ignore[union-attr]
    assert bench.xml(new_id).findtext("cpu/model") == "Nehalem"


def test_another_machine_in_the_spec_is_another_machine(bench: Bench) -> None:
    instance_id, made = bench.make(nics=NICS[:1], cpu={"mode": "custom", "model": "Nehalem"})
    fields = {"machine": {"type": "pc"}, "cpu": {"mode": "custom", "model": "Westmere"}}
    changed = InstanceSpec.model_validate(made.model_dump() | fields)
    bench.driver.define(instance_id, changed, generation=2)
    after = bench.xml(instance_id)
    assert after.find("os/type").get("machine").startswith("pc-i440fx-")  # type: ignore[union-attr]
    assert after.findtext("cpu/model") == "Westmere"


# --- dedicated CPUs --------------------------------------------------------------------------------------------------


def own(cpus: int) -> dict[str, Any]:
    return {"vcpus": cpus, "cpu": {"placement": "dedicated"}}


def test_cpus_are_pinned_and_known_again_after_a_restart(bench: Bench) -> None:
    cpu = max(os.sched_getaffinity(0))
    settings = {"cpu_dedicated_set": str(cpu)}
    bench.driver = bench.another(**settings)
    instance_id, made = bench.make(**own(1))
    shared_id, _spec = bench.make()
    assert bench.driver.details(instance_id).dedicated_cpus == (cpu,)
    bench.driver.start(instance_id)
    bench.driver.start(shared_id)
    threads = _vcpu_affinity(bench.daemon.qemu_pids()[made.name])
    assert threads == {frozenset({cpu})}
    assert cpu not in next(iter(_vcpu_affinity(bench.daemon.qemu_pids()[f"vm-{shared_id[:8]}"])))

    again = bench.another(**settings)
    capacity = again.capacity()
    assert (capacity.dedicated_cpus, capacity.shared_cpus) == (1, capacity.cpus - 1)
    assert [cell.free_dedicated_cpus for cell in capacity.numa_cells if cell.dedicated_cpus] == [[]]
    assert {info.id: info.dedicated_cpus for info in again.recover()}[instance_id] == (cpu,)
    other = spec("too-many", **own(1))
    other_id = str(uuid.uuid4())
    with pytest.raises(ResourceExhausted) as refused:
        again.define(other_id, other, generation=1)
    assert (refused.value.code, refused.value.details) == ("does_not_fit", {"PCPU": 1})
    again.define(instance_id, made, generation=2)
    assert again.details(instance_id).dedicated_cpus == (cpu,)
    again.destroy(instance_id)
    again.undefine(instance_id)
    again.define(other_id, other, generation=1)
    bench.made.append(other_id)
    assert again.details(other_id).dedicated_cpus == (cpu,)


def _vcpu_affinity(pid: int) -> set[frozenset[int]]:
    """CPUs that QEMU's vCPU threads may run on. Under TCG several vCPUs may share a thread."""
    tasks = Path(f"/proc/{pid}/task")
    names = {int(task.name): (task / "comm").read_text() for task in tasks.iterdir()}
    found = {frozenset(os.sched_getaffinity(task)) for task, name in names.items() if name.startswith("CPU ")}
    assert found, names
    return found


def test_a_definition_that_fails_gives_its_cpus_back(bench: Bench) -> None:
    bench.driver = bench.another(cpu_dedicated_set="0")
    with pytest.raises(ComputeError):
        bench.driver.define(str(uuid.uuid4()), spec("x", machine={"type": "no-such-machine"}, **own(1)), generation=1)
    instance_id, _made = bench.make(**own(1))
    assert bench.driver.details(instance_id).dedicated_cpus == (0,)


def test_definitions_at_once_never_share_a_cpu(bench: Bench) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the host has one CPU")
    bench.driver = bench.another(cpu_dedicated_set="0-1")
    ids, refused = [str(uuid.uuid4()) for _ in range(6)], []
    barrier = threading.Barrier(len(ids))

    def work(instance_id: str) -> None:
        barrier.wait(10)
        try:
            bench.driver.define(instance_id, spec(f"vm-{instance_id[:8]}", **own(1)), generation=1)
            bench.made.append(instance_id)
        except ResourceExhausted:
            refused.append(instance_id)

    threads = [threading.Thread(target=work, args=(instance_id,)) for instance_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    given = sorted(info.dedicated_cpus for info in bench.driver.recover() if info.id in ids)
    assert given == [(0,), (1,)]
    assert len(refused) == 4


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"machine": {"type": "pc-q35-99.0"}}, "machine_unknown"),
        ({"machine": SECURE | {"type": "pc"}}, "firmware_missing"),
        ({"cpu": {"mode": "custom", "model": "NoSuchModel"}}, "cpu_unsupported"),
        ({"cpu": {"mode": "custom", "model": "EPYC"}}, "cpu_unsupported"),
        ({"cpu": {"mode": "custom", "model": "Nehalem", "features": {"avx512f": "require"}}}, "cpu_unsupported"),
        ({"cpu": {"mode": "custom", "model": "Nehalem", "features": {"no-such": "require"}}}, "cpu_unsupported"),
        ({"cpu": {"mode": "host-passthrough"}}, "cpu_unsupported"),  # the guests here are emulated
        (own(1), "no_dedicated_cpus"),
        ({"memory_backing": {"hugepages_kib": 64}}, "hugepages_missing"),
        ({"shares": [{"source": "nothing", "tag": "x"}]}, "share_unknown"),
        ({"vcpus": 1000}, "option_unsupported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_this_host_cannot_do_is_refused_before_anything_is_made(
    bench: Bench, fields: dict[str, Any], code: str
) -> None:
    with pytest.raises(ComputeError) as refused:
        bench.make(**fields)
    assert refused.value.code == code
    assert bench.made == []


def test_a_feature_that_is_missing_at_the_start_is_no_silent_loss(bench: Bench) -> None:
    wanted = {"mode": "maximum", "features": {"avx512f": "require"}}
    instance_id, _made = bench.make(cpu=wanted)
    with pytest.raises(FailedPrecondition) as refused:
        bench.driver.start(instance_id)
    assert refused.value.code == "cpu_unsupported"
    assert "avx512f" in refused.value.message


def test_a_host_without_firmware_refuses_uefi(bench: Bench, tmp_path: Path) -> None:
    bench.driver = bench.another(firmware_dirs=[tmp_path])
    bench.make()
    with pytest.raises(FailedPrecondition) as refused:
        bench.make(machine=UEFI)
    assert refused.value.code == "firmware_missing"


# --- what the guest sees ---------------------------------------------------------------------------------------------


def test_the_guest_sees_its_cpus_cells_watchdog_and_share(bench: Bench, image: PreparedImage) -> None:
    (bench.share / "hello").write_text("bytes of the host\n")
    instance_id, _made = bench.make(
        image,
        vcpus=4,
        memory_mib=256,
        cpu={
            "mode": "custom",
            "model": "Nehalem",
            "features": {"sse4.2": "disable", "avx": "require"},
            "topology": {"sockets": 2, "cores": 2},
        },
        numa=[{"vcpus": [0, 3], "memory_mib": 96}, {"vcpus": [1, 2], "memory_mib": 160}],
        watchdog={"action": "poweroff"},
        shares=[{"source": "exported", "tag": "data"}],
        video={"model": "bochs"},
        seed={},
    )
    console = bench.boot(instance_id)
    facts = dict(line.strip().partition("=")[::2] for line in console.splitlines() if line.startswith("guest: "))
    assert "Nehalem" in facts["guest: cpu-model"]
    flags = facts["guest: cpu-flags"].split()
    assert "sse4_1" in flags
    assert "sse4_2" not in flags
    assert "avx" in flags
    for number, (package, core) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert f"guest: cpu{number} package={package} die=0 core={core}" in console
    assert "guest: node0 cpus=0,3 memory_kib=" in console
    assert "guest: node1 cpus=1-2 memory_kib=" in console
    assert facts["guest: watchdog"].startswith("i6300ESB")
    assert facts["guest: share"] == "bytes of the host"
    assert facts["guest: firmware"] == "bios"
    assert (bench.share / "answer").read_text() == "answer of the guest\n"


def test_a_guest_boots_from_uefi_and_its_variables_go_with_it(bench: Bench, image: PreparedImage) -> None:
    instance_id, made = bench.make(image, memory_mib=256, machine=UEFI)
    console = bench.boot(instance_id, last="guest: firmware=")
    assert "BdsDxe: starting" in console
    assert "guest: firmware=efi" in console
    variables = bench.folder / "instances" / instance_id / "nvram.fd"
    assert variables.exists()
    bench.driver.destroy(instance_id)
    # On the shelf they alone stay, with what proves whose they are.
    written = variables.read_bytes()
    for _ in range(2):
        bench.driver.shelve_storage(instance_id, CallContext())
        assert sorted(path.name for path in variables.parent.iterdir()) == ["nvram.fd", "volumes.json"]
    assert variables.read_bytes() == written
    held = bench.driver.ledger({instance_id: Holding(made, ORDINARY)})
    assert [(one.kind, one.instance_id) for one in held.present] == [("domain", instance_id), ("folder", instance_id)]
    bench.driver.undefine(instance_id)
    assert not variables.exists()
    bench.driver.delete_storage(instance_id)
    assert not variables.parent.exists()


@pytest.fixture(scope="module")
def unsigned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedImage:
    """A disk whose EFI boot loader nobody signed whom the enrolled keys know."""
    if shutil.which("mformat") is None:
        pytest.skip("mtools is not installed")
    kernel = guest_image(Path(request.config.cache.mkdir("guest-image"))).kernel
    disk = tmp_path_factory.mktemp("unsigned") / "disk.raw"
    with disk.open("xb") as handle:
        handle.truncate(32 * MIB)
    for command in (
        ["mformat", "-i", str(disk), "-h", "2", "-s", "32", "-t", "1024", "::"],
        ["mmd", "-i", str(disk), "::/EFI", "::/EFI/BOOT"],
        ["mcopy", "-i", str(disk), str(kernel), "::/EFI/BOOT/BOOTX64.EFI"],
    ):
        subprocess.run(command, check=True, timeout=240)
    return PreparedImage(disk, "raw", 32 * MIB, "0" * 64)


def test_secure_boot_refuses_what_nobody_signed(bench: Bench, unsigned: PreparedImage) -> None:
    plain_id, _made = bench.make(unsigned, memory_mib=256, machine=UEFI)
    secure_id, _made = bench.make(unsigned, memory_mib=256, machine=SECURE)
    loader = bench.xml(secure_id).find("os/loader")
    assert loader is not None
    assert loader.get("secure") == "yes"
    bench.driver.start(secure_id)
    assert "BdsDxe: starting Boot0001" in bench.boot(plain_id, last="BdsDxe: starting Boot0001")
    bench.driver.destroy(plain_id)
    console = bench.boot(secure_id, last="Access Denied")
    assert "BdsDxe: failed to load Boot0001" in console
    assert "BdsDxe: starting Boot0001" not in console
