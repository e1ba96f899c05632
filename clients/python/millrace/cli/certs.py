"""`millrace certs`: a development CA, a server's and a client's certificate, a signing key.

For trying things out and for closed networks: in production the certificates come from your own CA.
"""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from millrace.cli import output
from millrace.cli.failures import CommandFailed

_HOSTS = ("localhost", "127.0.0.1", "::1")
_FILES = (
    "ca.crt", "ca.key", "server.crt", "server.key", "client.crt", "client.key", "signing.key",
    "signing.pub",
)  # fmt: skip
# Clocks differ: what was just made is valid on a machine that is a little behind.
_SKEW = timedelta(minutes=5)


def make_certs(
    folder: Path, hosts: Sequence[str], client: str, days: int, *, as_json: bool = False
) -> None:
    """Writes ca, server and client certificates and keys to `folder`; a CA there is used again.

    Args:
        hosts: names and addresses that the server has beside loopback's.
        client: the client's name; its tenant, where certificates alone say who calls.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, ca = _authority(folder, days)
    names = [_host(host) for host in dict.fromkeys((*_HOSTS, *hosts))]
    for name, alternatives, usage in (
        ("server", names, ExtendedKeyUsageOID.SERVER_AUTH),
        ("client", [x509.DNSName(client)], ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        common_name = client if name == "client" else "Millrace server"
        builder = (
            _builder(common_name, ca.subject, key, days)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
        )
        _write(folder / name, builder.sign(ca_key, hashes.SHA256()), key)
    _signing_key(folder)
    if as_json:
        output.print_json({"folder": str(folder), "files": [*_FILES], "days": days})
        return
    output.say(
        f"wrote ca, server, client (.crt, .key) and signing (.key, .pub) to {folder}; keep ca.key "
        "and signing.key where no daemon is"
    )


def _signing_key(folder: Path) -> None:
    if (folder / "signing.key").exists():
        return
    key = Ed25519PrivateKey.generate()
    write_private(folder / "signing.key", _private_pem(key))
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / "signing.pub").write_bytes(public)


def _authority(folder: Path, days: int) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    if (folder / "ca.key").exists():
        try:
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except (ValueError, TypeError, OSError) as error:
            raise CommandFailed(f"{folder} holds no usable CA: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
            raise CommandFailed(f"ca.key and ca.crt in {folder} do not belong together")
        return key, ca
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Millrace development CA")
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    ca = (
        _builder("Millrace development CA", name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca", ca, key)
    return key, ca


def _builder(
    common_name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    write_private(path.with_name(f"{path.name}.key"), _private_pem(key))
    content = certificate.public_bytes(serialization.Encoding.PEM)
    path.with_name(f"{path.name}.crt").write_bytes(content)


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def write_private(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`, whole or not at all, for its owner's eyes alone."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
