"""Contradictions within a spec's hardware, which no host could make."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from agent.messages.spec import InstanceSpec


def spec(**changes: Any) -> InstanceSpec:
    return InstanceSpec.model_validate(
        {"name": "vm", "vcpus": 4, "memory_mib": 1024, "root_disk": {"size_mib": 1}} | changes
    )


CELLS = [{"vcpus": [0, 1], "memory_mib": 512}, {"vcpus": [3, 2], "memory_mib": 512}]


@pytest.mark.parametrize(
    "fields",
    [
        {"cpu": {"topology": {"sockets": 2, "cores": 2}}},
        {"cpu": {"topology": {"sockets": 8}}, "max_vcpus": 8},
        {"numa": CELLS, "memory_backing": {"hugepages_kib": 2048}},
        {"memory_backing": {"hugepages_kib": 1024 * 1024}},
        {"cpu": {"placement": "dedicated"}, "max_vcpus": 4},
        {"shares": [{"source": "a", "tag": "x"}, {"source": "a", "tag": "y"}]},
        {"machine": {"firmware": {"type": "uefi", "secure_boot": True}}},
    ],
    ids=str,
)
def test_what_agrees_is_taken_and_comes_back_from_json(fields: dict[str, Any]) -> None:
    made = spec(**fields)
    assert InstanceSpec.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cpu": {"topology": {"sockets": 3}}}, "makes 3 vCPUs and the instance has 4"),
        ({"cpu": {"topology": {"sockets": 4}}, "max_vcpus": 8}, "makes 4 vCPUs and the instance has 8"),
        ({"numa": CELLS[:1]}, "each of the vCPUs 0 to 3 must be in exactly one"),
        ({"numa": [*CELLS, {"vcpus": [0], "memory_mib": 16}]}, "exactly one"),
        ({"numa": [CELLS[0], {"vcpus": [2, 3], "memory_mib": 256}]}, "have 768 MiB together"),
        ({"memory_mib": 1025, "memory_backing": {"hugepages_kib": 2048}}, "whole pages of 2048 KiB"),
        (
            {
                "numa": [{"vcpus": [0], "memory_mib": 511}, {"vcpus": [1, 2, 3], "memory_mib": 513}],
                "memory_backing": {"hugepages_kib": 2048},
            },
            "whole pages of 2048 KiB",
        ),
        ({"cpu": {"placement": "dedicated"}, "max_vcpus": 8}, "max_vcpus above vcpus"),
        ({"cpu": {"mode": "custom"}}, "belong together"),
        ({"cpu": {"model": "Nehalem"}}, "belong together"),
        ({"shares": [{"source": "a", "tag": "x"}, {"source": "b", "tag": "x"}]}, "the same tag"),
        ({"machine": {"firmware": {"secure_boot": True}}}, "needs the firmware type uefi"),
        ({"video": {"model": "none", "vram_kib": 4096}}, "no video device has no vram_kib"),
        ({"machine": {"type": "q35 evil='x'"}}, "pattern"),
        ({"cpu": {"features": {"<x>": "require"}}}, "pattern"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradiction_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**fields)
