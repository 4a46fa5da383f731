"""The matrix of specs: what it covers, and that each definition of it is valid by libvirt's own schema."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from lxml import etree
from support.pairwise import all_pairs
from support.spec_matrix import DISKS, matrix

from agent.drivers.libvirt import xml
from agent.drivers.libvirt.definition import HostFacts, InstanceFiles
from agent.drivers.libvirt.volumes import Location
from agent.messages.spec import InstanceSpec

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
FILES = InstanceFiles(
    disks={name: Location("file", Path(f"/srv/{name}.qcow2"), "qcow2") for name in DISKS},
    seed=Path("/srv/seed.iso"),
    console_log=Path("/srv/console.log"),
)


def test_every_pair_of_values_is_covered() -> None:
    axes = {"a": [0, 1, 2], "b": [0, 1], "c": [0, 1, 2, 3], "d": [0, 1]}
    rows = all_pairs(axes)
    assert rows == all_pairs(axes)
    assert len(rows) < 20  # of 48
    for one, other in itertools.combinations(axes, 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(axes[one], axes[other]))


def test_what_is_not_allowed_is_left_out_and_nothing_else() -> None:
    axes = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    rows = all_pairs(axes, lambda row: not (row.get("a") == 1 and row.get("b") == 1))
    assert {(row["a"], row["b"]) for row in rows} == {(0, 0), (0, 1), (1, 0)}
    assert {(row["b"], row["c"]) for row in rows} == set(itertools.product([0, 1], [0, 1]))


def test_the_matrix_uses_every_option_of_a_spec() -> None:
    specs = matrix()
    assert len(specs) > 200
    untouched = {
        name for name in InstanceSpec.model_fields if len({repr(getattr(spec, name)) for spec in specs}) == 1
    }  # fmt: skip
    # Room to grow belongs to the resize tests; boot and policy do not concern the hardware.
    assert untouched <= {"vcpus", "memory_mib", "max_vcpus", "max_memory_mib", "boot", "policy", "labels"}


def test_every_definition_of_the_matrix_is_valid(firmware_folder: Path) -> None:
    if not SCHEMA.exists():
        pytest.skip(f"libvirt's schemas are not installed ({SCHEMA})")
    schema = etree.RelaxNG(etree.parse(SCHEMA))
    facts = HostFacts(
        "qemu", "x86_64", "q35", "auto", None, None, "127.0.0.1",
        machines={"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2"},
        firmware_folders=(firmware_folder,), shared_cpus=frozenset({0}), shares={"data": Path("/srv/data")},
    )  # fmt: skip
    instance_id = "11111111-2222-4333-8444-555555555555"
    for spec in matrix():
        cpus = {vcpu: vcpu + 1 for vcpu in range(8)} if spec.cpu.placement == "dedicated" else {}
        text = xml.build(instance_id, spec, generation=1, host="h", facts=facts, files=FILES, cpus=cpus)
        document = etree.fromstring(text)
        assert schema.validate(document), (spec, schema.error_log)
        # What libvirt reads back is defined again later: the same must come out of it.
        again = xml.build(
            instance_id, spec, generation=1, host="h", facts=facts, files=FILES, cpus=cpus,
            present=xml.ET.fromstring(text),
        )  # fmt: skip
        assert schema.validate(etree.fromstring(again)), (spec, schema.error_log)
