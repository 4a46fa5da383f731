"""Logs: one JSON object per line, and never a secret."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
import structlog

from agent import log


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_one_json_object_per_line(logs: io.StringIO) -> None:
    structlog.get_logger("part").info("something.happened", number=3, text="two\nlines", path=object)
    logging.getLogger("foreign").warning("theirs: %s", "x")
    ours, theirs = lines(logs)
    assert (ours["event"], ours["number"], ours["text"], ours["logger"], ours["level"]) == (
        "something.happened", 3, "two\nlines", "part", "info",
    )  # fmt: skip
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["logger"], theirs["level"]) == ("theirs: x", "foreign", "warning")


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:hunter2@host/vhost", "amqps://user:hunter2@host", "http://u:hunter2@h/p?q=1", "amqp://:hunter2@host",
        "amqp://user:p@hunter2@host/", "amqp://user:hunter2/x@host", "mongodb+srv://u:hunter2@h",
    ],
)  # fmt: skip
def test_passwords_in_urls_are_masked(logs: io.StringIO, url: str) -> None:
    logger = structlog.get_logger("x")
    logger.info("connecting", url=url, sentence=f"cannot reach {url}: refused")
    sentence = f"cannot reach {url}"
    logger.info(sentence)
    logging.getLogger("aiormq").error("cannot reach %s", url)
    logging.getLogger("aiormq").error("cannot reach %r", {"url": url})
    try:
        raise ValueError(f"cannot reach {url}")
    except ValueError:
        logger.exception("failed")
        logging.getLogger("aiormq").exception("failed")
    text = logs.getvalue()
    assert "hunter2" not in text
    assert "host" in text or "@h" in text


@pytest.mark.parametrize("key", ["password", "secret", "token", "user_data", "meta_data", "ssh_keys", "body"])
def test_keys_that_hold_secrets_are_masked_at_any_depth(logs: io.StringIO, key: str) -> None:
    structlog.get_logger("x").info("event", **{key: "hunter2"})
    structlog.get_logger("x").info("event", spec={"seed": {key: "hunter2"}}, many=[{key: ["hunter2"]}])
    assert "hunter2" not in logs.getvalue()
    assert lines(logs)[0][key] == "***"


def test_urls_inside_other_values_are_masked(logs: io.StringIO) -> None:
    structlog.get_logger("x").info("event", settings={"bus": ["amqp://u:hunter2@h/"]}, pair=("amqp://u:hunter2@h/",))
    assert "hunter2" not in logs.getvalue()


def test_masking_changes_nothing_of_the_caller_s(logs: io.StringIO) -> None:
    spec = {"seed": {"user_data": "hunter2"}}
    structlog.get_logger("x").info("event", spec=spec)
    assert spec == {"seed": {"user_data": "hunter2"}}


def test_an_exception_is_told_with_its_traceback(logs: io.StringIO) -> None:
    try:
        raise RuntimeError("why")
    except RuntimeError:
        structlog.get_logger("x").exception("failed")
    (line,) = lines(logs)
    assert line["level"] == "error"
    assert "RuntimeError: why" in line["exception"]


def test_the_level_holds_and_can_be_changed(logs: io.StringIO) -> None:
    logger = structlog.get_logger("x")
    log.configure("warning", stream=logs)
    logger.info("quiet")
    log.configure("debug", stream=logs)
    logger.debug("loud")
    assert [line["event"] for line in lines(logs)] == ["loud"]


def test_configuring_twice_does_not_say_everything_twice(logs: io.StringIO) -> None:
    log.configure("info", stream=logs)
    logging.getLogger("foreign").error("once")
    assert len(lines(logs)) == 1


def test_context_is_carried(logs: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(operation="op-1"):
        structlog.get_logger("x").info("event")
        logging.getLogger("foreign").error("theirs")
    assert [line["operation"] for line in lines(logs)] == ["op-1", "op-1"]
