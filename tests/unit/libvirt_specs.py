"""Strategies for instance specs, shared by the tests of the libvirt driver's pure parts."""

from __future__ import annotations

from hypothesis import strategies as st

from agent.messages.spec import BridgeNic, ImageSource, InstanceSpec, NetworkNic, RootDisk, Seed, UserNic
from agent.messages.spec_disks import (
    Boot,
    BootFile,
    CdromDisk,
    DataDisk,
    Encryption,
    EphemeralDisk,
    KernelBoot,
    SwapDisk,
)
from agent.messages.spec_limits import DiskLimits

INSTANCE_ID = "11111111-2222-4333-8444-555555555555"

# Everything JSON and pydantic admit: control characters, quotes, XML's metacharacters, astral planes.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.sampled_from(
    ["]]>", "<&>\"'", "</metadata>", "\x00\x01\x0b\ufffe", "<!--", "&amp;", "\r\n\t", "𝄞"]
)
NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
MODELS = st.sampled_from(["virtio", "e1000", "e1000e", "rtl8139"])
NICS = st.one_of(
    st.builds(UserNic, type=st.just("user"), model=MODELS),
    st.builds(NetworkNic, type=st.just("network"), network=NAMES, model=MODELS),
    st.builds(
        BridgeNic,
        type=st.just("bridge"),
        bridge=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,14}\Z"),
        model=MODELS,
        mac=st.sampled_from([None, "52:54:00:aa:bb:cc"]),
    ),
)
SEEDS = st.builds(
    Seed,
    datasource=st.sampled_from(["nocloud", "config-drive"]),
    hostname=st.sampled_from([None, "host-1.example"]),
    user_data=st.none() | TEXT,
    meta_data=st.dictionaries(TEXT, TEXT, max_size=4),
    network_config=st.none() | TEXT,
    ssh_keys=st.lists(st.just("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me@x"), max_size=2),
)
IMAGES = st.builds(
    ImageSource,
    url=st.sampled_from(["https://images.example/a?b=1&c='<x>'", "file:///srv/a.qcow2"]),
    sha256=st.just("0" * 64),
    format=st.sampled_from(["qcow2", "raw"]),
)
FILE = BootFile(url="file:///srv/vmlinuz", sha256="0" * 64)
RAW = st.just(ImageSource(url="file:///srv/a.iso", sha256="0" * 64, format="raw"))


def _distinct_macs(nics: list) -> bool:
    macs = [nic.mac for nic in nics if nic.mac]
    return len(macs) == len(set(macs))


BACKING = {
    "bus": st.sampled_from(["virtio", "sata", "scsi"]),
    "size_mib": st.integers(1, 64 * 1024 * 1024),
    "discard": st.booleans(),
    "encryption": st.none() | st.builds(Encryption, key=NAMES),
    "limits": st.none()
    | st.sampled_from([DiskLimits(total_bytes_s=1), DiskLimits(read_iops=5, write_iops=2**40), DiskLimits()]),
}
DISKS = st.lists(
    st.one_of(
        st.builds(DataDisk, kind=st.just("data"), name=st.just("x"), image=st.none() | IMAGES, **BACKING),
        st.builds(EphemeralDisk, kind=st.just("ephemeral"), name=st.just("x"), **BACKING),
        st.builds(SwapDisk, kind=st.just("swap"), name=st.just("x"), **BACKING),
        st.builds(CdromDisk, kind=st.just("cdrom"), name=st.just("x"), image=RAW),
    ),
    max_size=20,
).map(lambda disks: [disk.model_copy(update={"name": f"disk-{number}"}) for number, disk in enumerate(disks)])
BOOTS = st.builds(
    Boot,
    order=st.just([]),
    kernel=st.none()
    | st.builds(
        KernelBoot,
        kernel=st.just(FILE),
        initrd=st.none() | st.just(FILE),
        cmdline=st.sampled_from(["", 'console=ttyS0 a="<&>\'"']),
    ),
)


@st.composite
def _with_order(draw: st.DrawFn, specs: st.SearchStrategy[InstanceSpec]) -> InstanceSpec:
    spec = draw(specs)
    order = draw(st.lists(st.sampled_from(list(spec.disks_by_name())), unique=True, max_size=16))
    return spec.model_copy(update={"boot": spec.boot.model_copy(update={"order": order})})


SPECS = _with_order(
    st.builds(
        InstanceSpec,
        name=NAMES,
        vcpus=st.integers(1, 1024),
        memory_mib=st.integers(16, 16 * 1024 * 1024),
        root_disk=st.builds(
            RootDisk,
            size_mib=st.integers(1, 64 * 1024 * 1024),
            image=st.none() | IMAGES,
            bus=st.sampled_from(["virtio", "sata", "scsi"]),
        ),
        nics=st.lists(NICS, max_size=4).filter(_distinct_macs),
        seed=st.none() | SEEDS,
        firmware_acpi=st.booleans(),
        rng=st.booleans(),
        balloon=st.booleans(),
        guest_agent=st.booleans(),
        vnc=st.booleans(),
        labels=st.dictionaries(NAMES, st.text(max_size=20), max_size=3),
        disks=DISKS,
        boot=BOOTS,
    )
)
