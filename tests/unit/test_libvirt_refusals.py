"""What a host can never do is refused before anything is made, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.drivers.libvirt import firmware, refusals
from agent.drivers.libvirt.capacity import pages_of_cell
from agent.drivers.libvirt.definition import HostFacts
from agent.drivers.plain import check_plain
from agent.errors import ComputeError, Unsupported
from agent.messages.spec import InstanceSpec
from agent.messages.spec_machine import Firmware

OFFER = refusals.Offer(
    enums={
        "video.modelType": frozenset({"vga", "virtio", "none"}),
        "memoryBacking.sourceType": frozenset({"anonymous", "memfd"}),
        "filesystem.driverType": frozenset({"virtiofs"}),
    },
    cpu_modes=frozenset({"maximum", "custom"}),
    models=frozenset({"Nehalem"}),
    max_vcpus=288,
)
HOST = refusals.Host(
    offer=OFFER, libvirt_version=9_000_000, session=False, dedicated=frozenset({2}), page_sizes=frozenset({2048})
)


@pytest.fixture
def facts(tmp_path: Path, firmware_folder: Path) -> HostFacts:
    return HostFacts(
        "qemu", "x86_64", "q35", "auto", None, None, "127.0.0.1",
        machines={"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2"}, firmware_folders=(firmware_folder,),
        shares={"data": tmp_path, "lost": tmp_path / "not-there"},
    )  # fmt: skip


def spec(**changes: Any) -> InstanceSpec:
    return InstanceSpec.model_validate(
        {"name": "vm", "vcpus": 1, "memory_mib": 64, "root_disk": {"size_mib": 1}} | changes
    )


UEFI = {"firmware": {"type": "uefi"}}
SECURE = {"firmware": {"type": "uefi", "secure_boot": True}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"machine": UEFI},
        {"machine": SECURE},
        {"machine": UEFI | {"type": "pc"}},
        {"cpu": {"mode": "custom", "model": "Nehalem", "placement": "dedicated"}},
        {"memory_backing": {"hugepages_kib": 2048}},
        {"shares": [{"source": "data", "tag": "x"}]},
        {"video": {"model": "virtio"}},
        {"watchdog": {}},
    ],
    ids=str,
)
def test_what_the_host_can_do_passes(facts: HostFacts, fields: dict[str, Any]) -> None:
    refusals.check(spec(**fields), facts, HOST)


@pytest.mark.parametrize(
    ("fields", "host", "code"),
    [
        ({}, {"offer": None}, "machine_unknown"),
        ({"vcpus": 289}, {}, "option_unsupported"),
        ({"machine": SECURE | {"type": "pc"}}, {}, "firmware_missing"),
        ({"cpu": {"mode": "host-passthrough"}}, {}, "cpu_unsupported"),
        ({"cpu": {"mode": "custom", "model": "Pentium99"}}, {}, "cpu_unsupported"),
        ({"cpu": {"placement": "dedicated"}}, {"dedicated": frozenset()}, "no_dedicated_cpus"),
        ({"memory_mib": 2048, "memory_backing": {"hugepages_kib": 1024 * 1024}}, {}, "hugepages_missing"),
        ({"memory_backing": {"source": "file"}}, {}, "option_unsupported"),
        ({"video": {"model": "qxl"}}, {}, "option_unsupported"),
        ({"watchdog": {"model": "itco"}}, {}, "option_unsupported"),
        (
            {"watchdog": {"model": "itco"}, "machine": {"type": "pc"}},
            {"libvirt_version": 9_001_000},
            "option_unsupported",
        ),
        ({"shares": [{"source": "other", "tag": "x"}]}, {}, "share_unknown"),
        ({"shares": [{"source": "lost", "tag": "x"}]}, {}, "share_missing"),
        ({"shares": [{"source": "data", "tag": "x", "readonly": True}]}, {}, "option_unsupported"),
        ({"shares": [{"source": "data", "tag": "x"}]}, {"session": True}, "option_unsupported"),
        ({"shares": [{"source": "data", "tag": "x"}]}, {"offer": replace(OFFER, enums={})}, "option_unsupported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_do_is_refused(
    facts: HostFacts, fields: dict[str, Any], host: dict[str, Any], code: str
) -> None:
    with pytest.raises(ComputeError) as refused:
        refusals.check(spec(**fields), facts, replace(HOST, **host))
    assert refused.value.code == code
    assert not refused.value.retryable


def test_without_firmware_on_the_host_uefi_is_refused(facts: HostFacts, tmp_path: Path) -> None:
    with pytest.raises(ComputeError) as refused:
        refusals.check(spec(machine=UEFI), replace(facts, firmware_folders=(tmp_path / "none",)), HOST)
    assert refused.value.code == "firmware_missing"


def test_features_need_a_mode(facts: HostFacts) -> None:
    left_to_qemu = replace(facts, cpu_mode="default")
    refusals.check(spec(), left_to_qemu, HOST)
    with pytest.raises(Unsupported) as refused:
        refusals.check(spec(cpu={"features": {"avx": "disable"}}), left_to_qemu, HOST)
    assert refused.value.details["option"] == "cpu.features"


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"cpu": {"topology": {}}}, "cpu"),
        ({"machine": {"type": "q35"}}, "machine"),
        ({"numa": [{"vcpus": [0], "memory_mib": 64}]}, "numa"),
        ({"memory_backing": {"locked": True}}, "memory_backing"),
        ({"shares": [{"source": "data", "tag": "x"}]}, "shares"),
        ({"watchdog": {}}, "watchdog"),
        ({"video": {}}, "video"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_driver_of_plain_machines_refuses_the_rest(fields: dict[str, Any], option: str) -> None:
    check_plain(spec(), "toy")
    with pytest.raises(Unsupported) as refused:
        check_plain(spec(**fields), "toy")
    assert refused.value.code == "option_unsupported"
    assert refused.value.details["option"] == option


def test_the_firmware_that_fits_is_found(firmware_folder: Path) -> None:
    def found(machine: str, **wanted: Any) -> str | None:
        build = firmware.find(
            Firmware(type="uefi", **wanted), architecture="x86_64", machine=machine, folders=(firmware_folder,)
        )
        return None if build is None else build.code.name

    assert found("pc-q35-7.2") == found("pc-i440fx-7.2") == "plain-code.fd"
    assert found("pc-q35-7.2", secure_boot=True) == "secure-code.fd"  # not the one without keys
    assert found("pc-i440fx-7.2", secure_boot=True) is None
    assert found("virt-7.2") is None


def test_a_broken_descriptor_hides_no_good_one(firmware_folder: Path, tmp_path: Path) -> None:
    good = json.loads((firmware_folder / "60-plain.json").read_text())
    (tmp_path / "10-broken.json").write_text("{")
    (tmp_path / "20-strange.json").write_text('{"mapping": []}')
    (tmp_path / "30-files-gone.json").write_text(
        json.dumps(good | {"mapping": good["mapping"] | {"executable": {"filename": "/none", "format": "raw"}}})
    )
    (tmp_path / "40-memory.json").write_text(json.dumps(good | {"mapping": {"device": "memory", "filename": "/none"}}))
    (tmp_path / "60-plain.json").write_text(json.dumps(good | {"description": "mine"}))
    build = firmware.find(
        Firmware(type="uefi"), architecture="x86_64", machine="pc-q35-7.2", folders=(tmp_path, firmware_folder)
    )
    assert build is not None
    assert build.code.name == "plain-code.fd"


def test_pages_are_read_from_the_kernel(tmp_path: Path) -> None:
    for size_kib, total, free in ((1048576, 2, 1), (2048, 100, 60), (64, 0, 0)):
        folder = tmp_path / "node1" / "hugepages" / f"hugepages-{size_kib}kB"
        folder.mkdir(parents=True)
        (folder / "nr_hugepages").write_text(f"{total}\n")
        (folder / "free_hugepages").write_text(f"{free}\n")
    pools = [(pool.size_kib, pool.total, pool.free) for pool in pages_of_cell(1, tmp_path)]
    assert pools == [(2048, 100, 60), (1048576, 2, 1)]
    assert pages_of_cell(0, tmp_path) == []
