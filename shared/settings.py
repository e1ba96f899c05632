"""A daemon's settings: one validated object, from flags or MILLRACE_* variables.

A daemon subclasses `Settings` with a field per setting; flags, variables and `--help` follow from
the fields. This is the only file that reads the process environment.

    field in            flag            variable
    Settings            --redis-url     MILLRACE_REDIS_URL            read by every daemon
    a daemon's class    --lease-s       MILLRACE_COMPILER_LEASE_S     read by that one

A flag wins over a variable. A MILLRACE_ variable that belongs to another component is left alone;
one that belongs to nobody is an error that names it.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

COMPONENTS = ("compiler", "runtime", "gateway", "cli")
_PREFIX = "MILLRACE_"


class SettingsError(Exception):
    """A setting is unknown, malformed or contradicts another; the message names it."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        SettingsError: it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise SettingsError(f"{address!r} is not of the form host:port")
    return host, int(port)


def _check_address(address: str) -> str:
    try:
        if address:
            split_address(address)
    except SettingsError:
        raise ValueError("it is of the form host:port") from None
    return address


def _is_redis_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    return parts.scheme in ("redis", "rediss", "unix")


Address = Annotated[str, AfterValidator(_check_address)]
"""A setting that is `host:port`, or empty."""


class Settings(BaseModel):
    """What both daemons are told. Subclasses set `component` and add fields with descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    component: ClassVar[str]

    redis_url: str = Field(
        "", description="Redis or Valkey, as redis://host:port/0 or unix:///path; empty: none"
    )
    store: str = Field(
        "~/.millrace/store", description="engine store: a folder, or a URL that the store knows"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe events to log"
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, JSON lines elsewhere"
    )
    max_message_bytes: int = Field(
        16 << 20, ge=1 << 16, le=1 << 30, description="largest gRPC message taken or sent"
    )

    tls_cert: Path | None = Field(
        None, description="certificate (PEM, with its chain) that this daemon shows; empty: no TLS"
    )
    tls_key: Path | None = Field(None, description="private key of --tls-cert")
    tls_ca: Path | None = Field(
        None, description="CA that must have signed clients' certificates; empty: any client"
    )
    api_keys: Path | None = Field(
        None, description="file of `millrace keys`: every call needs a key of it; empty: none does"
    )
    insecure: bool = Field(
        False, description="listen on other than loopback even without TLS and authentication"
    )
    peer_tls_ca: Path | None = Field(
        None, description="CA of the daemons that this one calls; empty: they have no TLS"
    )
    peer_tls_cert: Path | None = Field(None, description="certificate shown to those daemons")
    peer_tls_key: Path | None = Field(None, description="private key of --peer-tls-cert")
    peer_api_key_file: Path | None = Field(
        None, description="file that holds the API key for calling those daemons"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any, info: Any) -> Any:
        is_optional = cls.model_fields[info.field_name].annotation == Path | None
        return None if is_optional and value == "" else value

    @field_validator("*", mode="before")
    @classmethod
    def _split_commas(cls, value: Any, info: Any) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) and get_origin(annotation) is tuple:
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return value.expanduser() if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _check_redis_url(self) -> Self:
        # Not a validator of the field: its message would show the URL, with the password.
        if self.redis_url and not _is_redis_url(self.redis_url):
            raise ValueError(
                f"--redis-url ({_PREFIX}REDIS_URL): it is of the form redis://host:port/0, "
                "rediss://host:port/0 or unix:///path"
            )
        return self

    @classmethod
    def load(cls) -> Self:
        """This process's settings; prints what is wrong and exits with 2 where they are invalid."""
        try:
            return cls.parse(sys.argv[1:], os.environ)
        except SettingsError as error:
            exit_with(f"millrace-{cls.component}: {error}")

    @classmethod
    def parse(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Self:
        """The settings that flags and variables give.

        Raises:
            SettingsError: an unknown variable, or values that do not validate. An unknown flag and
                `--help` end in argparse's own SystemExit.
        """
        values: dict[str, Any] = {
            **_from_environ(cls, environ),
            **{k: v for k, v in vars(_parser(cls).parse_args(argv)).items() if v is not None},
        }
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(_explain(cls, error)) from None


def telemetry_environ() -> dict[str, str]:
    """The standard variables of OpenTelemetry that are set."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}


def registry_auth_files() -> tuple[Path, ...]:
    """Where Docker, Podman and their like keep credentials of registries, the first one first."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker")
    named = os.environ.get("REGISTRY_AUTH_FILE")
    files = (*((Path(named),) if named else ()), folder / "config.json")
    return tuple(path.expanduser() for path in files)


def s3_is_plain() -> bool:
    """Claims that the AWS variables name an endpoint without TLS, which is meant then."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return any(os.environ.get(name, "").startswith("http://") for name in names)


def exit_with(message: str) -> NoReturn:
    """Ends the process with status 2 and one line for people."""
    sys.stderr.write(message + "\n")
    raise SystemExit(2)


def variable_of(cls: type[Settings], field: str) -> str:
    """The variable that sets `field`."""
    owner = "" if field in Settings.model_fields else f"{cls.component.upper()}_"
    return f"{_PREFIX}{owner}{field.upper()}"


def flag_of(field: str) -> str:
    """The flag that sets `field`."""
    return "--" + field.replace("_", "-")


def _from_environ(cls: type[Settings], environ: Mapping[str, str]) -> dict[str, str]:
    fields = {variable_of(cls, field): field for field in cls.model_fields}
    others = tuple(f"{_PREFIX}{c.upper()}_" for c in COMPONENTS if c != cls.component)
    values = {}
    for variable in sorted(environ):
        if not variable.startswith(_PREFIX) or variable.startswith(others):
            continue
        if variable not in fields:
            # Without the prefix, which alone would make any two look alike.
            names = [known.removeprefix(_PREFIX) for known in fields]
            near = difflib.get_close_matches(variable.removeprefix(_PREFIX), names, n=1)
            hint = f"; did you mean {_PREFIX}{near[0]}?" if near else "; see --help"
            raise SettingsError(f"unknown setting {variable}{hint}")
        values[fields[variable]] = environ[variable]
    return values


def _parser(cls: type[Settings]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"millrace-{cls.component}",
        description=(cls.__doc__ or "").split("\n")[0],
        epilog="Each setting can come from its variable instead; a flag wins.",
        allow_abbrev=False,
    )
    for name, field in cls.model_fields.items():
        action: Any = argparse.BooleanOptionalAction if field.annotation is bool else "store"
        more: dict[str, Any] = (
            {} if field.annotation is bool else {"metavar": _metavar(name, field)}
        )
        parser.add_argument(
            flag_of(name), dest=name, action=action, default=None, help=_help(cls, name), **more
        )
    return parser


def _metavar(name: str, field: FieldInfo) -> str:
    """What a value is, with its unit: names of settings end in theirs."""
    if name.endswith("_s"):
        return "SECONDS"
    if name.endswith("_bytes"):
        return "BYTES"
    if name.endswith(("_url", "_uri")):
        return "URL"
    if field.annotation is str and (field.description or "").startswith("host:port"):
        return "HOST:PORT"
    if get_origin(field.annotation) is Literal:
        return "{" + ",".join(map(str, field.annotation.__args__)) + "}"  # type: ignore[union-attr]
    if get_origin(field.annotation) is tuple:
        return "A,B"
    words: dict[Any, str] = {str: "TEXT", int: "N", Path: "FOLDER", Path | None: "FILE"}
    return words.get(field.annotation, "VALUE")


def _help(cls: type[Settings], name: str) -> str:
    field = cls.model_fields[name]
    assert field.description, f"setting {name} has no description"
    parts = [variable_of(cls, name)]
    if field.is_required():
        parts.insert(0, "required")
    elif field.default not in ("", None, ()):
        is_flag = isinstance(field.default, bool)
        default = ("off", "on")[field.default] if is_flag else field.default
        parts.insert(0, f"default {default}")
    return f"{field.description} ({'; '.join(parts)})".replace("%", "%%")


def _explain(cls: type[Settings], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # a model validator: its message names the settings
            lines.append(message)
            continue
        field = str(problem["loc"][0])
        found = "" if problem["type"] == "missing" else f", not {problem['input']!r}"
        lines.append(f"{flag_of(field)} ({variable_of(cls, field)}): {message}{found}")
    return "; ".join(lines)
