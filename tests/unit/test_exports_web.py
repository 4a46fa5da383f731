"""Uploads by PUT: what is tried again, what is refused, where data never go."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from support.uploads import Uploads

from agent.errors import ComputeError, FailedPrecondition, InvalidArgument, Unavailable
from agent.exports import web
from agent.exports.policy import ExportPolicy

DATA = os.urandom(3 * 1024 * 1024 + 17)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "export.qcow2"
    path.write_bytes(DATA)
    return path


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PAUSE_S", 0.01)


def policy(**changes: object) -> ExportPolicy:
    return ExportPolicy.model_validate({"allowed_hosts": ["127.0.0.1"], **changes})


async def put(file: Path, url: str, **changes: object) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    await web.put(file, url, policy(**changes), lambda done, total: seen.append((done, total)))
    return seen


async def refused(kind: type[ComputeError], file: Path, url: str, **changes: object) -> str:
    with pytest.raises(kind) as caught:
        await put(file, url, **changes)
    assert type(caught.value) is kind
    return caught.value.code


@pytest.mark.parametrize("answers", [[], [503], [0], [500, 429]], ids=["once", "busy", "cut", "twice"])
async def test_the_whole_is_sent_again(file: Path, answers: list[int]) -> None:
    async with Uploads(answers=list(answers)) as server:
        seen = await put(file, server.url("a/b"))
        assert server.received == {"a/b": hashlib.sha256(DATA).hexdigest()}
        assert server.lengths == [len(DATA)] * (len(answers) + 1)
        assert seen[-1] == (len(DATA), len(DATA))


async def test_it_gives_up(file: Path) -> None:
    async with Uploads(answers=[503, 503]) as server:
        assert await refused(Unavailable, file, server.url("a"), attempts=2) == "export_unavailable"
        assert server.answers == []
    assert await refused(Unavailable, file, server.url("a"), attempts=1) == "export_unavailable"


async def test_a_refusal_is_not_repeated(file: Path) -> None:
    async with Uploads(answers=[403]) as server:
        assert await refused(FailedPrecondition, file, server.url("a")) == "export_refused"
        assert len(server.requests) == 1


async def test_redirects_stay_with_the_server(file: Path) -> None:
    async with Uploads() as other, Uploads(answers=[307], location="/elsewhere") as server:
        await put(file, server.url("a"))
        assert list(server.received) == ["elsewhere"]
        server.answers, server.location = [307], other.url("stolen")
        assert await refused(InvalidArgument, file, server.url("a")) == "export_target_forbidden"
        assert other.requests == []
        server.answers, server.location = [302], "/a"
        assert await refused(FailedPrecondition, file, server.url("a")) == "export_refused"
        server.answers, server.location = [307] * 9, "/round"
        assert await refused(InvalidArgument, file, server.url("a")) == "export_target_forbidden"


async def test_a_server_that_takes_nothing(file: Path) -> None:
    taken = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.set()
        await asyncio.sleep(30)
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a"
    assert await refused(Unavailable, file, url, attempts=1, stall_timeout_s=0.3) == "export_unavailable"
    await taken.wait()
    server.close()


@pytest.mark.parametrize(
    "url",
    ["http://example.org/x", "http://user@127.0.0.1/x", "http://127.0.0.1.example.org/x", "http://127.0.0.1:x/", "http://[/x"],
    ids=["host", "user", "suffix", "port", "broken"],
)
async def test_targets_that_are_not_allowed(file: Path, url: str) -> None:
    assert await refused(InvalidArgument, file, url) == "export_target_forbidden"


async def test_addresses_that_are_not_public(file: Path) -> None:
    async with Uploads() as server:
        code = await refused(InvalidArgument, file, server.url("a"), allow_private_addresses=False)
        assert code == "export_target_forbidden"
        assert server.requests == []


async def test_no_rule_means_nowhere(file: Path) -> None:
    assert await refused(InvalidArgument, file, "http://127.0.0.1/x", allowed_hosts=[]) == "export_target_forbidden"


async def test_what_was_put_can_be_deleted(file: Path) -> None:
    async with Uploads() as server:
        await put(file, server.url("a"))
        assert await web.delete(server.url("a"), policy())
        assert server.received == {}
