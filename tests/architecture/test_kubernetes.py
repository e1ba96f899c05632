"""Kubernetes manifests: valid, locked down, and true to the daemons and to each other."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml

from shared.auth import RPC_SCOPES
from shared.settings import Settings
from tests.architecture.kustomize import Manifest, compose
from tests.architecture.test_deploy import (
    DAEMONS,
    DOCKERFILE,
    dockerfile_env,
    valkey_takes,
)
from tests.architecture.test_docs import parses
from tests.architecture.test_imports import ROOT
from tests.architecture.test_monitoring import SERIES

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
STACKS = {name: compose(FOLDER / "overlays" / name) for name in OVERLAYS}
OPERATIONS = (ROOT / "docs/OPERATIONS.md").read_text()
# After its drain a daemon still sends what has ended.
LAST_EVENTS_S = 5
ANY = next(iter(STACKS.values()))


def all_of(stack: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """The manifests of these kinds, by name."""
    return {m["metadata"]["name"]: m for m in stack if m["kind"] in kinds}


WORKLOADS = all_of(ANY, "Deployment", "StatefulSet")
OURS = [name for name in WORKLOADS if name in DAEMONS]


def pod_of(workload: Manifest) -> Any:
    """The pod that it makes."""
    return workload["spec"]["template"]["spec"]


def container_of(workload: Manifest) -> Any:
    """Its one container."""
    (container,) = pod_of(workload)["containers"]
    return container


def environ_of(name: str) -> dict[str, str]:
    """Variables of a daemon's container; what Secrets hold is made up."""
    environ: dict[str, str] = {}
    for source in container_of(WORKLOADS[name])["envFrom"]:
        environ |= all_of(ANY, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for variable in container_of(WORKLOADS[name])["env"]:
        environ[variable["name"]] = variable.get("value", "redis://:secret@redis:6379/0")
    return environ


def settings_of(name: str) -> Settings:
    """The settings that image and manifest make together."""
    return DAEMONS[name].parse((), {**dockerfile_env(name), **environ_of(name)})


def seconds_of(name: str, field: str) -> float:
    """A setting in seconds."""
    return float(getattr(settings_of(name), field))


def ports_of(workload: Manifest) -> dict[str, int]:
    """Its named ports."""
    return {port["name"]: port["containerPort"] for port in container_of(workload)["ports"]}


def selected(selector: Manifest) -> set[str]:
    """The workloads whose pods a selector selects."""
    wanted = dict(selector.get("matchLabels", {}))
    allowed = {e["key"]: e["values"] for e in selector.get("matchExpressions", ())}
    return {
        name
        for name, workload in WORKLOADS.items()
        for labels in [workload["spec"]["template"]["metadata"]["labels"]]
        if wanted.items() <= labels.items()
        and all(labels.get(key) in values for key, values in allowed.items())
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_every_manifest_is_valid(overlay: str, version: str) -> None:
    """Strictly: a field that does not exist is an error, as it would be ignored silently."""
    for manifest in STACKS[overlay]:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_the_same_of_it(overlay: str) -> None:
    """Where there is one: what these tests look at is what is applied."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    done = subprocess.run(
        ["kubectl", "kustomize", FOLDER / "overlays" / overlay],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    def key(manifest: Manifest) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    assert sorted(yaml.safe_load_all(done.stdout), key=key) == sorted(STACKS[overlay], key=key)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_locked_down(overlay: str) -> None:
    """As the namespace's pod security standard demands, and on a read-only file system."""
    namespace = all_of(STACKS[overlay], "Namespace")["millrace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in all_of(STACKS[overlay], "Deployment", "StatefulSet").values():
        pod, own = pod_of(workload), container_of(workload)["securityContext"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", OURS)
def test_containers_are_given_settings_that_exist_and_are_secure(name: str) -> None:
    settings = settings_of(name)
    assert not settings.insecure
    assert settings.tls_cert is not None
    assert settings.api_keys is not None
    if name != "compiler":
        assert settings.peer_api_key_file is not None
        assert settings.peer_tls_ca is not None
    mounted = [m["mountPath"] for m in container_of(WORKLOADS[name])["volumeMounts"]]
    writable = {"/tmp", "/var/lib/millrace"}
    assert writable <= set(mounted)
    for value in {**dockerfile_env(name), **environ_of(name)}.values():
        if value.startswith("/"):
            assert any(value.startswith(path) for path in mounted), value


@pytest.mark.parametrize("name", OURS)
def test_ports_are_those_that_the_daemon_listens_on(name: str) -> None:
    settings: Any = settings_of(name)
    listening = {
        "grpc": int(settings.listen.rpartition(":")[2]),
        "metrics": int(settings.metrics_listen.rpartition(":")[2]),
    }
    assert listening.items() <= ports_of(WORKLOADS[name]).items()
    exposed = re.search(rf"AS {name}\n.*?EXPOSE ([\d ]+)", DOCKERFILE.read_text(), re.S)
    assert exposed is not None
    assert set(ports_of(WORKLOADS[name]).values()) <= set(map(int, exposed[1].split()))
    notes = WORKLOADS[name]["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(listening["metrics"])


@pytest.mark.parametrize("name", OURS)
def test_probes_ask_for_health_and_only_readiness_for_serving(name: str) -> None:
    """A runtime that waits for its engine must not be killed for it."""
    container = container_of(WORKLOADS[name])
    address = f"127.0.0.1:{ports_of(WORKLOADS[name])['grpc']}"
    health = ["millrace", "health", address]
    assert container["readinessProbe"]["exec"]["command"] == health
    assert container["livenessProbe"]["exec"]["command"] == [*health, "--answering"]
    assert container["startupProbe"]["exec"]["command"][:3] == health
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        parses(container[probe]["exec"]["command"])
        assert container[probe]["timeoutSeconds"] > 5  # what `millrace health` waits


def test_redis_is_started_by_a_command_that_valkey_takes(tmp_path: Path) -> None:
    valkey_takes(container_of(WORKLOADS["redis"])["command"], tmp_path)


@pytest.mark.parametrize("name", OURS)
def test_images_start_the_daemon_whose_settings_the_pod_has(name: str) -> None:
    """No manifest says a command: the image's entry point is the daemon."""
    container = container_of(WORKLOADS[name])
    assert not {"command", "args"} & container.keys()
    stage = re.search(rf"AS {name}\n(.*?)(?:\nFROM |\Z)", DOCKERFILE.read_text(), re.S)
    assert stage is not None
    assert f'["millrace-{name}"]' in stage[1]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert f"millrace-{name}" in scripts


@pytest.mark.parametrize("name", OURS)
def test_pods_are_given_the_time_that_a_drain_takes(name: str) -> None:
    hook = container_of(WORKLOADS[name]).get("lifecycle", {}).get("preStop", {})
    before_s = hook.get("sleep", {}).get("seconds", 0)
    grace_s = pod_of(WORKLOADS[name])["terminationGracePeriodSeconds"]
    assert grace_s >= before_s + seconds_of(name, "drain_s") + LAST_EVENTS_S
    if name != "compiler":
        assert before_s > 0


def test_whatever_is_named_exists() -> None:
    """Services, settings, targets; and the Secrets in the manual, which says how to make them."""
    services = all_of(ANY, "Service")
    for workload in WORKLOADS.values():
        if workload["kind"] == "StatefulSet":
            assert workload["spec"]["serviceName"] in services
        volumes = {v["name"] for v in pod_of(workload)["volumes"]}
        volumes |= {v["metadata"]["name"] for v in workload["spec"].get("volumeClaimTemplates", ())}
        mounts = {m["name"] for m in container_of(workload)["volumeMounts"]}
        assert mounts == volumes, workload["metadata"]["name"]
    for name, service in services.items():
        (workload_name,) = selected({"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert ports_of(WORKLOADS[workload_name])[port["targetPort"]] == port["port"], name
    for name, scaler in all_of(ANY, "HorizontalPodAutoscaler").items():
        target = scaler["spec"]["scaleTargetRef"]
        assert WORKLOADS[target["name"]]["kind"] == target["kind"], name
        # What an autoscaler sets must not be set back by the next apply.
        assert "replicas" not in WORKLOADS[target["name"]]["spec"]
    for name, budget in all_of(ANY, "PodDisruptionBudget").items():
        assert selected(budget["spec"]["selector"]) == {name}


def test_secrets_are_made_in_the_manual_with_the_keys_that_are_read() -> None:
    for workload in WORKLOADS.values():
        for volume in pod_of(workload)["volumes"]:
            if "secret" in volume:
                check_secret(volume["secret"]["secretName"], volume["secret"].get("items", ()))
        for variable in container_of(workload).get("env", ()):
            if ref := variable.get("valueFrom", {}).get("secretKeyRef"):
                check_secret(ref["name"], [ref])


def check_secret(name: str, items: Any) -> None:
    """The manual creates the Secret, with these keys."""
    made = re.search(rf"create secret generic {name}((?: +--from-\S+| \\\n)+)", OPERATIONS)
    assert made is not None, f"the manual does not make {name}"
    keys = set(re.findall(r"--from-(?:file|literal)=([\w.]+)=", made[1]))
    assert {item["key"] for item in items} <= keys


def test_policies_let_through_what_daemons_need_and_name_ports_that_exist() -> None:
    policies = all_of(ANY, "NetworkPolicy")
    assert policies["default"]["spec"]["podSelector"] == {}
    assert policies["default"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    calls = {("runtime", "compiler"), ("runtime", "redis"), ("gateway", "runtime"),
             ("gateway", "redis"), ("gateway", "compiler"), ("compiler", "redis")}  # fmt: skip
    for caller, called in calls:
        ingress = policies[called]["spec"]["ingress"]
        peers = [p["podSelector"] for rule in ingress for p in rule["from"] if "podSelector" in p]
        assert any(caller in selected(peer) for peer in peers), f"{caller} to {called}"
        egress = policies[caller]["spec"]["egress"]
        if {} not in egress:
            ports = [
                port["port"]
                for rule in egress
                if any(called in selected(peer["podSelector"]) for peer in rule["to"])
                for port in rule["ports"]
            ]
            assert set(ports) & set(ports_of(WORKLOADS[called]).values()), f"{caller} to {called}"
    for name, policy in policies.items():
        for rule in policy["spec"].get("ingress", ()):
            for port in rule["ports"]:
                pods = selected(policy["spec"]["podSelector"]) - {"redis"} or {"redis"}
                assert all(port["port"] in ports_of(WORKLOADS[pod]) for pod in pods), name


def test_the_gateway_shows_the_compile_daemons_builds_by_a_key_that_may() -> None:
    settings: Any = settings_of("gateway")
    name, _, port = settings.compiler.partition(":")
    (pod,) = selected({"matchLabels": all_of(ANY, "Service")[name]["spec"]["selector"]})
    assert ports_of(WORKLOADS[pod])["grpc"] == int(port)
    made = re.search(r"keys create gateway .*", OPERATIONS)
    assert made is not None
    assert "--scope build" in made[0]


def test_the_manual_deploys_by_a_key_that_daemons_know_and_that_may() -> None:
    """It is made before the Secret is, from the same file, with the scope of the call."""
    made = OPERATIONS.index("keys create ops --file keys.json")
    line = OPERATIONS[made:].partition("\n")[0]
    assert f"--scope {RPC_SCOPES['/millrace.fleet.v1.FleetService/ApplyDeployment']} " in line
    assert line.partition(" > ")[2].startswith("ops.key")
    secret = OPERATIONS.index("create secret generic millrace-keys")
    told = OPERATIONS.index("export MILLRACE_CLI_API_KEY=$(cat ops.key)", secret)
    assert made < secret < told < OPERATIONS.index("\nmillrace deploy chat", told)


def test_runtimes_scale_on_a_metric_that_they_export_and_the_adapter_gives() -> None:
    (metric,) = all_of(ANY, "HorizontalPodAutoscaler")["runtime"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in SERIES
    adapter = yaml.safe_load((FOLDER / "monitoring/prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(name + "{")
    query = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.GroupBy>>", "pod")
    promql_parser.parse(query.replace("<<.LabelMatchers>>", 'pod="a"'))
    labels = {
        config.get("target_label")
        for job in yaml.safe_load((FOLDER / "monitoring/scrape.yaml").read_text())
        for config in job["relabel_configs"]
    }
    assert rule["resources"]["overrides"].keys() | {"job", "instance"} <= labels


def test_the_gpu_overlay_asks_for_one_gpu_of_one_product() -> None:
    runtime = all_of(STACKS["gpu"], "StatefulSet")["runtime"]
    assert container_of(runtime)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod_of(runtime)["nodeSelector"].keys() == {"nvidia.com/gpu.product"}
    assert container_of(runtime)["image"].endswith("-cuda")
    cpu = all_of(STACKS["cpu"], "StatefulSet")["runtime"]
    assert "nvidia.com/gpu" not in container_of(cpu)["resources"]["limits"]


def test_a_runtime_advertises_a_name_that_certificates_can_be_for() -> None:
    """Names of pods come and go: the manual's certificate is for all below one Service."""
    runtime = WORKLOADS["runtime"]
    service = all_of(ANY, "Service")[runtime["spec"]["serviceName"]]
    assert service["spec"]["clusterIP"] == "None"
    advertised = environ_of("runtime")["MILLRACE_RUNTIME_ADVERTISE"]
    domain = advertised.partition(".")[2].rpartition(":")[0]
    namespace = service["metadata"]["namespace"]
    assert f"--host '*.{domain.replace('$(POD_NAMESPACE)', namespace)}'" in OPERATIONS
