"""The configuration: file, environment over it, secrets over both; a wrong key is named with file and line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from agent import config
from agent.errors import InvalidArgument

GOOD = """\
[agent]
host = "node-1"

[bus]
url = "amqp://user:hunter2@broker/"
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os  # noqa: PLC0415

    for name in [*os.environ]:
        if name.startswith("COMPUTE_AGENT_") or name == "CREDENTIALS_DIRECTORY":
            monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str | bytes) -> config.Settings:
        path = tmp_path / "agent.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load(path)

    return load


def refused(load: Any, text: str | bytes) -> str:
    with pytest.raises(InvalidArgument) as caught:
        load(text)
    assert caught.value.code == "bad_config"
    assert "hunter2" not in caught.value.message
    return caught.value.message


def test_a_small_file_is_enough(load: Any) -> None:
    settings = load(GOOD)
    assert settings.agent.host == "node-1"
    assert settings.agent.state_dir == Path("/var/lib/compute-agent")
    assert settings.bus.url == SecretStr("amqp://user:hunter2@broker/")
    assert "hunter2" not in repr(settings)
    assert settings.deadlines.build().query_s == 15.0
    assert settings.capacity.build().cpu_allocation_ratio == 4.0


@pytest.mark.parametrize(
    ("text", "line", "key", "sentence"),
    [
        (GOOD + "\n[agent2]\nx = 1\n", 7, "agent2", "no such key"),
        (GOOD + "\n[lanes]\nquery = 1\npwoer = 2\n", 9, "lanes.pwoer", "no such key"),
        (GOOD.replace('host = "node-1"', 'host = "node-1"\nhots = "x"'), 3, "agent.hots", "no such key"),
        (GOOD + "\n[threads]\n# a comment\nquery = 0\n", 9, "threads.query", "greater than or equal to 1"),
        (GOOD + '\n[threads]\nquery = "many"\n', 8, "threads.query", "integer"),
        (GOOD + "\n[deadlines]\nquery_s = -1\n", 8, "deadlines.query_s", "greater than 0"),
        (GOOD + '\n[log]\nlevel = "loud"\n', 8, "log.level", "debug"),
        (GOOD + "\nlanes.query = 0\n", 7, "lanes.query", ""),
        (GOOD + "\n[images]\nmax_size_mib = 0\n", 8, "images.max_size_mib", "greater than or equal to 1"),
        ('[agent]\nhost = "a b"\n[bus]\nurl = "amqp://x/"\n', 2, "agent.host", "pattern"),
        ('[bus]\nurl = "http://hunter2"\n', 2, "bus.url", "amqp"),
        ('[agent]\nhost = "x"\n[bus]\n', 3, "bus.url", "needed and not set"),
        ('[bus]\nurl = "amqp://x/"\ncertfile = "c"\n', 1, "bus", "amqps"),
    ],
)
def test_a_wrong_key_is_named_with_file_and_line(load: Any, text: str, line: int, key: str, sentence: str) -> None:
    if text.startswith(GOOD + "\nlanes."):
        text = "lanes.query = 0\n" + GOOD
        line = 1
    message = refused(load, text)
    assert f"agent.toml:{line}: {key}" in message
    assert sentence in message


def test_every_wrong_key_is_named_at_once(load: Any) -> None:
    message = refused(load, GOOD + "\n[lanes]\nquery = 0\nx = 1\n[log]\nlevel = 7\n")
    assert len(message.splitlines()) == 3


def test_without_a_bus_there_is_no_line_to_name(load: Any) -> None:
    assert "agent.toml: bus: this key is needed" in refused(load, '[agent]\nhost = "x"\n')


def test_all_is_no_host(load: Any) -> None:
    assert "reserved" in refused(load, GOOD.replace("node-1", "all"))


@pytest.mark.parametrize("text", [b"\xff\xfe", "[agent", "a = ", "[agent]\nhost = 'x'\nhost = 'y'\n"])
def test_what_is_no_toml(load: Any, text: str | bytes) -> None:
    assert "agent.toml" in refused(load, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(InvalidArgument) as caught:
            config.load(path)
        assert str(path) in caught.value.message


def test_the_environment_is_over_the_file(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_AGENT_AGENT__HOST", "from-env")
    monkeypatch.setenv("COMPUTE_AGENT_LANES__QUERY", "3")
    monkeypatch.setenv("COMPUTE_AGENT_DRIVER__SETTINGS", '{"cpus": 7}')
    settings = load(GOOD + "\n[lanes]\nquery = 9\npower = 9\n[driver]\nname = 'fake'\n")
    assert settings.agent.host == "from-env"
    assert (settings.lanes.query, settings.lanes.power) == (3, 9)
    assert settings.driver.name == "fake"
    assert settings.driver.settings == {"cpus": 7}


def test_a_wrong_value_from_the_environment_is_told(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_AGENT_LANES__QUERY", "0")
    assert "lanes.query" in refused(load, GOOD)


def test_a_wrong_key_from_the_environment_is_told(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_AGENT_LANES__QUREY", "1")
    assert "qurey" in refused(load, GOOD).lower()


@pytest.mark.parametrize("variable", ["COMPUTE_AGENT_SECRETS_DIR", "CREDENTIALS_DIRECTORY"])
def test_secrets_are_over_all(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "bus__url").write_text("amqp://user:secret@elsewhere/\n")
    monkeypatch.setenv(variable, str(folder))
    monkeypatch.setenv("COMPUTE_AGENT_BUS__URL", "amqp://env/")
    settings = load(GOOD)
    assert settings.bus.url == SecretStr("amqp://user:secret@elsewhere/")
    assert settings.agent.host == "node-1"


def test_a_secrets_folder_that_is_missing_is_told(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTE_AGENT_SECRETS_DIR", str(tmp_path / "nowhere"))
    assert "nowhere" in refused(load, GOOD)


def test_the_reference_names_every_key_and_is_a_valid_file(load: Any) -> None:
    text = config.document()
    raw = tomllib.loads(text)
    assert set(raw) >= {"agent", "bus", "driver", "lanes", "health", "log"}
    for name, field in config.Settings.model_fields.items():
        for key in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"\n# {key} = " in text or f"\n{key} = " in text, f"{name}.{key} is not documented"
    settings = load(text.replace('url = ""  # needed', 'url = "amqp://x/"'))
    assert settings.lanes == config.LanesSection()
    assert settings.deadlines == config.DeadlinesSection()
