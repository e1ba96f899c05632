"""Settings come from flags and variables, and a wrong one is named."""

import pytest
from pydantic import Field, model_validator

from shared.settings import Address, Settings, SettingsError, split_address


class ExampleSettings(Settings):
    """An example daemon."""

    component = "compiler"

    lease_s: float = Field(30.0, gt=0, description="seconds of a lease")
    worker: bool = Field(True, description="build here")
    archs: tuple[str, ...] = Field((), description="targets")
    peers: tuple[Address, ...] = Field((), description="other daemons")

    @model_validator(mode="after")
    def _lease_needs_worker(self) -> "ExampleSettings":
        if not self.worker and self.archs:
            raise ValueError("--archs and --no-worker contradict each other")
        return self


def test_flag_wins_over_variable() -> None:
    settings = ExampleSettings.parse(
        ["--lease-s", "3"], {"MILLRACE_COMPILER_LEASE_S": "4", "MILLRACE_REDIS_URL": "redis://h"}
    )
    assert (settings.lease_s, settings.redis_url) == (3.0, "redis://h")


def test_tuple_is_split_at_commas() -> None:
    settings = ExampleSettings.parse([], {"MILLRACE_COMPILER_ARCHS": "cpu, sm_90"})
    assert settings.archs == ("cpu", "sm_90")


def test_bool_flag_has_a_negation() -> None:
    assert not ExampleSettings.parse(["--no-worker"], {}).worker


@pytest.mark.parametrize(
    "variable",
    ["MILLRACE_COMPILER_LEASE", "MILLRACE_REDIS", "MILLRACE_LEASE_S", "MILLRACE_COMPILER_STORE"],
)
def test_unknown_variable_is_named(variable: str) -> None:
    with pytest.raises(SettingsError, match=rf"unknown setting {variable}\b"):
        ExampleSettings.parse([], {variable: "1"})


def test_variables_of_other_components_and_programs_are_left_alone() -> None:
    environ = {"MILLRACE_RUNTIME_ANYTHING": "1", "MILLRACE_CLI_COLOR": "1", "PATH": "/bin"}
    assert ExampleSettings.parse([], environ) == ExampleSettings.parse([], {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lease-s", "-3"], "--lease-s (MILLRACE_COMPILER_LEASE_S): .*greater than 0, not '-3'"),
        (["--log-level", "loud"], "--log-level (MILLRACE_LOG_LEVEL): .*'loud'"),
        (["--peers", "h:1,h"], "--peers (MILLRACE_COMPILER_PEERS): .*form host:port, not 'h'"),
        (["--redis-url", "h:6379"], "--redis-url (MILLRACE_REDIS_URL): .*redis://host:port"),
        (["--redis-url", "redis://h:p"], "--redis-url (MILLRACE_REDIS_URL): .*redis://host:port"),
        (["--lease-s", "inf"], "--lease-s (MILLRACE_COMPILER_LEASE_S): .*finite number, not 'inf'"),
        (["--lease-s", "nan"], "--lease-s (MILLRACE_COMPILER_LEASE_S): .*, not 'nan'"),
        (["--archs", "cpu", "--no-worker"], "--archs and --no-worker contradict"),
    ],
)
def test_invalid_setting_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(").replace(")", r"\)")):
        ExampleSettings.parse(argv, {})


def test_unknown_flag_ends_with_status_2_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ExampleSettings.parse(["--lease", "3"], {})
    assert ended.value.code == 2
    assert "--lease" in capsys.readouterr().err


def test_help_shows_every_setting_with_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        ExampleSettings.parse(["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert "seconds of a lease (default 30.0; MILLRACE_COMPILER_LEASE_S)" in text
    for field in ExampleSettings.model_fields:
        assert "--" + field.replace("_", "-") in text


def test_help_shows_units_and_no_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ExampleSettings.parse(["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert "--lease-s SECONDS" in text
    assert "--max-message-bytes BYTES" in text
    assert "(default on; MILLRACE_COMPILER_WORKER)" in text
    assert not any(word in text for word in ("None", "PosixPath", "''", "()", "True", "False"))


def test_malformed_redis_url_does_not_show_its_password() -> None:
    with pytest.raises(SettingsError) as refused:
        ExampleSettings.parse(["--redis-url", "http://user:secret@h"], {})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("address", ["7601", "localhost:", ":7601", "host:port", "h:70000"])
def test_malformed_address_is_named(address: str) -> None:
    with pytest.raises(SettingsError, match="host:port"):
        split_address(address)


def test_unknown_variable_is_told_a_near_one_and_no_far_one() -> None:
    """The prefix that all share makes none of them near."""
    with pytest.raises(SettingsError, match="did you mean MILLRACE_LOG_LEVEL"):
        ExampleSettings.parse([], {"MILLRACE_LOGLEVEL": "info"})
    with pytest.raises(SettingsError, match="MILLRACE_BOGUS; see --help"):
        ExampleSettings.parse([], {"MILLRACE_BOGUS": "1"})
