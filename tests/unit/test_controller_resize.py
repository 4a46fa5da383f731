"""`computectl instance resize` and its like: what is sent, what is said, what is refused before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
from controller_agent import INSTANCE, Ctl, succeed

from agent.messages.spec_limits import CpuLimits, DiskLimits, NicLimits
from agent.messages.verbs_resize import (
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
    NicLimitsChange,
)

SIZES: dict[str, Any] = {
    "instance_id": INSTANCE, "observed": "running", "changed": True, "vcpus": 4, "memory_mib": 2048,
    "disks_mib": {"root": 4096}, "pending": True, "confirm_by": "2026-11-23T10:00:00Z",
}  # fmt: skip


@pytest.fixture
def ctl() -> Ctl:
    return Ctl()


@pytest.mark.parametrize(
    ("args", "sent"),
    [
        (
            ["resize", "--vcpus", "4", "--memory-mib", "2048", "--disk", "root=4096", "--confirm-within", "never"],
            InstanceResize(vcpus=4, memory_mib=2048, disks_mib={"root": 4096}, confirm_within_s="never"),
        ),
        (
            ["resize", "--vcpus", "4", "--live", "--guest-timeout", "5"],
            InstanceResize(vcpus=4, mode="live", timeout_s=5),
        ),
        (["confirm-resize"], InstanceConfirmResize()),
        (["revert-resize"], InstanceRevertResize()),
        (["set-memory-target", "--memory-mib", "64"], InstanceSetMemoryTarget(memory_mib=64)),
        (
            ["set-limits", "--cpu", "shares=512", "--disk", "root:total_iops=5", "--disk", "data:", "--nic", "0:inbound_kib_s=9"],
            InstanceSetLimits(
                cpu=CpuLimits(shares=512),
                disks={"root": DiskLimits(total_iops=5), "data": None},
                nics=[NicLimitsChange(nic=0, limits=NicLimits(inbound_kib_s=9))],
            ),
        ),
        (["set-limits", "--cpu", ""], InstanceSetLimits(cpu=CpuLimits())),
    ],
    ids=["cold", "live", "confirm", "revert", "target", "limits", "lift"],
)
def test_what_is_sent(ctl: Ctl, args: list[str], sent: Any) -> None:
    ctl.answers = {sent.verb: succeed(SIZES)}
    done = ctl("instance", args[0], INSTANCE, *args[1:])
    assert done.exit_code == 0, done.stderr
    assert [command.data for command in ctl.commands] == [sent]
    if isinstance(sent, InstanceResize):
        assert "4 " in done.stdout
        assert "2026-11-23T10:00:00Z" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resize"], "give vcpus"),
        (["resize", "--disk", "root"], "--disk"),
        (["resize", "--disk", "root=much"], "no whole number"),
        (["resize", "--disk", "ROOT=5"], "disks_mib"),
        (["set-limits"], "give cpu"),
        (["set-limits", "--disk", "root:total_iops=1,read_iops=1"], "not both"),
        (["set-limits", "--cpu", "speed=1"], "speed"),
    ],
    ids=["nothing", "no-size", "no-number", "no-name", "no-limit", "both", "unknown"],
)
def test_what_is_refused_here(ctl: Ctl, args: list[str], message: str) -> None:
    done = ctl("instance", args[0], INSTANCE, *args[1:])
    assert done.exit_code == 2
    assert message in done.stderr
    assert ctl.commands == []
