"""Whose engines a daemon loads: Ed25519 signatures of an engine's manifest.

The manifest names every blob by its digest, so that a signature of its digest is one of all of the
engine. What is signed, and the keys' form, are part of the wire contract (`Signature`).
Source: RFC 8032, Ed25519.
"""

import hashlib
import re
from pathlib import Path

from shared.engine import EngineManifest, Signature
from shared.errors import EngineNotTrusted
from shared.settings import SettingsError

MAX_SIGNATURES = 16
_PREFIX = b"millrace engine signature v1\n"
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


def signed_bytes(manifest_digest: str) -> bytes:
    """What a signature of the engine with this manifest signs."""
    return _PREFIX + manifest_digest.encode()


def is_signature_of(signature: Signature, manifest_digest: str) -> bool:
    """Claims that the owner of the signature's key signed this manifest."""
    # Imported where it is wanted: most daemons start without it.
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(signature.public_key)
        key.verify(signature.signature, signed_bytes(manifest_digest))
    except (InvalidSignature, ValueError):
        return False
    return True


class TrustedKeys:
    """Public keys whose engines are loaded.

    Args:
        public_keys: raw, 32 bytes each.
    """

    def __init__(self, public_keys: frozenset[bytes]) -> None:
        self._public_keys = public_keys

    @staticmethod
    def load(path: Path) -> "TrustedKeys":
        """The keys in a file: one or more Ed25519 public keys in PEM, one after the other.

        Raises:
            SettingsError: there is no such file, or it holds something else.
        """
        try:
            found = _PEM.findall(path.read_bytes())
        except OSError as error:
            raise SettingsError(f"cannot read trusted keys {path}: {error.strerror}") from None
        if not found:
            raise SettingsError(f"{path} holds no public key (PEM)")
        return TrustedKeys(frozenset(_raw(path, pem) for pem in found))

    def check(self, engine: EngineManifest) -> None:
        """Returns where one of the keys signed `engine`.

        Raises:
            EngineNotTrusted: it has no signature, or only others'.
        """
        trusted = [s for s in engine.signatures if s.public_key in self._public_keys]
        if any(is_signature_of(signature, engine.manifest.digest) for signature in trusted):
            return
        problem = "it is not signed"
        if trusted:
            problem = "its signature is not one of this engine"
        elif engine.signatures:
            signers = ", ".join(sorted({_short(s.public_key) for s in engine.signatures}))
            problem = f"only keys that are not trusted signed it ({signers})"
        raise EngineNotTrusted(engine=engine.name, problem=problem)


def _raw(path: Path, pem: bytes) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"{path} holds a broken public key: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SettingsError(f"{path} holds a public key that is not Ed25519")
    return key.public_bytes_raw()


def _short(public_key: bytes) -> str:
    """How people tell keys apart: the first digits of the key's SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:12]
