"""Our element in a domain's metadata: ownership marker, generation and spec.

The spec travels as JSON with only printable ASCII, because XML has no way to carry control characters. What
cannot be read back (another program's element, a newer agent's spec, damage) counts as not owned: it is reported
and never touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from pydantic import ValidationError

from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec

NAMESPACE: Final = "https://compute-agent.dev/xmlns/instance/1"
OWNER: Final = "compute-agent"
_PREFIX: Final = "compute-agent"
_ELEMENT: Final = f"{{{NAMESPACE}}}instance"
_SPEC: Final = f"{{{NAMESPACE}}}spec"

_LIFE: Final = f"{{{NAMESPACE}}}life"

ET.register_namespace(_PREFIX, NAMESPACE)


@dataclass(frozen=True, slots=True)
class Ownership:
    """What our element says. `host` is the name of the agent's host that defined the domain last."""

    spec: InstanceSpec
    generation: int
    host: str
    life: Life = ORDINARY


def build(spec: InstanceSpec, *, generation: int, host: str, life: Life = ORDINARY) -> ET.Element:
    """Build the element to be put into `<metadata>`."""
    element = ET.Element(_ELEMENT, {"owner": OWNER, "generation": str(generation), "host": host})
    # Defaults are written out too: a later agent may have others, and this instance keeps what it was made with.
    body = spec.model_dump(mode="json")
    ET.SubElement(element, _SPEC).text = json.dumps(body, ensure_ascii=True, separators=(",", ":"))
    if life != ORDINARY:
        ET.SubElement(element, _LIFE).text = json.dumps(
            life.model_dump(mode="json", exclude_none=True), ensure_ascii=True, separators=(",", ":")
        )
    return element


def read(domain: ET.Element) -> Ownership | None:
    """Read our element from a parsed `<domain>`; None if it is not there or cannot be understood."""
    element = domain.find(f"metadata/{_ELEMENT}")
    if element is None or element.get("owner") != OWNER:
        return None
    try:
        generation = int(element.get("generation", ""))
        spec = InstanceSpec.model_validate_json(element.findtext(_SPEC) or "")
        life = Life.model_validate_json(element.findtext(_LIFE) or "{}")
    except (ValueError, ValidationError):
        return None
    if not 0 <= generation < 2**63:
        return None
    return Ownership(spec=spec, generation=generation, host=element.get("host", ""), life=life)
