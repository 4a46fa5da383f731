"""`computectl`: exit status, messages, tables and JSON, against an agent that answers by script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from controller_agent import (
    HOST,
    INSTANCE,
    SPEC,
    Ctl,
    FakeAgent,
    fail,
    heartbeat,
    lines_of_json,
    reject,
    succeed,
    with_progress,
)

from agent import __version__
from agent.controller import commands_console
from agent.controller.cli import cli
from agent.messages.commands import Command
from agent.messages.events import InstanceRemoved


@pytest.fixture
def ctl() -> Ctl:
    return Ctl()


def test_version_and_help(ctl: Ctl) -> None:
    assert ctl("--version").stdout == f"computectl, version {__version__}\n"
    for group in ((), ("instance",), ("host",), ("operation",), ("events",)):
        result = ctl(*group, "--help")
        assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("instance", "show", "not-a-uuid"), "no instance id"),
        (("instance", "show", INSTANCE, "--host", "a b"), "no host name"),
        (("instance", "create"), "--file"),
        (("instance", "create", "-f", "/nonexistent"), "does not exist"),
        (("instance", "stop", INSTANCE, "--timeout", "-1"), "--timeout"),
        (("operation", "show", "a b"), "no operation id"),
        (("events", "--count", "0"), "--count"),
        (("events", "--kind", "st*"), "no kind"),
        (("nonsense",), "No such command"),
        (("host", "disable", HOST, "--reason", "x" * 257), "256"),
        (("instance", "rm", INSTANCE, "--command-id", "a b"), "id: String should match"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2(ctl: Ctl, args: tuple[str, ...], message: str) -> None:
    result = ctl(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert ctl.commands == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("instance", "show", "not-a-uuid", "--json"), "no instance id"),
        (("instance", "create", "--json"), "--file"),
        (("instance", "ls", "--json", "--bogus"), "--bogus"),
        (("host", "--json"), "--json"),
        (("instance", "resize", INSTANCE, "--json"), "give vcpus, memory_mib or disks_mib"),
    ],
)  # fmt: skip
def test_wrong_usage_is_json_where_json_was_asked_for(ctl: Ctl, args: tuple[str, ...], message: str) -> None:
    result = ctl(*args)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert (error["code"], error["retryable"], result.stderr) == ("usage", False, "")
    assert message in error["message"]
    assert "Value error" not in error["message"]


def test_a_host_must_be_named(ctl: Ctl) -> None:
    result = ctl("instance", "ls", env={"COMPUTECTL_HOST": ""})
    assert result.exit_code == 2
    assert "--host" in result.stderr


def test_create_sends_the_spec_and_says_what_came_of_it(ctl: Ctl, tmp_path: Path) -> None:
    ctl.answers["instance.create"] = with_progress(succeed({"id": INSTANCE, "observed": "running"}))
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    result = ctl("instance", "create", "-f", str(path), "--id", INSTANCE.upper(), "--no-start", "--generation", "3")
    assert (result.exit_code, result.stdout) == (0, f"{INSTANCE} created, now running (12 ms)\n")
    assert result.stderr.splitlines() == [
        f"instance.create on {HOST}: accepted",
        f"instance.create on {HOST}: started",
        f"instance.create on {HOST}: image 25 % (1.0 of 4.0 MiB)",
    ]
    [command] = ctl.commands
    assert (command.subject, command.generation, command.reportprogress) == (INSTANCE, 3, True)
    assert (command.data.spec.name, command.data.start) == ("a", False)


def test_create_from_standard_input_as_json(ctl: Ctl) -> None:
    ctl.answers["instance.create"] = with_progress(succeed({"observed": "running"}))
    spec = '{"name": "a", "vcpus": 1, "memory_mib": 64, "root_disk": {"size_mib": 1}}'
    result = ctl("instance", "create", "-f", "-", "--json", "--command-id", "c-1", input=spec)
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["operation_id"] == "c-1"
    assert document["result"] == {"observed": "running"}
    assert (document["host"], document["verb"]) == (HOST, "instance.create")


def test_repeating_a_create_by_its_command_id_names_the_same_instance(ctl: Ctl) -> None:
    ctl.answers["instance.create"] = succeed()
    for _ in range(2):
        assert ctl("instance", "create", "-f", "-", "--command-id", "c-1", input=SPEC).exit_code == 0
    assert ctl.commands[0].subject == ctl.commands[1].subject
    assert ctl("instance", "create", "-f", "-", input=SPEC).exit_code == 0
    assert ctl.commands[2].subject != ctl.commands[0].subject


def test_an_invalid_spec_ends_with_2_before_anything_is_sent(ctl: Ctl) -> None:
    bad = SPEC.replace("vcpus: 1", "vcpus: 0").replace("memory_mib", "memory")
    result = ctl("instance", "create", "-f", "-", input=bad)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: invalid_spec: standard input:2: vcpus: ")
    assert "memory: no such field" in result.stderr
    result = ctl("instance", "create", "-f", "-", "--json", input=bad)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "invalid_spec"
    assert error["findings"][0] == {"field": "vcpus", "line": 2, "message": error["findings"][0]["message"]}
    assert ctl.agents == []


def test_no_wait_prints_where_to_look(ctl: Ctl) -> None:
    result = ctl("instance", "rm", INSTANCE, "--no-wait", "--command-id", "c-1")
    assert (result.exit_code, result.stdout) == (0, "sent; operation c-1\n")
    document = json.loads(ctl("instance", "rm", INSTANCE, "--no-wait", "--command-id", "c-1", "--json").stdout)
    assert document == {"operation_id": "c-1", "host": HOST, "instance_id": INSTANCE, "verb": "instance.delete"}


def test_a_refusal_ends_with_1(ctl: Ctl) -> None:
    ctl.answers["instance.start"] = reject("resource_exhausted", "memory is short\x1b[31m", retryable=True, short_mib=5)
    result = ctl("instance", "start", INSTANCE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-2:] == [
        "error: resource_exhausted: memory is short (short_mib: 5)",
        "A later try can succeed.",
    ]
    result = ctl("instance", "start", INSTANCE, "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, result.stderr) == (1, "")
    assert (error["code"], error["retryable"], error["state"]) == ("resource_exhausted", True, "rejected")
    assert (error["details"], error["instance_id"]) == ({"short_mib": 5}, INSTANCE)


def test_the_agents_own_deadline_is_a_failure_and_no_silence(ctl: Ctl) -> None:
    ctl.answers["instance.start"] = fail("deadline_exceeded", "the hypervisor hangs")
    assert ctl("instance", "start", INSTANCE).exit_code == 1


def test_no_answer_ends_with_3(ctl: Ctl) -> None:
    result = ctl("--timeout", "0.02", "instance", "start", INSTANCE, "--command-id", "c-1")
    assert result.exit_code == 3
    assert "error: deadline_exceeded: " in result.stderr
    assert "computectl operation show c-1" in result.stderr
    result = ctl("--timeout", "0.02", "host", "ping", HOST, "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (3, "deadline_exceeded")


def test_no_broker_ends_with_3(ctl: Ctl) -> None:
    ctl.down = True
    result = ctl("--timeout", "0.02", "host", "ping", HOST)
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")


def test_an_unknown_host_ends_with_1(ctl: Ctl) -> None:
    result = ctl("host", "ping", "nowhere")
    assert result.exit_code == 1
    assert "error: unroutable: no agent has ever served host nowhere" in result.stderr


def test_a_url_that_is_none_ends_with_2_and_is_not_printed() -> None:
    result = CliRunner().invoke(cli, ["--amqp", "http://user:secret@host/", "host", "ping", HOST])
    assert result.exit_code == 2
    assert "amqp://" in result.stderr
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("args", "verb", "data"),
    [
        (("stop",), "instance.stop", {"timeout_s": 60.0, "force": False}),
        (("stop", "--force", "--timeout", "5"), "instance.stop", {"timeout_s": 5.0, "force": True}),
        (("reboot",), "instance.reboot", {"mode": "soft", "timeout_s": 60.0}),
        (("reboot", "--hard"), "instance.reboot", {"mode": "hard", "timeout_s": 60.0}),
        (("pause",), "instance.pause", {}),
        (("resume",), "instance.resume", {}),
        (("start",), "instance.start", {"discard_saved": False}),
        (("start", "--discard-saved"), "instance.start", {"discard_saved": True}),
        (("suspend",), "instance.suspend", {}),
        (("reset",), "instance.reset", {}),
        (("trigger-crash-dump",), "instance.trigger-crash-dump", {}),
        (("rm",), "instance.delete", {}),
    ],
)
def test_power_commands(ctl: Ctl, args: tuple[str, ...], verb: str, data: dict[str, Any]) -> None:
    ctl.answers[verb] = succeed({"observed": "stopped", "changed": False, "forced": True})
    result = ctl("instance", args[0], INSTANCE, *args[1:])
    assert (result.exit_code, result.stdout) == (0, f"{INSTANCE} unchanged, now stopped, forced (12 ms)\n")
    [command] = ctl.commands
    dumped = command.data.model_dump()
    assert (command.verb, command.subject, {key: dumped[key] for key in data}) == (verb, INSTANCE, data)
    assert command.data == type(command.data)(**data)


def _instances(command: Command[Any]) -> list[Any]:
    spec = {"vcpus": 2, "memory_mib": 2048}
    pages: dict[str | None, dict[str, Any]] = {
        None: {"instances": [{"id": INSTANCE, "name": "a", "observed": "running", "desired": "running", "spec": spec}],
               "next_after": INSTANCE},
        INSTANCE: {"instances": [{"id": "2" * 36, "name": "b[red]", "observed": "unknown", "desired": "stopped"}],
                   "foreign": [{"id": "f", "name": "other", "observed": "running", "vcpus": 1, "memory_mib": 512}]},
    }  # fmt: skip
    return succeed(pages[command.data.after])(command)


def test_ls_reads_every_page_into_one_table(ctl: Ctl) -> None:
    ctl.answers["instance.list"] = _instances
    result = ctl("instance", "ls", "--all")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines == [
        ["ID", "NAME", "STATE", "DESIRED", "VCPUS", "MEMORY"],
        [INSTANCE, "a", "running", "running", "2", "2.0", "GiB"],
        ["2" * 36, "b[red]", "unknown", "stopped", "-", "-"],
        ["f", "other", "running", "(foreign)", "1", "512", "MiB"],
    ]
    document = json.loads(ctl("instance", "ls", "--all", "--json").stdout)
    assert ([i["name"] for i in document["instances"]], len(document["foreign"])) == (["a", "b[red]"], 1)


def test_show_prints_nested_fields_without_control_characters(ctl: Ctl) -> None:
    ctl.answers["instance.show"] = succeed(
        {"name": "a\x1b]0;x\x07b", "spec": {"nics": [{"type": "user"}], "rng": True}}
    )
    result = ctl("instance", "show", INSTANCE)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[1:] == [["name", "ab"], ["spec.nics.0.type", "user"], ["spec.rng", "yes"]]


def test_console(ctl: Ctl) -> None:
    ctl.answers["console.log"] = succeed({"text": "boot\n\x1b[1mlogin: ", "truncated": False})
    result = ctl("instance", "console", INSTANCE, "--bytes", "100")
    assert result.stdout == "boot\n\x1b[1mlogin: "
    assert ctl.commands[0].data.max_bytes == 100
    document = json.loads(ctl("instance", "console", INSTANCE, "--json").stdout)
    assert document["result"]["text"].startswith("boot")


def test_console_follow_prints_only_what_is_new(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_console, "POLL_S", 0.001)
    texts = iter(["one\n", "one\ntwo\n", "two\nthree\n"])

    def answer(command: Command[Any]) -> list[Any]:
        text = next(texts, None)
        if text is None:
            return reject("not_found", "the instance is gone")(command)
        return succeed({"text": text, "truncated": text.startswith("two")})(command)

    ctl.answers["console.log"] = answer
    result = ctl("instance", "console", INSTANCE, "--follow")
    assert (result.stdout, result.exit_code) == ("one\ntwo\nthree\n", 1)


def test_host_ls(ctl: Ctl) -> None:
    ctl.then = lambda agent: agent.publish(heartbeat(), sequenced=False)
    result = ctl("host", "ls", "--wait-s", "5", "--host", HOST)
    assert result.exit_code == 0
    header, row = result.stdout.splitlines()
    assert header.split() == ["HOST", "STATE", "HYPERVISOR", "VCPUS", "MEMORY", "DISK", "INSTANCES", "AGE"]
    assert row.split()[:9] == [HOST, "up", "QEMU", "9.1.0", "3/28", "2/15.5", "GiB", "-", "3"]
    document = json.loads(ctl("host", "ls", "--wait-s", "5", "--host", HOST, "--json").stdout)
    assert document["hosts"][0]["data"]["hypervisor_type"] == "QEMU"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"enabled": False}, "disabled"),
        ({"healthy": False}, "unhealthy"),
        ({"hypervisor_connected": False}, "no hypervisor"),
    ],
)
def test_host_ls_says_what_is_wrong(ctl: Ctl, changes: dict[str, Any], state: str) -> None:
    ctl.then = lambda agent: agent.publish(heartbeat(**changes), sequenced=False)
    assert state in ctl("host", "ls", "--wait-s", "5", "--host", HOST).stdout


def test_no_heartbeat_ends_with_3(ctl: Ctl) -> None:
    result = ctl("host", "ls", "--wait-s", "0.1")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "error: no_heartbeat" in result.stderr


def test_host_commands(ctl: Ctl) -> None:
    ctl.answers |= {
        "host.ping": lambda c: succeed({"version": "9.9", "echo": c.data.echo})(c),
        "host.show": succeed({"heartbeat": heartbeat().model_dump(mode="json")}),
        "host.set-enabled": lambda c: succeed({"enabled": c.data.enabled, "changed": not c.data.enabled})(c),
    }
    assert ctl("host", "ping", HOST).stdout.startswith(f"{HOST} answers: version 9.9 (")
    shown = ctl("host", "show", HOST).stdout
    assert "hypervisor_version" in shown
    assert ["VCPU", "8", "1", "4.0", "3"] in [line.split() for line in shown.splitlines()]
    assert ctl("host", "disable", HOST, "--reason", "disk swap").stdout == f"{HOST} disabled\n"
    assert ctl("host", "enable", HOST).stdout == f"{HOST} was enabled already\n"
    assert ctl.commands[-2].data.model_dump() == {"enabled": False, "reason": "disk swap"}


def test_image_commands(ctl: Ctl) -> None:
    sha = "0" * 64
    view = {"sha256": sha, "format": "qcow2", "state": "ready", "size_bytes": 2**20, "disk_bytes": 2**20, "in_use_by": ["x"]}
    ctl.answers = {
        "image.list": succeed({"images": [view], "disk_bytes": 2**20, "limit_bytes": 2**30}),
        "image.prefetch": succeed({"changed": True}),
        "image.remove": succeed({"freed_bytes": 2**20}),
        "image.verify": succeed({"intact": False}),
    }
    listed = ctl("image", "ls", "--host", HOST)
    assert sha in listed.output
    assert "1.0 MiB of 1024.0 MiB used" in listed.output
    assert json.loads(ctl("image", "ls", "--host", HOST, "--json").output)["images"] == [view]
    url = "https://images.example/a"
    done = ctl("image", "prefetch", url, sha, "--host", HOST, "--format", "vmdk", "--compression", "xz")
    assert done.exit_code == 0, done.output
    image = ctl.commands[-1].data.image
    assert (image.url, image.sha256, image.format, image.compression) == (url, sha, "vmdk", "xz")
    assert ctl("image", "prefetch", url, sha, "--host", HOST, "--key", "k").exit_code == 2
    assert ctl("image", "prefetch", "ftp://x", sha, "--host", HOST).exit_code == 2
    assert "1.0 MiB are free" in ctl("image", "rm", sha, "--host", HOST).output
    assert ctl("image", "rm", "short", "--host", HOST).exit_code == 2
    assert ctl("image", "verify", sha, "--host", HOST).exit_code == 1


def test_operation_commands(ctl: Ctl) -> None:
    steps = [{"index": 0, "name": "claim", "state": "done"}]
    ctl.answers["operation.show"] = succeed({"id": "op-1", "state": "running", "error": None, "steps": steps})
    ctl.answers["operation.cancel"] = succeed({"operation_id": "op-1"})
    rows = [line.split() for line in ctl("operation", "show", "op-1").stdout.splitlines()]
    assert ["state", "running"] in rows
    assert ["0", "claim", "done"] in rows
    assert "will end as cancelled" in ctl("operation", "cancel", "op-1").stdout
    assert ctl.commands[1].data.operation_id == "op-1"


def _publish_three(agent: FakeAgent) -> None:
    agent.publish(heartbeat(), sequenced=False)
    agent.publish(InstanceRemoved(instance_id=INSTANCE, name="a\nb"), subject=INSTANCE)
    agent.sequence += 1
    agent.publish(InstanceRemoved(instance_id=INSTANCE, name="c"), subject=INSTANCE)


def test_events_as_lines(ctl: Ctl) -> None:
    ctl.then = _publish_three
    result = ctl("events", "--follow", "--count", "2")
    assert result.exit_code == 0
    one, gap, two = result.stdout.splitlines()
    assert one.endswith(f"{HOST}  instance.removed  {INSTANCE}  name=a b")
    assert gap == f"-- events 2 to 2 of host {HOST} are missing here"
    assert two.endswith("name=c")


def test_events_as_json_lines(ctl: Ctl) -> None:
    ctl.then = _publish_three
    result = ctl("events", "--count", "2", "--json", "--kind", "instance", "--instance", INSTANCE, "--host", HOST)
    assert [event["data"]["name"] for event in lines_of_json(result.stdout)] == ["a\nb", "c"]
    beat = ctl("events", "--count", "1", "--json", "--kind", "host.heartbeat").stdout
    assert lines_of_json(beat)[0]["type"] == "compute.host.heartbeat.v1"


def test_events_end_in_time(ctl: Ctl) -> None:
    assert ctl("--timeout", "0.02", "events").exit_code == 0
    result = ctl("--timeout", "0.02", "events", "--count", "1")
    assert (result.exit_code, "0 of 1 events" in result.stderr) == (3, True)


def test_an_interrupt_ends_with_130_and_names_the_operation(ctl: Ctl) -> None:
    def interrupt(_command: Command[Any]) -> list[Any]:
        raise KeyboardInterrupt

    ctl.answers["instance.start"] = interrupt
    result = ctl("instance", "start", INSTANCE, "--command-id", "c-1")
    assert (result.exit_code, result.stderr) == (130, "interrupted; operation c-1 goes on\n")


def test_exports_and_snapshots(ctl: Ctl) -> None:
    disk = {"name": "root", "format": "qcow2", "size_bytes": 4096, "sha256": "ab", "url": "file:///s/copy.qcow2"}
    ctl.answers["instance.export"] = succeed({"disks": [disk], "live": True})
    done = ctl("instance", "export", INSTANCE, "--store", "main", "--name", "copy", "--disk", "root")
    assert done.exit_code == 0, done.output
    assert "file:///s/copy.qcow2" in done.output
    wrong = ctl("instance", "export", INSTANCE, "--store", "main")
    assert wrong.exit_code == 2
    assert "store and name belong together" in wrong.output
    ctl.answers["snapshot.create"] = succeed({"snapshot": {"name": "one", "power": "running", "memory": True}})
    assert "one" in ctl("snapshot", "create", INSTANCE, "one").output
    assert ctl("snapshot", "create", INSTANCE, "../one").exit_code == 2
    ctl.answers["snapshot.revert"] = succeed({"observed": "paused"})
    assert "is back at one, now paused" in ctl("snapshot", "revert", INSTANCE, "one", "--no-start").output
    backup = {"name": "vm-daily-1", "store": "main", "taken_at": "2026-01-01T00:00:00Z", "disks": [disk]}
    ctl.answers["instance.backup"] = succeed({"backups": [backup], "removed": ["vm-daily-0"]})
    done = ctl("instance", "backup", INSTANCE, "--series", "daily", "--keep", "1", "--store", "main")
    assert "removed vm-daily-0" in done.output
    ctl.answers["instance.list-backups"] = succeed({"backups": [backup]})
    assert json.loads(ctl("instance", "backups", INSTANCE, "--json").output)["result"]["backups"] == [backup]
def test_a_memory_dump_is_described(ctl: Ctl) -> None:
    dump = {"instance_id": INSTANCE, "path": "/d/one.raw", "format": "raw", "size_bytes": 7, "sha256": "0" * 64}
    ctl.answers["instance.memory-dump"] = succeed(dump)
    result = ctl("instance", "memory-dump", INSTANCE, "--format", "raw", "--paused")
    assert result.exit_code == 0
    assert "/d/one.raw" in result.stdout
    [command] = ctl.commands
    assert command.data.model_dump() == {"format": "raw", "live": False}


def test_a_policy_is_changed_by_name(ctl: Ctl) -> None:
    ctl.answers["instance.set-policy"] = succeed({"spec": {"policy": {"on_stop": "restart"}}})
    result = ctl("instance", "set-policy", INSTANCE, "--on-stop", "restart")
    assert result.exit_code == 0
    assert "restart" in result.stdout
    [command] = ctl.commands
    assert command.data.model_dump(exclude_none=True) == {"on_stop": "restart"}
    assert ctl("instance", "set-policy", INSTANCE).exit_code == 2


def test_rebuild_rescue_shelf_and_restore(ctl: Ctl) -> None:
    image = ["--image", "file:///images/a.qcow2", "--sha256", "a" * 64]
    for verb, arguments in {
        "rebuild": image,
        "rescue": image,
        "unrescue": ["--force"],
        "shelve": ["--store", "main", "--name", "one"],
        "unshelve": ["--keep-exports"],
        "restore": [],
    }.items():
        ctl.answers[f"instance.{verb}"] = succeed({"observed": "running"})
        done = ctl("instance", verb, INSTANCE, *arguments)
        assert done.exit_code == 0, done.output
        assert "now running" in done.output
    assert [command.data.image.format for command in ctl.commands[:2]] == ["qcow2", "qcow2"]
    assert ctl("instance", "rebuild", INSTANCE, "--image", "ftp://x/y", "--sha256", "a" * 64).exit_code == 2
    wrong = ctl("instance", "shelve", INSTANCE, "--store", "main")
    assert wrong.exit_code == 2
    assert "store and name belong together" in wrong.output
    ctl.answers["instance.delete"] = succeed({"restore_until": "2030-01-01T00:00:00Z"})
    assert "can be restored" in ctl("instance", "rm", INSTANCE, "--restore-within", "60").output
    assert ctl("instance", "rm", INSTANCE, "--restore-within", "60", "--timeout", "5").exit_code == 0
    assert [command.data.timeout_s for command in ctl.commands[-2:]] == [60.0, 5.0]


def test_rebuild_and_rescue_take_all_that_an_image_has(ctl: Ctl, tmp_path: Path) -> None:
    signature = "A" * 86 + "=="
    flags = ["--image", "http://x/a.raw.xz", "--sha256", "a" * 64, "--format", "raw", "--compression", "xz"]
    flags += ["--max-size-mib", "7", "--key", "main", "--signature", signature]
    seed = tmp_path / "seed.yaml"
    seed.write_text("hostname: anew\nuser_data: |\n  #cloud-config\n")
    for verb, more in {"rebuild": ["--seed", str(seed)], "rescue": []}.items():
        ctl.answers[f"instance.{verb}"] = succeed({"observed": "running"})
        done = ctl("instance", verb, INSTANCE, *flags, *more)
        assert done.exit_code == 0, done.output
        assert ctl.commands[-1].data.image.model_dump() == {
            "url": "http://x/a.raw.xz", "sha256": "a" * 64, "format": "raw", "max_size_mib": 7, "compression": "xz",
            "signature": {"key": "main", "ed25519": signature},
        }  # fmt: skip
    rebuild = ctl.commands[0].data
    assert (rebuild.seed.hostname, rebuild.seed.user_data) == ("anew", "#cloud-config\n")
    lonely = ctl("instance", "rescue", INSTANCE, *flags[:4], "--key", "main")
    assert (lonely.exit_code, "belong together" in lonely.output) == (2, True)
    seed.write_text("hostname: anew\nuser: me\n")
    wrong = ctl("instance", "rebuild", INSTANCE, *flags, "--seed", str(seed))
    assert (wrong.exit_code, "seed.yaml:2: user: no such field" in wrong.output) == (2, True)
    assert len(ctl.commands) == 2, "nothing wrong was sent"
