"""`computectl instance suspend|reset|trigger-crash-dump|memory-dump|set-policy`."""

from __future__ import annotations

from typing import Any

import click

from agent.controller import render
from agent.controller.options import host_option, instance_argument, json_option, sending, sending_options
from agent.controller.perform import perform, power
from agent.controller.session import Session, pass_session
from agent.messages.verbs_memory import (
    InstanceMemoryDump,
    InstanceReset,
    InstanceSetPolicy,
    InstanceSuspend,
    InstanceTriggerCrashDump,
)

MEMORY_TIMEOUT_S = 1800.0
"""All of a guest's memory goes to a disk."""


@click.command("suspend")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_suspend(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Save an instance's memory to its host's disk and end it. `resume` or `start` brings it back."""
    power(session, InstanceSuspend(), instance_id, host, options, past="suspended", extra_s=MEMORY_TIMEOUT_S)


@click.command("reset")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_reset(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Press an instance's reset button; its memory is lost."""
    power(session, InstanceReset(), instance_id, host, options, past="reset")


@click.command("trigger-crash-dump")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_trigger_crash_dump(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Send an instance a non-maskable interrupt. Its guest may crash on it and write a dump."""
    power(session, InstanceTriggerCrashDump(), instance_id, host, options, past="interrupted")


@click.command("memory-dump")
@instance_argument
@host_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["elf", "kdump-zlib", "raw"]),
    default="elf",
    show_default=True,
    help="elf and kdump-zlib are for crash and gdb, raw is the hypervisor's own.",
)
@click.option("--live/--paused", default=True, help="Let the guest run meanwhile, as far as the format allows.")
@sending_options
@json_option
@pass_session
def instance_memory_dump(
    session: Session, /, *, instance_id: str, host: str, form: str, live: bool, **options: Any
) -> None:
    """Write an instance's memory into a file on its host. It holds all of the guest's secrets."""
    data = InstanceMemoryDump.model_validate({"format": form, "live": live})
    how = sending(options)
    done = perform(session, data, host=host, instance_id=instance_id, how=how, default_timeout_s=MEMORY_TIMEOUT_S)
    if done is not None and not session.as_json:
        render.fields(done.result)


@click.command("set-policy")
@instance_argument
@host_option
@click.option(
    "--on-host-boot",
    type=click.Choice(["stay-stopped", "last-state", "start"]),
    help="The host booted: leave it, start it if it was wanted running, or start it.",
)
@click.option("--on-stop", type=click.Choice(["keep", "restart"]), help="The guest powered itself off.")
@click.option("--on-crash", type=click.Choice(["keep", "restart"]), help="The guest panicked, or its process died.")
@click.option(
    "--on-io-error",
    type=click.Choice(["keep", "pause-and-retry"]),
    help="A full disk paused the guest: leave it, or let it run on when there is space.",
)
@sending_options
@json_option
@pass_session
def instance_set_policy(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    on_host_boot: str | None,
    on_stop: str | None,
    on_crash: str | None,
    on_io_error: str | None,
    **options: Any,
) -> None:
    """Change what happens by itself with an instance. What is not named stays as it is."""
    asked = {
        "on_host_boot": on_host_boot, "on_stop": on_stop, "on_crash": on_crash, "on_io_error": on_io_error,
    }  # fmt: skip
    if not any(asked.values()):
        raise click.UsageError("name at least one policy to change")
    data = InstanceSetPolicy.model_validate(asked)
    done = perform(session, data, host=host, instance_id=instance_id, how=sending(options))
    if done is not None and not session.as_json:
        render.fields(done.result["spec"]["policy"])


COMMANDS = (
    instance_suspend,
    instance_reset,
    instance_trigger_crash_dump,
    instance_memory_dump,
    instance_set_policy,
)
