"""Every table is walked: its rows are what they say, under the names that they have."""

import re
from pathlib import Path

import pytest
from grpc import StatusCode
from millrace.errors import MillraceError as SdkError
from millrace.retries import Retries

from compiler_service.checkpoints.sample import SAMPLES
from kernels.linear.layouts import LAYOUTS
from kernels.ops import OPS
from runtime_service import line_outside
from shared.arch import ARCHES
from shared.auth import RPC_SCOPES
from shared.errors import ERRORS, MillraceError
from shared.store import STORES
from tests.architecture.test_imports import ROOT

ARCHITECTURE = (ROOT / "docs/ARCHITECTURE.md").read_text()
API = ROOT / "docs/API.md"


@pytest.mark.parametrize("name", OPS)
def test_op_lives_in_its_folder_and_in_the_manual(name: str) -> None:
    op = OPS[name]
    assert op.name == name
    assert (ROOT / "kernels" / name / "op.py").is_file()
    assert f"`{name}`" in ARCHITECTURE


def test_every_op_folder_has_a_row() -> None:
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/op.py")}
    assert folders == set(OPS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_in_the_manual(name: str) -> None:
    assert f"`{name}`" in ARCHITECTURE


@pytest.mark.parametrize("name", ARCHES)
def test_arch_is_called_by_its_capability(name: str) -> None:
    arch = ARCHES[name]
    assert arch.name == name
    assert arch.is_gpu == (arch.max_shared_bytes > 0)
    if arch.capability is not None:
        assert name == "sm_{}{}".format(*arch.capability)


@pytest.mark.parametrize("reason", ERRORS)
def test_error_is_one_sentence_and_is_documented(reason: str) -> None:
    row = ERRORS[reason]
    assert issubclass(row, MillraceError)
    assert row.reason == reason
    assert row.template[0].isupper() or row.template[0] == "{"
    # Those without a delay of their own may be told one where they are raised.
    retry = "(, retry)?" if row.default_retry_after_s is None else ", retry"
    assert re.search(rf"^\| `{reason}` \| {row.code.name}{retry} \|", API.read_text(), re.M)


def test_scopes_in_the_manual_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(generate|build|admin)` \| (.*) \|$", API.read_text(), re.M)
    documented = {
        (scope, name.rpartition(".")[2])
        for scope, rpcs in rows
        for name in re.findall(r"`(.*?)`", rpcs)
    }
    kserve = "GRPCInferenceService"
    expected = {
        (scope, kserve if kserve in rpc else rpc.rpartition("/")[2])
        for rpc, scope in RPC_SCOPES.items()
    }
    assert documented == expected


def test_every_error_has_a_row() -> None:
    def descendants(kind: type) -> set[type]:
        return {kind for child in kind.__subclasses__() for kind in {child, *descendants(child)}}

    assert descendants(MillraceError) == set(ERRORS.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_pins_a_version_that_the_makefile_installs(name: str) -> None:
    sample = SAMPLES[name]
    assert f"{sample.distribution}=={sample.version}" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("scheme", STORES)
def test_store_scheme_is_in_the_manual(scheme: str) -> None:
    assert scheme in Path(ROOT / "docs/OPERATIONS.md").read_text()


# Where a client that is not Python says how long a wait it takes by default, and how many of that are a second.
MAX_DELAYS = {
    "node/src/retries.ts": (r"maxDelayS = ([\d.]+)", 1),
    "go/retries.go": (r"MaxDelay = (\d+) \* time\.Second", 1),
    "java/src/main/java/dev/millrace/Retries.java": (
        r"new Retries\(4, Duration\.ofMillis\(100\), Duration\.ofSeconds\((\d+)\)\)",
        1,
    ),
    "cpp/include/millrace/retries.h": (r"milliseconds max_delay\{([\d']+)\}", 1000),
}


@pytest.mark.parametrize("source", MAX_DELAYS)
def test_client_waits_for_as_long_as_a_full_queue_may_ask(source: str) -> None:
    pattern, per_second = MAX_DELAYS[source]
    (found,) = re.findall(pattern, (ROOT / "clients" / source).read_text())
    assert float(found.replace("'", "")) / per_second == line_outside.MOST_S


def test_python_waits_for_as_long_as_a_full_queue_may_ask() -> None:
    longest = SdkError(
        "Busy.",
        "QUEUE_FULL",
        StatusCode.RESOURCE_EXHAUSTED,
        retry_after_s=line_outside.MOST_S,
    )
    assert Retries().max_delay_s == line_outside.MOST_S
    assert Retries().delay_s(longest, attempt=1)


@pytest.mark.parametrize(
    ("page", "said"),
    [("API", "where that is at most {:g} s"), ("CLIENTS", "`max_delay_s` ({:g} s")],
)
def test_wait_that_clients_take_is_in_the_manual(page: str, said: str) -> None:
    assert said.format(line_outside.MOST_S) in (ROOT / f"docs/{page}.md").read_text()
