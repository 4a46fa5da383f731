"""Signatures are decided before anything is fetched, and keys are read when the configuration is."""

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from agent.errors import ImageRejected
from agent.images.cache import ImageCache
from agent.images.policy import ImagePolicy
from agent.images.signature import public_key
from agent.messages.spec import ImageSource

DATA = bytes(range(256)) * 64
SHA = hashlib.sha256(DATA).hexdigest()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
RAW = KEY.public_key().public_bytes_raw()
PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def ignore(_done, _total):
    pass


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "sources" / "a.raw"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


def source_of(path, signer=KEY, key="publisher", signed=SHA):
    signature = None
    if signer is not None:
        signature = {"key": key, "ed25519": base64.b64encode(signer.sign(bytes.fromhex(signed))).decode()}
    return ImageSource.model_validate({"url": f"file://{path}", "sha256": SHA, "format": "raw", "signature": signature})


def cache_of(tmp_path, image, text=None, **settings):
    keys = {"publisher": text or base64.b64encode(RAW).decode()}
    return ImageCache(tmp_path / "cache", ImagePolicy(file_roots=[image.parent], trusted_keys=keys, **settings))


@pytest.mark.parametrize("text", [base64.b64encode(RAW).decode(), PEM, f"\n  {PEM}\n"], ids=["base64", "pem", "padded"])
async def test_a_good_signature(tmp_path, image, text):
    cache = cache_of(tmp_path, image, text, require_signature=True)
    assert (await cache.prepare(source_of(image), ignore)).sha256 == SHA


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"signer": None}, "image_unsigned"),
        ({"key": "nobody"}, "image_key_unknown"),
        ({"signer": STRANGER}, "image_signature_invalid"),
        ({"signed": "0" * 64}, "image_signature_invalid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("cached", [False, True])
async def test_refused_before_a_byte_is_read(tmp_path, image, monkeypatch, more, code, cached):
    if cached:
        await cache_of(tmp_path, image).prepare(source_of(image), ignore)
    monkeypatch.setattr("agent.images.download.open_source", None)
    with pytest.raises(ImageRejected) as caught:
        await cache_of(tmp_path, image, require_signature=True).prepare(source_of(image, **more), ignore)
    assert caught.value.code == code


async def test_a_bad_signature_counts_where_none_is_needed(tmp_path, image):
    with pytest.raises(ImageRejected) as caught:
        await cache_of(tmp_path, image).prepare(source_of(image, STRANGER), ignore)
    assert caught.value.code == "image_signature_invalid"


@pytest.mark.parametrize("text", ["", "x", "AAAA", base64.b64encode(bytes(33)).decode(), "*" * 44, PEM.replace("MCow", "MCox")])
def test_a_key_that_is_none_stops_the_start(text):
    with pytest.raises(ValueError):
        public_key(text)
    with pytest.raises(ValidationError, match="publisher: "):
        ImagePolicy(trusted_keys={"publisher": text})
