from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libvirt_specs import SPECS, TEXT

from agent.drivers.libvirt import domains, metadata
from agent.messages.life import Adoption, Life
from agent.messages.spec import InstanceSpec, RootDisk

SMALL = InstanceSpec(name="vm", vcpus=1, memory_mib=64, root_disk=RootDisk(size_mib=1))


def travel(spec: InstanceSpec, generation: int, host: str) -> ET.Element:
    """Through libvirt and back: serialised, parsed, and indented as libvirt does."""
    domain = ET.Element("domain")
    ET.SubElement(domain, "metadata").append(metadata.build(spec, generation=generation, host=host))
    back = ET.fromstring(ET.tostring(domain, encoding="unicode"))
    ET.indent(back)
    return ET.fromstring(ET.tostring(back))


@settings(max_examples=200, deadline=None)
@given(spec=SPECS, generation=st.integers(0, 2**63 - 1))
def test_spec_and_generation_survive_the_journey(spec, generation):
    ours = metadata.read(travel(spec, generation, "host-1.example"))
    assert ours is not None
    assert ours.spec == spec
    assert (ours.generation, ours.host) == (generation, "host-1.example")


@given(text=TEXT)
def test_the_document_holds_only_printable_ascii(text):
    spec = SMALL.model_copy(update={"labels": {"a": text[:256]}})
    rendered = ET.tostring(metadata.build(spec, generation=1, host="h"), encoding="unicode")
    assert all(" " <= character <= "~" for character in rendered)


def damaged(**change: str | None) -> ET.Element:
    domain = travel(SMALL, 1, "h")
    element = domain.find(f"metadata/{{{metadata.NAMESPACE}}}instance")
    for key, value in change.items():
        if key == "spec":
            element[0].text = value
        elif value is None:
            del element.attrib[key]
        else:
            element.set(key, value)
    return domain


@pytest.mark.parametrize(
    "change",
    [
        {"owner": "somebody"},
        {"owner": None},
        {"generation": None},
        {"generation": "x"},
        {"generation": "-1"},
        {"generation": str(2**63)},
        {"spec": None},
        {"spec": ""},
        {"spec": "{"},
        {"spec": "[]"},
        {"spec": '{"name": "vm"}'},
        {"spec": '{"name":"vm","vcpus":1,"memory_mib":64,"root_disk":{"size_mib":1},"from_the_future":1}'},
    ],
)
def test_what_cannot_be_understood_is_not_ours(change):
    assert metadata.read(damaged(**change)) is None


def test_undamaged_is_ours():
    assert metadata.read(damaged()) is not None


@pytest.mark.parametrize(
    "document",
    [
        "<domain/>",
        "<domain><metadata/></domain>",
        "<domain><metadata><instance owner='compute-agent' generation='1'/></metadata></domain>",
        "<domain><metadata><x:instance xmlns:x='http://other.example/' owner='compute-agent'/></metadata></domain>",
    ],
)
def test_a_foreign_domain_is_not_ours(document):
    assert metadata.read(ET.fromstring(document)) is None


@pytest.mark.parametrize(("listed", "own"), [(["/vm/a.qcow2"], True), (["/vm/a.qcow2", "/etc/passwd"], False)])
def test_an_adopted_domain_owns_only_disks_that_its_definition_names(listed: list[str], own: bool) -> None:
    """A journal that was lost takes this from the domain, and a delete removes the files."""
    life = Life(adopted=Adoption(disks=listed, own_disks=True, since=datetime(2026, 1, 1, tzinfo=UTC)))
    domain = ET.Element("domain")
    disk = ET.SubElement(ET.SubElement(domain, "devices"), "disk", {"device": "disk"})
    ET.SubElement(disk, "source", {"file": "/vm/a.qcow2"})
    proven = domains._proven(life, domain)
    assert proven.adopted is not None
    assert proven.adopted.own_disks is own
