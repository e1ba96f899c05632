"""How a registry learns who asks: credentials from Docker's files, and tokens made of them.

Source: Docker's config.json (`auths`, `credHelpers`, `credsStore`); distribution's "Token
Authentication Specification".
"""

import base64
import json
import re
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from shared.errors import StoreRefused, StoreUnreachable
from shared.settings import registry_auth_files

_HELPER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user's name and secret; the secret does not show."""

    user: str
    secret: str = field(repr=False)

    @property
    def basic(self) -> str:
        """As the header `Authorization` has them."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


class RegistryAuth:
    """The header `Authorization` for requests to one repository of the registry at `host`."""

    def __init__(self, host: str, client: httpx2.Client, is_plain: bool) -> None:
        self._host, self._client, self._is_plain = host, client, is_plain
        self._lock = threading.Lock()
        # By whether it is for pushing: a registry may let us read and not write.
        self._authorization: dict[bool, str] = {}

    def headers(self, is_push: bool) -> dict[str, str]:
        """What to send along; nothing before the registry asked for it."""
        with self._lock:
            known = self._authorization.get(is_push)
        return {"Authorization": known} if known else {}

    def answer(self, response: httpx2.Response, is_push: bool, store: str) -> None:
        """Does as a 401 asks, so that `headers` gives what it wants.

        Args:
            store: for error messages.
        Raises:
            StoreRefused: there are no credentials, or they are not taken.
            StoreUnreachable: what makes tokens does not answer.
        """
        scheme, parameters = challenge_of(response.headers.get("WWW-Authenticate", ""))
        credentials = credentials_for(self._host, registry_auth_files())
        if scheme == "bearer":
            authorization = f"Bearer {self._token(parameters, credentials, store)}"
        elif credentials is None:
            problem = f"it wants credentials, and no file of Docker's has any for {self._host}"
            raise StoreRefused(store=store, problem=problem)
        else:
            authorization = credentials.basic
        with self._lock:
            self._authorization[is_push] = authorization

    def _token(
        self, parameters: dict[str, str], credentials: Credentials | None, store: str
    ) -> str:
        realm = parameters.pop("realm", "")
        # A secret that is meant for TLS must not be asked for without it.
        if urlsplit(realm).scheme not in (("http", "https") if self._is_plain else ("https",)):
            raise StoreRefused(store=store, problem=f"it wants a token from {realm!r}")
        headers = {} if credentials is None else {"Authorization": credentials.basic}
        asked = {k: v for k, v in parameters.items() if k in ("service", "scope")}
        try:
            answer = self._client.get(realm, params=asked, headers=headers)
        except httpx2.TransportError as error:
            problem = f"no token from {urlsplit(realm).netloc} ({type(error).__name__})"
            raise StoreUnreachable(store=store, problem=problem) from error
        if answer.status_code != 200:
            problem = f"no token from {urlsplit(realm).netloc} (HTTP {answer.status_code})"
            if answer.status_code >= 500 or answer.status_code == 429:
                raise StoreUnreachable(store=store, problem=problem)
            raise StoreRefused(store=store, problem=problem)
        return _token_in(answer, store)


def _token_in(answer: httpx2.Response, store: str) -> str:
    try:
        content = answer.json()
        token = content.get("token") or content["access_token"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"what {answer.url.host} sends is no token"
        raise StoreUnreachable(store=store, problem=problem) from error
    return str(token)


def challenge_of(header: str) -> tuple[str, dict[str, str]]:
    """The scheme, in lower case, and parameters that a `WWW-Authenticate` header asks for."""
    scheme, _, rest = header.partition(" ")
    return scheme.lower(), dict(re.findall(r'(\w+)="([^"]*)"', rest))


def credentials_for(host: str, files: Iterable[Path]) -> Credentials | None:
    """What the first of Docker's files that knows the registry says; None where none does.

    Raises:
        StoreRefused: a file is broken, or a credential helper fails.
    """
    names = ("https://index.docker.io/v1/", "docker.io") if host == "docker.io" else (host,)
    for path in files:
        try:
            if not path.exists():
                continue
            config = json.loads(path.read_bytes())
            for name in names:
                found = _in_config(config, name)
                if found is not None:
                    return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{path} cannot be read ({type(error).__name__})"
            raise StoreRefused(store=host, problem=problem) from error
        except subprocess.SubprocessError as error:
            problem = f"the credential helper of {path} failed ({type(error).__name__})"
            raise StoreRefused(store=host, problem=problem) from error
    return None


def _in_config(config: dict[str, Any], name: str) -> Credentials | None:
    helper = config.get("credHelpers", {}).get(name, "")
    entry = config.get("auths", {}).get(name)
    if not helper and entry is None:
        return None
    if not helper and "auth" in entry:
        user, colon, secret = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        if not colon:
            raise ValueError("no login")
        return Credentials(user, secret)
    if not helper and "username" in entry:
        return Credentials(entry["username"], entry["password"])
    helper = helper or config.get("credsStore", "")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", helper):
        return None
    done = subprocess.run(
        [f"docker-credential-{helper}", "get"],
        input=name, capture_output=True, text=True, timeout=_HELPER_TIMEOUT_S, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    return Credentials(answer["Username"], answer["Secret"])
