"""Structured logs: one JSON object per line on stdout. Never a secret, never a whole message body."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog

_URL_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^/@\s:]*:)[^\s]*@")
_SECRET_KEYS = frozenset({"password", "secret", "token", "user_data", "meta_data", "ssh_keys", "body"})


def mask_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take passwords out of URLs and values out of keys that hold secrets."""
    for key, value in event.items():
        event[key] = "***" if key in _SECRET_KEYS else _masked(value)
    return event


def _masked(value: Any) -> Any:
    """Mask at any depth, in a copy: what is logged is still in use."""
    if isinstance(value, str):
        return _URL_PASSWORD.sub(r"\g<head>***@", value) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: "***" if key in _SECRET_KEYS else _masked(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(inner) for inner in value]
    return value


def configure(level: str = "info", *, stream: TextIO | None = None) -> None:
    """Set up structlog, and pass the standard library's loggers (aio-pika, aiormq) through it. Idempotent."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        mask_secrets,
    ]
    out = stream or sys.stdout
    structlog.configure(
        processors=[_logger_name, *shared, structlog.processors.JSONRenderer(serializer=_dump)],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=_Factory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(serializer=_dump),
            ],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.WARNING))
    # Each failed attempt to connect is an error to it; `agent.bus` and `agent.app` say the same in one line.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)


class _NamedLogger(structlog.PrintLogger):
    """A print logger that remembers the name it was asked for under."""

    def __init__(self, file: TextIO, name: str) -> None:
        super().__init__(file)
        self.name = name


class _Factory:
    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, *args: Any) -> _NamedLogger:
        return _NamedLogger(self._out, str(args[0]) if args else "agent")


def _logger_name(logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["logger"] = getattr(logger, "name", "agent")
    return event


def _dump(value: Any, **_kwargs: Any) -> str:
    return json.dumps(value, default=lambda other: _masked(str(other)), ensure_ascii=False, separators=(",", ":"))
