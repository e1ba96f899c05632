"""`millrace sign`: vouches for an engine with a key that never leaves this machine."""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from millrace.cli import output
from millrace.cli.failures import USAGE, CommandFailed
from millrace.cli.loading import find_engine
from millrace.client import Client

# As the wire contract says; see `Signature`.
_PREFIX = b"millrace engine signature v1\n"


def sign(client: Client, name: str, quant: str, key_file: Path, *, as_json: bool) -> None:
    """Signs the engine that `name` means, and has the compile daemon keep the signature."""
    key = _private_key(key_file)
    engine = find_engine(client, name, quant)
    signature = key.sign(_PREFIX + engine.manifest.digest.encode())
    signed = client.sign_engine(engine.name, key.public_key().public_bytes_raw(), signature)
    if as_json:
        output.print_json(output.to_dict(signed))
    else:
        count = len(signed.signatures)
        output.print_line(f"signed {signed.name}; it has {count} signature{'s'[: count != 1]}")


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise CommandFailed(f"cannot read {path}: {error.strerror}", USAGE) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CommandFailed(
            f"{path} holds no private key in PEM, or one behind a password", USAGE
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise CommandFailed(f"{path} is not an Ed25519 key; `millrace certs` makes one", USAGE)
    return key
