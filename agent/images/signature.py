"""Signatures of images: Ed25519 over the 32 bytes of the sha256, by a key that the host trusts.

The checksum in the command vouches for the bytes, the signature for the checksum. So all is decided before
anything is downloaded. `cryptography` is loaded with the first signature.
"""

from __future__ import annotations

import base64
import binascii
import re

from agent.errors import ImageRejected

_KEY_BYTES = 32
# What every Ed25519 public key in PEM (SubjectPublicKeyInfo, RFC 8410) begins with.
_SPKI = bytes.fromhex("302a300506032b6570032100")
_PEM = re.compile(r"\s*-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----\s*")


def public_key(text: str) -> bytes:
    """Read a trusted key, base64 of its 32 bytes or PEM. Raises `ValueError` with a sentence."""
    pem = _PEM.fullmatch(text)
    try:
        raw = base64.b64decode("".join((pem[1] if pem else text).split()), validate=True)
    except binascii.Error as exc:
        raise ValueError("neither PEM nor base64") from exc
    if pem:
        raw = raw.removeprefix(_SPKI)
    if len(raw) != _KEY_BYTES:
        raise ValueError("not an Ed25519 public key, which has 32 bytes")
    return raw


def verify(key: bytes, signature: str, sha256: str) -> None:
    """Check a signature in base64. Loads its library: call it in a thread.

    Raises `ImageRejected` with code `image_signature_invalid`.
    """
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - loaded when needed
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(base64.b64decode(signature), bytes.fromhex(sha256))
    except (InvalidSignature, ValueError) as exc:
        raise ImageRejected(
            "the image's signature is not one of this key over this sha256", code="image_signature_invalid"
        ) from exc
