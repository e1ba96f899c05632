"""Certificates for tests, made by the command that users make theirs with."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from millrace.cli.certs import make_certs

from shared.tls import TlsFiles


def made_in(folder: Path, client: str = "client") -> Path:
    """`folder` with ca, server and client files of a fresh CA."""
    make_certs(folder, (), client, 5)
    return folder


def server_files(folder: Path, with_ca: bool = False) -> TlsFiles:
    """The server's files in `folder`; `with_ca` asks for clients' certificates."""
    ca = folder / "ca.crt" if with_ca else None
    return TlsFiles(folder / "server.crt", folder / "server.key", ca)


def client_options(folder: Path, with_cert: bool = False) -> dict[str, str]:
    """What `Client` takes to trust the CA in `folder`, and to show its client certificate."""
    options = {"tls_ca": str(folder / "ca.crt")}
    if with_cert:
        options |= {"tls_cert": str(folder / "client.crt"), "tls_key": str(folder / "client.key")}
    return options


def let_expire(path: Path, ca_folder: Path) -> None:
    """Replaces the certificate at `path` by one of the same key that ended yesterday."""
    old = x509.load_pem_x509_certificate(path.read_bytes())
    ca_key = serialization.load_pem_private_key((ca_folder / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    content = builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    path.write_bytes(content)
