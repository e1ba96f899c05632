"""Dashboard, alerts and scrape configuration: every query is PromQL, of metrics that exist."""

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

import grpc
import promql_parser
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from compiler_service.metrics import CompilerMetrics
from runtime_service.gateway.metrics import GatewayMetrics
from runtime_service.metrics import RuntimeMetrics
from shared.edge import EdgeInterceptor
from shared.errors import ERRORS
from shared.server import daemon_registry
from tests.architecture.test_imports import PACKAGES, ROOT, sources

DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/millrace.json").read_text())
PROMETHEUS = ROOT / "deploy/prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
# Given by Prometheus to whatever it scrapes.
TARGET_LABELS = {"instance", "job"}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def known_series() -> dict[str, set[str]]:
    """Every series that a daemon exports, and its labels."""
    registry = daemon_registry()
    EdgeInterceptor(registry)
    CompilerMetrics(registry)
    GatewayMetrics(registry)
    runtime = RuntimeMetrics()
    runtime.ended("finished", 1.0)
    registry.register(runtime)
    labels = {
        collector._name: set(collector._labelnames)
        for collector in registry._collector_to_names
        if isinstance(collector, MetricWrapperBase)
    }
    series = {"up": set(TARGET_LABELS)}
    for family in registry.collect():
        own = labels.get(family.name, {key for s in family.samples for key in s.labels} - {"le"})
        for suffix in SUFFIXES.get(family.type, ()):
            le = {"le"} if suffix == "_bucket" else set()
            series[family.name + suffix] = own | le | TARGET_LABELS
    return series


SERIES = known_series()


def panels() -> Iterator[dict[str, Any]]:
    """The dashboard's panels, rows aside."""
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def queries() -> list[Any]:
    """All queries of panels, annotations and alerts, by where they stand."""
    found = [
        (f"panel {panel['title']}", target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]
    found += [(a["name"], a["expr"]) for a in DASHBOARD["annotations"]["list"]]
    found += [
        (rule["alert"], rule["expr"]) for group in ALERTS["groups"] for rule in group["rules"]
    ]
    return [pytest.param(expr, id=name) for name, expr in found]


def selectors(expr: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric of a query, and the labels that are asked of it."""
    for name, matchers in re.findall(r"\b((?:millrace|process|up)\w*)(?:\{(.*?)\})?", expr):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


@pytest.mark.parametrize("expr", queries())
def test_a_query_is_promql_of_series_and_labels_that_exist(expr: str) -> None:
    expr = expr.replace("$__rate_interval", "1m").replace("$runtime", ".*")
    promql_parser.parse(expr)
    asked = dict(selectors(expr))
    assert asked, f"no metric in {expr}"
    assert asked.keys() <= SERIES.keys()
    for name, labels in asked.items():
        assert labels <= SERIES[name], name
    available = set.union(*(SERIES[name] for name in asked))
    grouped = {
        label.strip()
        for labels in re.findall(r"\bby \((.*?)\)", expr)
        for label in labels.split(",")
    }
    assert grouped <= available


def known_values() -> set[str]:
    """What labels can say: reasons and codes, and what the daemons' sources write out."""
    written = {
        node.value
        for folder in PACKAGES.values()
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return written | set(ERRORS) | {code.name for code in grpc.StatusCode}


@pytest.mark.parametrize("expr", queries())
def test_a_query_asks_for_values_of_labels_that_there_are(expr: str) -> None:
    """What is renamed in the code would never be found again, and nothing would say so."""
    for label, values in re.findall(r'(\w+)(?:=~|!~|!=|=)"(.*?)"', expr):
        if label not in TARGET_LABELS:
            assert set(values.split("|")) <= known_values(), label


def refusing(metric: str) -> bool:
    """Claims that an alert is about QUEUE_FULL in `metric`."""
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    (refused,) = [rule for rule in rules if rule["alert"] == "MillraceRequestsRefused"]
    return f'rate({metric}{{reason="QUEUE_FULL"}}' in refused["expr"]


def test_an_alert_tells_of_refusals_wherever_clients_are_refused() -> None:
    """A gateway does not ask runtimes that are full, which so count next to nothing of an overload."""
    assert refusing("millrace_gateway_generations_total")
    assert refusing("millrace_generations_total")


def test_legends_name_labels_that_the_query_leaves() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = re.search(r"^(?:sum|max|min) by \((.*?)\)", target["expr"])
            left = set(re.split(r",\s*", grouped[1])) if grouped else TARGET_LABELS
            assert named <= left, f"{panel['title']}: {target['legendFormat']}"


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_dashboard_finds_its_data_source_wherever_it_is_imported() -> None:
    """Its panels ask the variable, and the stack provisions a source of that kind."""
    (variable,) = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "datasource"]
    assert variable["query"] == "prometheus"
    assert {panel["datasource"]["uid"] for panel in panels()} == {"${datasource}"}
    folder = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((folder / "dashboards/millrace.yaml").read_text())["providers"]
    mounts = COMPOSE["services"]["grafana"]["volumes"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_alerts_say_what_is_wrong_with_labels_that_their_query_leaves() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning")
            named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
            asked = [SERIES[name] for name, _ in selectors(rule["expr"])]
            assert named <= set.intersection(*asked), rule["alert"]


def test_every_alert_is_in_the_manual_which_names_no_other() -> None:
    manual = (ROOT / "docs/OPERATIONS.md").read_text()
    alerts = {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
    assert alerts == set(re.findall(r"`(Millrace\w+)`", manual))


def test_prometheus_scrapes_the_stacks_services_where_they_serve_metrics() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert config["rule_files"] == ["/etc/prometheus/alerts.yml"]
    assert "./deploy/prometheus:/etc/prometheus:ro" in COMPOSE["services"]["prometheus"]["volumes"]
    scraped = set()
    for job in config["scrape_configs"]:
        (sd,) = job["dns_sd_configs"]
        for service in sd["names"]:
            ports = COMPOSE["services"][service]["ports"]
            assert any(port.endswith(f":{sd['port']}") for port in ports), service
            scraped.add(service)
    assert scraped == set(COMPOSE["services"]) - {"redis", "registry", "prometheus", "grafana"}
