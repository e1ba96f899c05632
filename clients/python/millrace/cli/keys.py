"""`millrace keys`: API keys in a file that daemons read; what is kept of a key is a hash.

The form of the file is written down in shared/auth.py, whose reader is the daemons'.
"""

import fcntl
import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape

from millrace.cli import output
from millrace.cli.certs import write_private
from millrace.cli.failures import NOT_FOUND, USAGE, CommandFailed

SCOPES = ("generate", "build", "admin", "delegate")
_ID_BYTES, _SECRET_BYTES = 6, 32


def create_key(
    path: Path, tenant: str, scopes: Sequence[str], limits: dict[str, float], *, as_json: bool
) -> None:
    """Adds a key and prints it, this once.

    Args:
        limits: of the tenant, by their names in the file; those not named stay.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise CommandFailed(f"scopes are some of {', '.join(SCOPES)}, not {unknown}", USAGE)
    if not tenant:
        raise CommandFailed("a tenant's name is not empty", USAGE)
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    with _changing(path) as content:
        content["keys"][key_id] = {
            "sha256": hashlib.sha256(secret.encode()).hexdigest(),
            "tenant": tenant,
            "scopes": sorted(set(scopes)),
            "created_s": round(time.time(), 3),
            "is_revoked": False,
        }
        if limits:
            content["tenants"].setdefault(tenant, {}).update(limits)
    key = f"mr_{key_id}_{secret}"
    if as_json:
        output.print_json({"id": key_id, "key": key, "tenant": tenant, "scopes": list(scopes)})
    else:
        output.say(f"key {key_id} of tenant {escape(tenant)}; it is not shown again:")
        output.print_line(key)


def list_keys(path: Path, *, as_json: bool) -> None:
    """Prints all keys, newest last, without their hashes."""
    content = _read(path)
    rows = sorted(content["keys"].items(), key=lambda item: float(item[1].get("created_s", 0)))
    if as_json:
        shown = ("tenant", "scopes", "created_s", "is_revoked")
        keys = [{"id": i, **{name: row.get(name) for name in shown}} for i, row in rows]
        output.print_json({"keys": keys, "tenants": content["tenants"]})
        return
    output.print_table(
        ("id", "tenant", "scopes", "limits", "created", "state"),
        [
            (
                key_id,
                row["tenant"],
                ",".join(row["scopes"]),
                _limits_text(content["tenants"].get(row["tenant"], {})),
                output.age_text(row.get("created_s", 0)),
                "revoked" if row.get("is_revoked") else "valid",
            )
            for key_id, row in rows
        ],
        "no keys; make one with: millrace keys create TENANT",
    )


def revoke_key(path: Path, key_id: str, *, as_json: bool) -> None:
    """Makes a key invalid; daemons know within a second."""
    if key_id.startswith("mr_"):  # people paste the whole key
        key_id = key_id.split("_")[1]
    with _changing(path) as content:
        if key_id not in content["keys"]:
            raise CommandFailed(f"no key {key_id!r} in {path}", NOT_FOUND)
        content["keys"][key_id]["is_revoked"] = True
    if as_json:
        output.print_json({"id": key_id, "is_revoked": True})
    else:
        output.say(f"key {key_id} is revoked")


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Any]]:
    """The file's content, written back at the end; one writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = _read(path) if path.exists() else {"keys": {}, "tenants": {}}
        yield content
        write_private(path, json.dumps(content, indent=2).encode() + b"\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CommandFailed(
            f"no key file {path}; make one with: millrace keys create TENANT --file {path}",
            NOT_FOUND,
        ) from None
    except OSError as error:
        raise CommandFailed(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandFailed(f"{path} is not a key file: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("keys"), dict):
        raise CommandFailed(f"{path} is not a key file")
    content.setdefault("tenants", {})
    return content


def _limits_text(limits: dict[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in limits.items() if value) or "-"
