"""The Kubernetes manifests and the compose file, run as they are written and as the manual says.

Pods and services serve, their probes find that they do, and they end in time.
"""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.kustomize import Manifest
from tests.architecture.test_deploy import compose_config
from tests.architecture.test_kubernetes import OPERATIONS, STACKS, all_of, container_of, pod_of
from tests.checkpoints import write_checkpoint
from tests.integration.containers import (
    HANG_S,
    KERNELS,
    PATH,
    VALKEY,
    Container,
    Host,
    Image,
    Running,
    are_allowed,
    image_of,
)

pytestmark = [pytest.mark.redis, pytest.mark.timeout(1200)]

POD_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
# What the manual's commands are given in place of a cluster: Secrets become folders.
_KUBECTL = f"""#!{sys.executable}
import pathlib, sys
if "secret" in sys.argv:
    folder = pathlib.Path("secrets", sys.argv[sys.argv.index("generic") + 1])
    folder.mkdir(parents=True)
    for word in sys.argv:
        if word.startswith("--from-"):
            option, key, value = word.split("=", 2)
            content = pathlib.Path(value).read_text() if option == "--from-file" else value
            (folder / key).write_text(content)
"""


@pytest.fixture(autouse=True)
def _needs_namespaces(tmp_path: Path) -> None:
    if not are_allowed(tmp_path / "try"):
        pytest.skip("no namespaces here")


class Cluster:
    """Pods of an overlay, on one host; volumes and Secrets are folders below `root`."""

    def __init__(self, host: Host, root: Path, stack: list[Manifest]) -> None:
        self._host, self._root, self._stack = host, root, stack
        self._pods: dict[str, Running] = {}
        self._numbers = itertools.count(1)
        self.workloads = all_of(stack, "Deployment", "StatefulSet")
        (root / "bin").mkdir(parents=True)
        (root / "bin/kubectl").write_text(_KUBECTL)
        (root / "bin/kubectl").chmod(0o755)

    def volume(self, pod: str, name: str) -> Path:
        """The folder of a pod's volume."""
        folder = self._root / "volumes" / pod / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def operate(self, script: str) -> None:
        """Runs commands where an operator's keys and certificates are."""
        environ = {"PATH": f"/operator/bin:{PATH}", "HOME": "/operator"}
        made = Container(["sh", "-ec", script], environ, "/operator", {"/operator": self._root})
        running = self._host.start(f"operator-{next(self._numbers)}", made)
        assert running.process.wait(HANG_S) == 0, running.log.read_text()

    def start(self, name: str, **more: str) -> Running:
        """The first pod of a workload, with more variables than are written."""
        container = container_of(self.workloads[name])
        image = VALKEY if container["image"].startswith("valkey/") else image_of(name)
        command = [*container.get("command", image.entrypoint), *container.get("args", ())]
        environ = {**image.environ, **self._environ_of(name), **more}
        made = Container(command, environ, image.workdir, self._mounts_of(name))
        running = self._pods[name] = self._host.start(name, made)
        return running

    def probe(self, name: str, kind: str) -> list[str]:
        """The command that stands for a probe."""
        container = container_of(self.workloads[name])
        probe = container[kind]
        if "exec" in probe:
            return list(probe["exec"]["command"])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        return connects(ports[probe["tcpSocket"]["port"]])

    def terminate(self, name: str) -> int:
        """The status with which its process ends within what the manifest leaves it, once preStop has ended."""
        workload = self.workloads[name]
        hook = container_of(workload).get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
        grace_s = pod_of(workload)["terminationGracePeriodSeconds"]
        return self._pods[name].ends(grace_s - hook["sleep"]["seconds"])

    def _environ_of(self, name: str) -> dict[str, str]:
        container, environ = container_of(self.workloads[name]), dict[str, str]()
        fields = {"metadata.name": f"{name}-0", "metadata.namespace": "millrace"}
        for source in container.get("envFrom", ()):
            environ |= all_of(self._stack, "ConfigMap")[source["configMapRef"]["name"]]["data"]
        for variable in container.get("env", ()):
            match variable:
                case {"valueFrom": {"fieldRef": {"fieldPath": field}}}:
                    value = fields[field]
                case {"valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}:
                    value = (self._root / "secrets" / secret / key).read_text()
                case _:
                    value = re.sub(r"\$\((\w+)\)", lambda of: environ[of[1]], variable["value"])
            environ[variable["name"]] = value
        return environ

    def _mounts_of(self, name: str) -> dict[str, Path]:
        volumes = {volume["name"]: volume for volume in pod_of(self.workloads[name])["volumes"]}
        mounts = {
            mount["mountPath"]: self._filled(name, mount["name"], volumes.get(mount["name"], {}))
            for mount in container_of(self.workloads[name])["volumeMounts"]
            if mount["mountPath"] != "/tmp"  # which everybody may write to here
        }
        return mounts | KERNELS if name == "runtime" else mounts

    def _filled(self, pod: str, name: str, volume: Any) -> Path:
        folder = self.volume(pod, name)
        if "secret" in volume:
            secret = self._root / "secrets" / volume["secret"]["secretName"]
            every = [{"key": path.name, "path": path.name} for path in secret.iterdir()]
            for item in volume["secret"].get("items", every):
                (folder / item["path"]).write_bytes((secret / item["key"]).read_bytes())
        return folder


def connects(port: int) -> list[str]:
    """The command that stands for a probe of TCP."""
    return ["python", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}))"]


def manual() -> tuple[str, str]:
    """The manual's commands: those that make the Secrets, and those that come after."""
    (block,) = re.findall(r"```sh\n((?:(?!```)[\s\S])*kubectl apply -k[\s\S]*?)```", OPERATIONS)
    before, apply, after = block.partition("kubectl apply")
    return before, apply + after


def test_overlays_run_the_same_daemons() -> None:
    """They differ in where pods run, so one of them is run here."""
    what = ("command", "args", "env", "envFrom", "volumeMounts", "lifecycle", *POD_PROBES)
    told = [
        {
            name: [container_of(workload).get(key) for key in what]
            for name, workload in all_of(stack, "Deployment", "StatefulSet").items()
        }
        for stack in STACKS.values()
    ]
    assert all(one == told[0] for one in told)


def test_pod_with_a_variable_that_nobody_reads_ends(tmp_path: Path) -> None:
    """And nothing can be written beside its volume: what this file runs is a container."""
    with Host(tmp_path / "host", "redis") as host:
        cluster = Cluster(host, tmp_path / "cluster", STACKS["cpu"])
        cluster.operate(manual()[0])
        redis = cluster.start("redis")
        redis.until_passes(*cluster.probe("redis", "startupProbe"))
        assert "Read-only" in redis.run("touch", "/etc/written").stderr
        wrong = cluster.start("compiler", MILLRACE_COMPILER_DRAIN="30")
        with pytest.raises(AssertionError, match="it ended with 2"):
            wrong.until_passes(*cluster.probe("compiler", "startupProbe"))


def test_pods_serve_as_the_manual_deploys_them_and_end_in_time(tmp_path: Path) -> None:
    stack = STACKS["cpu"]
    names = (*all_of(stack, "Service"), "runtime-0.runtime.millrace.svc.cluster.local")
    with Host(tmp_path / "host", *names) as host:
        cluster = Cluster(host, tmp_path / "cluster", stack)
        write_checkpoint(cluster.volume("compiler", "store") / "tiny")
        secrets, deploy = manual()
        cluster.operate(secrets)
        pods = {name: cluster.start(name) for name in cluster.workloads}
        for name, pod in pods.items():
            pod.until_passes(*cluster.probe(name, "startupProbe"))
            pod.until_passes(*cluster.probe(name, "livenessProbe"))
        for name in ("runtime", "gateway"):
            assert pods[name].run(*cluster.probe(name, "readinessProbe")).returncode != 0
        ours = deploy.replace("sample:smollm2-135m", "/var/lib/millrace/tiny")
        cluster.operate(ours.replace("smollm2-135m", "tiny"))
        for name, pod in pods.items():
            pod.until_passes(*cluster.probe(name, "readinessProbe"))
        ask = "MILLRACE_CLI_API_KEY=$(cat ops.key) MILLRACE_CLI_TLS_CA=tls/ca.crt millrace"
        cluster.operate(f"{ask} generate --runtime gateway:7600 'Once upon a time' -m 4")
        for name in reversed(pods):
            assert cluster.terminate(name) == 0, pods[name].log.read_text()


def test_the_manuals_secured_stack_serves(tmp_path: Path) -> None:
    """Line by line: certificates and keys, both daemons, and a command that asks."""
    (block,) = re.findall(r"^```sh\n(umask 077[^`]*?^millrace-compiler [^`]*)```", OPERATIONS, re.M)
    ours = block.replace("sample:smollm2-135m", "/operator/tiny").replace("smollm2-135m", "tiny")
    *prepare, compiler, runtime, ask = ours.replace("\\\n", " ").splitlines()
    write_checkpoint(tmp_path / "operator/tiny")
    mounts = {"/operator": tmp_path / "operator"} | KERNELS
    (kernels,) = KERNELS
    environ = {"PATH": PATH, "HOME": "/operator", "NUMBA_CACHE_DIR": kernels}
    with Host(tmp_path / "host", "compiler.example.org", "runtime.example.org") as host:

        def shell(name: str, line: str) -> Running:
            return host.start(name, Container(["sh", "-ec", line], environ, "/operator", mounts))

        prepared = shell("operator", "\n".join(prepare))
        assert prepared.process.wait(HANG_S) == 0, prepared.log.read_text()
        shell("compiler", f"exec {compiler}")
        shell("runtime", f"exec {runtime}").until_passes("sh", "-ec", f"cd /operator; {ask}")


def test_services_of_compose_serve_and_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "models/tiny")
    for name, value in (("MODEL", "tiny"), ("MODEL_URI", "/models/tiny"), ("QUANT", "fp32")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODELS", str(tmp_path / "models"))
    services = json.loads(compose_config("--format", "json").stdout)["services"]
    daemons = ("compiler", "runtime", "gateway")
    with Host(tmp_path / "host", "redis", *daemons) as host:
        redis = host.start("redis", service_of(services["redis"], VALKEY, tmp_path / "redis"))
        redis.until_passes(*connects(6379))
        running = {}
        for name in daemons:  # each once what it depends on is healthy
            made = service_of(services[name], image_of(name), tmp_path / name)
            running[name] = host.start(name, made)
            running[name].until_passes(*services[name]["healthcheck"]["test"][1:])
        asked = running["gateway"].run(
            "millrace", "generate", "--runtime", "gateway:7600", "-m", "4", "Once"
        )
        assert asked.returncode == 0, asked.stderr
        for name in reversed(daemons):
            grace_s = float(services[name]["stop_grace_period"].removesuffix("s"))
            assert running[name].ends(grace_s) == 0, running[name].log.read_text()


def service_of(service: Any, image: Image, root: Path) -> Container:
    """The container of a service as compose understands it; volumes are folders below `root`."""
    mounts = {"/var/lib/millrace": root / "image", "/home/millrace": root / "home"}
    for volume in service.get("volumes", ()):
        is_here = volume["type"] == "bind"
        mounts[volume["target"]] = Path(volume["source"]) if is_here else root / volume["source"]
    environ = {
        name: value for name, value in service.get("environment", {}).items() if value is not None
    }
    command = service["command"] or image.entrypoint
    return Container(
        command,
        {**image.environ, "HOME": "/home/millrace", **environ},
        image.workdir,
        mounts | KERNELS,
    )
