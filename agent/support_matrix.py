"""The support matrix: every verb of the contract, which hypervisor has it, and what nova-compute calls it.

Our columns come from what the drivers announce, so they cannot be wrong for long: a test compares the page with this.
Nova's column is a table of facts about its source (33.0.0-373, libvirt driver), and a test demands a row for each verb.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from agent.drivers.base import OPTIONAL_VERBS
from agent.drivers.libvirt.host import verbs_of
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.messages.commands import COMMANDS


class Nova(NamedTuple):
    """What nova-compute has: `has` with its libvirt driver, `name` of its RPC method."""

    has: Literal["yes", "partly", "no"]
    name: str = ""
    remark: str = ""


COLUMNS: Final = {
    "fake": OPTIONAL_VERBS,
    "libvirt qemu": verbs_of(LibvirtSettings(uri="qemu:///system")),
    "libvirt test": verbs_of(LibvirtSettings(uri="test:///default")),
    "libvirt lxc": verbs_of(LibvirtSettings(uri="lxc:///system")),
}
"""Hypervisor → the optional verbs that its driver announces; all others are required of every driver."""

NOVA: Final[dict[str, Nova]] = {
    "instance.create": Nova("yes", "build_and_run_instance"),
    "instance.delete": Nova("yes", "terminate_instance"),
    "instance.start": Nova("yes", "start_instance", "always anew: a hard reboot"),
    "instance.stop": Nova("yes", "stop_instance"),
    "instance.reboot": Nova("yes", "reboot_instance"),
    "instance.reset": Nova("no", "", "the nearest is a hard reboot, which ends QEMU"),
    "instance.pause": Nova("yes", "pause_instance"),
    "instance.resume": Nova("yes", "unpause_instance, resume_instance"),
    "instance.suspend": Nova("yes", "suspend_instance"),
    "instance.trigger-crash-dump": Nova("yes", "trigger_crash_dump"),
    "instance.memory-dump": Nova("no"),
    "instance.set-policy": Nova("no", "", "what follows a guest's end is the same for all instances"),
    "instance.show": Nova("partly", "get_instance_diagnostics", "the rest is the API's database"),
    "instance.stats": Nova("yes", "get_diagnostics, get_instance_diagnostics", "of a running instance only"),
    "instance.list": Nova("no", "", "the API's database"),
    "instance.resize": Nova("partly", "prep_resize, resize_instance, finish_resize", "never live"),
    "instance.confirm-resize": Nova("yes", "confirm_resize"),
    "instance.revert-resize": Nova("yes", "revert_resize, finish_revert_resize"),
    "instance.set-memory-target": Nova("no"),
    "instance.set-limits": Nova("no", "", "from the flavor, by a resize"),
    "instance.rebuild": Nova("yes", "rebuild_instance"),
    "instance.rescue": Nova("yes", "rescue_instance"),
    "instance.unrescue": Nova("yes", "unrescue_instance"),
    "instance.shelve": Nova("yes", "shelve_instance, shelve_offload_instance"),
    "instance.unshelve": Nova("yes", "unshelve_instance"),
    "instance.restore": Nova("yes", "restore_instance"),
    "instance.export": Nova("partly", "snapshot_instance", "to Glance only"),
    "instance.backup": Nova("yes", "backup_instance"),
    "instance.list-backups": Nova("no", "", "Glance lists them"),
    "instance.adopt": Nova("no"),
    "snapshot.create": Nova("partly", "volume_snapshot_create", "for Cinder's file-based volumes"),
    "snapshot.list": Nova("no"),
    "snapshot.revert": Nova("no"),
    "snapshot.delete": Nova("partly", "volume_snapshot_delete", "for Cinder's file-based volumes"),
    "image.prefetch": Nova("yes", "cache_images"),
    "image.list": Nova("no"),
    "image.remove": Nova("no", "", "by age only"),
    "image.verify": Nova("no"),
    "console.log": Nova("yes", "get_console_output"),
    "host.ping": Nova("partly", "ping", "proves the RPC server, not a durable path"),
    "host.show": Nova("partly", "get_host_uptime", "the rest is in Placement"),
    "host.set-enabled": Nova("yes", "set_host_enabled"),
    "host.audit": Nova("no", "", "single periodic tasks clean up single things"),
    "host.drain": Nova("no", "host_maintenance_mode", "not for libvirt"),
    "operation.show": Nova("partly", "", "instance actions, by the API"),
    "operation.cancel": Nova("partly", "live_migration_abort", "only for live migrations"),
}
"""Verb → nova's. Every verb of the contract has a row; rows of verbs to come do no harm."""

_HEAD: Final = """\
# Support matrix

Which verb works on which hypervisor. This page is made by `make matrix` from what the drivers announce
(`capabilities` in a heartbeat says the same of one running host); do not edit it.

`yes`: every driver must have it. `announced`: optional, and this hypervisor has it. `no`: refused by name
(`verb_unsupported`), before anything is done. nova-compute's column is about its libvirt driver.
"""


def render() -> str:
    """Return the page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    yield f"| verb | {' | '.join(COLUMNS)} | nova-compute |"
    yield f"|---|{'---|' * (len(COLUMNS) + 1)}"
    for verb in sorted((command.verb for command in COMMANDS), key=_order):
        cells = " | ".join(_cell(verb, verbs) for verbs in COLUMNS.values())
        yield f"| `{verb}` | {cells} | {_nova(NOVA[verb])} |"
    counted = [NOVA[command.verb].has for command in COMMANDS]
    yield ""
    yield (
        f"{len(counted)} verbs; of these nova-compute has {counted.count('yes')}, {counted.count('partly')} in part, "
        f"and {counted.count('no')} not at all. What it has and this agent does not yet: moving between hosts, volumes "
        "and interfaces of a running guest, what needs the guest agent, and special hardware."
    )


def _order(verb: str) -> tuple[int, str]:
    nouns = ("instance", "snapshot", "console", "image", "host", "operation")
    noun = verb.split(".", 1)[0]
    return (nouns.index(noun) if noun in nouns else len(nouns), verb)


def _cell(verb: str, announced: frozenset[str]) -> str:
    if verb not in OPTIONAL_VERBS:
        return "yes"
    return "announced" if verb in announced else "no"


def _nova(nova: Nova) -> str:
    name = ", ".join(f"`{one}`" for one in nova.name.split(", ")) if nova.name else ""
    return ": ".join(part for part in (nova.has, "; ".join(p for p in (name, nova.remark) if p)) if part)
