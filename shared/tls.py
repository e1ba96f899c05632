"""TLS of a gRPC server: certificate files, checked at start and read again when they change.

With a `ca`, clients must show a certificate that it signed (mutual TLS).
"""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from shared.settings import SettingsError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate chain, its key, and the CA of the other side's certificates; all PEM.

    A server without `ca` takes any client; a client without a certificate shows none.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def check(self) -> None:
        """Raises SettingsError, naming the file, where these cannot work.

        A key without its certificate, files that are missing or no PEM, a key that is another
        certificate's, a certificate that has expired.
        """
        if (self.cert is None) != (self.key is None):
            raise SettingsError("a TLS certificate and its key are given both, or neither")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.cert is not None and self.key is not None:
            try:
                context.load_cert_chain(self.cert, self.key)
            except (ssl.SSLError, OSError) as error:
                raise SettingsError(
                    f"{self.cert} and {self.key} are no certificate and its key: {_words(error)}"
                ) from None
            _check_time(self.cert)
        if self.ca is not None:
            try:
                context.load_verify_locations(self.ca)
            except (ssl.SSLError, OSError) as error:
                raise SettingsError(f"{self.ca} is no CA certificate: {_words(error)}") from None
            _check_time(self.ca)

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Contents of ca, key and cert, in gRPC's order."""
        files = (self.ca, self.key, self.cert)
        ca, key, cert = (None if path is None else path.read_bytes() for path in files)
        return ca, key, cert

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """What changes when a file does."""
        found = [path.stat() for path in (self.cert, self.key, self.ca) if path is not None]
        return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files: a handshake after a change uses the new ones.

    Files that make no sense together, as in the middle of a change, leave the old ones in use.

    Raises:
        SettingsError: they make no sense at the start.
    """
    files.check()
    stamp = files.stamp()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal stamp
        try:
            found = files.stamp()
            if found == stamp:
                return None
            stamp = found
            files.check()
            configuration = _configuration(files)
        except (SettingsError, OSError) as error:
            structlog.get_logger().error("tls_files_unusable", problem=str(error))
            return None
        structlog.get_logger().info("tls_files_read")
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        _configuration(files),
        changed,  # type: ignore[arg-type]  # None leaves what is in use
        require_client_authentication=files.ca is not None,
    )


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """The same for servers that are not gRPC's: each handshake uses the files as they are then.

    Raises:
        SettingsError: they make no sense at the start.
    """
    stamp, context = files.stamp(), _context(files)
    current = context

    def follow(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        nonlocal stamp, current
        try:
            found = files.stamp()
            if found != stamp:
                stamp, current = found, _context(files)
                structlog.get_logger().info("tls_files_read")
        except (SettingsError, OSError) as error:
            structlog.get_logger().error("tls_files_unusable", problem=str(error))
        connection.context = current

    context.sni_callback = follow
    return context


def _context(files: TlsFiles) -> ssl.SSLContext:
    files.check()
    assert files.cert is not None, "a server without a certificate has no TLS"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    if files.ca is not None:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    ca, key, cert = files.read()
    assert key is not None, "a server's certificate was read without its key"
    assert cert is not None, "a server without a certificate has no TLS"
    return grpc.ssl_server_certificate_configuration([(key, cert)], ca)


def _check_time(path: Path) -> None:
    from cryptography import x509  # a daemon without TLS does not wait for it

    certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        raise SettingsError(f"{path} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M}Z")
    if certificate.not_valid_before_utc > now:
        raise SettingsError(
            f"{path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M}Z only"
        )


def _words(error: ssl.SSLError | OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").lower().replace("_", " ")
    return error.strerror or str(error)
