"""Which sources are refused before, and which while, they are opened."""

import os
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from agent.errors import ImageRejected, Unavailable
from agent.images.fetch import open_source
from agent.images.policy import ImagePolicy, check_source, is_public_address, public_url


def code_of(policy, url):
    with pytest.raises(ImageRejected) as caught:
        check_source(policy, url)
    assert not caught.value.retryable
    return caught.value.code


async def read(url, policy):
    data = b""
    async with open_source(url, policy) as stream:
        while chunk := await stream.read():
            data += chunk
    return data


async def refusal(url, policy):
    with pytest.raises(ImageRejected) as caught:
        await read(url, policy)
    return caught.value.code


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"allowed_schemes": ["https"]}, "http://images.test/a"),
        ({"allowed_schemes": ["https"]}, "file:///a"),
        ({}, "ftp://images.test/a"),
        ({}, "http:///a"),
        ({}, "http://user:secret@images.test/a"),
        ({}, "file://elsewhere/a"),
        ({}, "http://[::1/a"),
        ({"allowed_hosts": ["images.test"]}, "http://other.test/a"),
        ({"allowed_hosts": ["images.test"]}, "http://sub.images.test/a"),
        ({"allowed_hosts": [".images.test"]}, "http://evilimages.test/a"),
        ({"allowed_hosts": [".images.test"]}, "http://images.test/a"),
    ],
)
def test_forbidden_by_its_url(settings, url):
    assert code_of(ImagePolicy(**settings), url) == "image_source_forbidden"


@pytest.mark.parametrize(
    ("hosts", "url"),
    [
        ([], "http://any.test/a"),
        (["images.test"], "https://IMAGES.test.:8443/a?b=c"),
        ([".images.test"], "http://a.b.images.test/a"),
    ],
)
def test_allowed_hosts(hosts, url):
    check_source(ImagePolicy(allowed_hosts=hosts), url)


def test_policy_names_an_unknown_setting():
    with pytest.raises(ValidationError, match="max_sise_mib"):
        ImagePolicy(max_sise_mib=1)


def test_lower_limit_wins():
    policy = ImagePolicy(max_size_mib=5)
    assert policy.max_bytes(None) == policy.max_bytes(7) == 5 * 2**20
    assert policy.max_bytes(2) == 2 * 2**20


def test_errors_show_no_secret_of_the_url():
    assert public_url("https://u:p@images.test:1/a?token=x#y") == "https://images.test:1/a"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1", "::1", "fe80::1%eth0", "fd00::1",
        "::ffff:10.0.0.1", "2002:0a00:0001::1", "64:ff9b::a00:1",
    ],
)  # fmt: skip
def test_private_addresses(address):
    assert not is_public_address(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public_address(address)


async def test_file_below_a_root_is_read(tmp_path):
    image = tmp_path / "a b.raw"
    image.write_bytes(b"x" * 3_000_000)
    policy = ImagePolicy(file_roots=[tmp_path])
    async with open_source(f"file://{tmp_path}/a%20b.raw", policy) as stream:
        assert stream.total == 3_000_000
    assert await read(f"file://{tmp_path}/a%20b.raw", policy) == image.read_bytes()


async def test_no_roots_means_no_files(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert await refusal(f"file://{tmp_path}/a", ImagePolicy()) == "image_source_forbidden"


async def test_outside_the_roots_nothing_is_told(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    policy = ImagePolicy(file_roots=[root])
    for name in ("../secret", "../absent", "%2e%2e/secret", "link", "loop", "", "a%00b"):
        assert await refusal(f"file://{root}/{name}", policy) == "image_source_forbidden", name


async def test_root_may_itself_be_a_symlink(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"x")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert await read(f"file://{tmp_path}/root/a", ImagePolicy(file_roots=[tmp_path / "root"])) == b"x"


async def test_missing_file(tmp_path):
    assert await refusal(f"file://{tmp_path}/absent", ImagePolicy(file_roots=[tmp_path])) == "image_missing"


async def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    policy = ImagePolicy(file_roots=[tmp_path])
    for name in ("fifo", "folder"):
        assert await refusal(f"file://{tmp_path}/{name}", policy) == "image_source_forbidden", name


async def test_symlink_that_appears_after_the_check_is_not_followed(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_bytes(b"secret")
    (root / "sub").symlink_to(tmp_path / "other")
    monkeypatch.setattr("agent.images.local.local_path", lambda _policy, _url: root / "sub" / "a")
    url = f"file://{root}/sub/a"
    assert await refusal(url, ImagePolicy(file_roots=[root])) == "image_source_forbidden"


async def test_file_that_shrinks_while_read_is_truncated(tmp_path):
    image = tmp_path / "a.raw"
    image.write_bytes(b"x" * 3_000_000)
    async with open_source(f"file://{image}", ImagePolicy(file_roots=[tmp_path])) as stream:
        assert await stream.read()
        os.truncate(image, 1_500_000)
        with pytest.raises(Unavailable) as caught:
            while await stream.read():
                pass
    assert caught.value.code == "image_truncated"
    assert caught.value.details == {"received_bytes": 1_500_000, "expected_bytes": 3_000_000}


async def test_descriptors_are_closed(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    policy = ImagePolicy(file_roots=[tmp_path])

    def open_files():
        found = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        return [name for name in found if name.startswith(str(tmp_path))]

    await read(f"file://{tmp_path}/a", policy)
    assert await refusal(f"file://{tmp_path}/nothing", policy) == "image_missing"
    # The stream's own thread closes the file after the last read; its end is the proof.
    for thread in threading.enumerate():
        if thread.name.startswith("image-read"):
            thread.join(timeout=10)
    assert open_files() == []
