"""`millrace certs` and `millrace keys`: what they keep, and what they refuse."""

import ipaddress
import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from millrace.cli.certs import make_certs
from millrace.cli.failures import NOT_FOUND, USAGE, CommandFailed
from millrace.cli.keys import create_key, list_keys, revoke_key

from tests.clients.command import millrace


def test_certs_keep_their_ca_and_name_the_hosts_that_are_asked_for(tmp_path: Path) -> None:
    """Run again, it renews certificates: whoever trusts the CA trusts the new ones."""
    make_certs(tmp_path, (), "client", 5)
    kept = {name: (tmp_path / name).read_bytes() for name in ("ca.crt", "ca.key", "signing.key")}
    make_certs(tmp_path, ("runtime.example.org", "192.0.2.7"), "acme", 5)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    ca, server, client = (
        x509.load_pem_x509_certificate((tmp_path / f"{name}.crt").read_bytes())
        for name in ("ca", "server", "client")
    )
    server.verify_directly_issued_by(ca)
    client.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "runtime.example.org" in names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    assert {ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("192.0.2.7")} <= {*addresses}
    for path in tmp_path.glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_certs_refuse_a_broken_ca_rather_than_replace_it(tmp_path: Path) -> None:
    make_certs(tmp_path, (), "client", 5)
    (tmp_path / "ca.crt").write_text("not a certificate")
    with pytest.raises(CommandFailed, match="no usable CA"):
        make_certs(tmp_path, (), "client", 5)


def test_keys_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for tenant, scopes in (("acme", ["generate", "root"]), ("acme", []), ("", ["generate"])):
        with pytest.raises(CommandFailed) as failed:
            create_key(path, tenant, scopes, {}, as_json=False)
        assert failed.value.exit_code == USAGE
    assert not path.exists()
    create_key(path, "acme", ["generate"], {}, as_json=True)
    with pytest.raises(CommandFailed) as failed:
        revoke_key(path, "0" * 12, as_json=False)
    assert failed.value.exit_code == NOT_FOUND
    path.write_text("[]")
    with pytest.raises(CommandFailed, match="is not a key file"):
        list_keys(path, as_json=False)


def test_limits_that_are_not_named_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key(path, "acme", ["generate"], {"concurrent": 4, "tokens_per_min": 100}, as_json=True)
    create_key(path, "acme", ["build"], {"concurrent": 8}, as_json=True)
    content = json.loads(path.read_text())
    assert content["tenants"] == {"acme": {"concurrent": 8, "tokens_per_min": 100}}
    assert len(content["keys"]) == 2


def test_programs_are_told_what_was_made_and_revoked(tmp_path: Path) -> None:
    made = json.loads(millrace(None, "certs", str(tmp_path / "tls"), "--json").stdout)
    assert {path.name for path in Path(made["folder"]).iterdir()} == set(made["files"])
    file = ("--file", str(tmp_path / "keys.json"), "--json")
    key = json.loads(millrace(None, "keys", "create", "acme", *file).stdout)
    revoked = json.loads(millrace(None, "keys", "revoke", key["id"], *file).stdout)
    assert revoked == {"id": key["id"], "is_revoked": True}
