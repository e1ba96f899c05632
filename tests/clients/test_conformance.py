"""Every client, in every language, behaves alike: the scenarios of clients/conformance."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from millrace.cli.certs import make_certs

from tests.clients.conformance_server import ConformanceServer, Json, load_scenarios
from tests.clients.runners import (
    BUILD_AND_TESTS_TIMEOUT_S,
    CLIENTS,
    LANGUAGES,
    Runner,
    build_with,
)

pytestmark = pytest.mark.timeout(BUILD_AND_TESTS_TIMEOUT_S)

SCENARIOS = load_scenarios()
# In a client's folder, once it is built.
OWN_TESTS = {
    "node": ("node", "--test", "dist/test/client.test.js"),
    "java": ("make", "test"),
    "cpp": ("build/client_test",),
}


@pytest.fixture(scope="module", params=LANGUAGES)
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The runner of one language, built; skipped where its tools are missing, but not on CI."""
    language = LANGUAGES[request.param]
    if missing := language.missing():
        assert not (language.is_required and os.environ.get("CI")), f"CI lacks {missing}"
        pytest.skip(f"the {request.param} client needs {missing}")
    with Runner(language) as started:
        yield started


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a CA, a server's and a client's certificate each: `right` and `wrong`."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("right", "wrong"):
        make_certs(folder / name, [], "client", 2)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_client_behaves_as_the_scenario_tells(
    runner: Runner, certificates: Path, name: str
) -> None:
    scenario = SCENARIOS[name]
    expected = scenario["expect"]
    with ConformanceServer(scenario["server"], certificates / "right", runner.rests) as server:
        results = runner.run(_task(scenario["client"], server.address, certificates))
        seen = server.seen(expected.get("server", {}).get("cancelled", 0))
    problems = _differences(expected["results"], results, "results")
    problems += _differences(expected.get("server", {}), seen, "server")
    assert not problems, "\n".join(problems)


def _task(client: Json, address: str, certificates: Path) -> Json:
    """What the runner is told: names of certificates become paths, repetitions become text."""
    options = dict(client.get("options", {}))
    if "tls_ca" in options:
        options["tls_ca"] = str(certificates / options["tls_ca"] / "ca.crt")
    if "tls_cert" in options:
        own = certificates / options["tls_cert"]
        options |= {"tls_cert": str(own / "client.crt"), "tls_key": str(own / "client.key")}
    return {"address": address, "options": options, "do": [_spelled_out(a) for a in client["do"]]}


def _spelled_out(action: Json) -> Json:
    match action:
        case {"generate": {"prompt": {"repeat": word, "times": times}, **options}}:
            return {**action, "generate": {"prompt": word * times, **options}}
    return action


def _differences(expected: Any, found: Any, where: str) -> list[str]:
    """Where `found` is not as expected; keys that are not expected may have any value."""
    if isinstance(expected, dict) and "at_most" in expected:
        is_less = 0 < found <= expected["at_most"]
        return [] if is_less else [f"{where}: {found}, over {expected['at_most']}"]
    if isinstance(expected, dict) and isinstance(found, dict):
        parts = [(key, expected[key], found.get(key, "(missing)")) for key in expected]
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return [f"{where}: {len(found)} instead of {len(expected)}: {found}"]
        parts = [(str(i), *pair) for i, pair in enumerate(zip(expected, found, strict=True))]
    else:
        is_same = type(expected) is type(found) or not isinstance(expected, bool)
        return [] if is_same and expected == found else [f"{where}: {found!r}, not {expected!r}"]
    return [p for key, *pair in parts for p in _differences(*pair, f"{where}.{key}")]


@pytest.mark.parametrize("name", OWN_TESTS)
def test_client_passes_its_own_tests(name: str) -> None:
    """What a scenario cannot ask of it: wrong uses, other threads, and times that pass."""
    language = LANGUAGES[name]
    if missing := language.missing():
        assert not os.environ.get("CI"), f"CI lacks {missing}"
        pytest.skip(f"the {name} client needs {missing}")
    language.made()
    build_with(*OWN_TESTS[name], cwd=CLIENTS / name)


def test_differences_are_found() -> None:
    """The comparison itself can fail: at a value, a length, a missing key and a limit."""
    same = {"a": [1, {"b": "c"}], "n": 5}
    assert _differences({"a": [1, {"b": "c"}], "n": {"at_most": 5}}, same, "") == []
    for other in ({"a": [1]}, {"a": [1, {"b": "d"}]}, {"z": 1}, {"n": {"at_most": 4}}, {"a": None}):
        assert len(_differences(other, same, "")) == 1
