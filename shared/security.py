"""What a daemon asks of its callers, and where it may listen because of it.

Off loopback a daemon listens only with TLS and a way to know who calls (API keys, or certificates
of a CA), unless it is told `--insecure`.
"""

from dataclasses import dataclass, field

import grpc

from shared.auth import ApiKeys
from shared.channels import PeerSecurity, is_loopback
from shared.settings import Settings, SettingsError
from shared.tls import TlsFiles, server_credentials


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """The security of a server.

    Args:
        tls: with a certificate the server speaks TLS, with a CA too it asks for clients' ones.
        api_keys: None where calls need none.
        is_insecure: leaves out what `check_listen` checks.
    """

    tls: TlsFiles = field(default_factory=TlsFiles)
    api_keys: ApiKeys | None = None
    is_insecure: bool = False

    @staticmethod
    def load(settings: Settings) -> "ServerSecurity":
        """What the settings say; files are read and checked now.

        Raises:
            SettingsError: a file is missing or wrong, or settings contradict each other.
        """
        tls = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_ca)
        tls.check()
        if tls.ca is not None and tls.cert is None:
            raise SettingsError("--tls-ca checks clients within TLS: give --tls-cert and --tls-key")
        keys = None if settings.api_keys is None else ApiKeys(settings.api_keys)
        return ServerSecurity(tls, keys, settings.insecure)

    def check_listen(self, host: str) -> None:
        """Raises SettingsError where calls to `host` are not protected enough."""
        knows_callers = self.api_keys is not None or self.tls.ca is not None
        if self.is_insecure or is_loopback(host) or (self.tls.cert and knows_callers):
            return
        raise SettingsError(
            f"{host} can be reached from other machines: give --tls-cert, --tls-key and --api-keys "
            "(or --tls-ca), listen on 127.0.0.1, or say --insecure"
        )

    def check_metrics_listen(self, host: str) -> None:
        """Raises SettingsError where metrics would leave the machine in plaintext."""
        if self.is_insecure or is_loopback(host) or self.tls.cert:
            return
        raise SettingsError(
            f"metrics at {host} can be read from other machines: give --tls-cert and --tls-key, "
            "listen on 127.0.0.1, or say --insecure"
        )

    def credentials(self) -> grpc.ServerCredentials | None:
        """The server's TLS, None where it has none."""
        return None if self.tls.cert is None else server_credentials(self.tls)


def peer_security(settings: Settings) -> PeerSecurity:
    """How the daemon calls others, as the settings say.

    Raises:
        SettingsError: a file is missing or wrong.
    """
    tls = TlsFiles(settings.peer_tls_cert, settings.peer_tls_key, settings.peer_tls_ca)
    return PeerSecurity.load(tls, settings.peer_api_key_file, settings.insecure)
