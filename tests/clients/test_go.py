"""The Go client beside the conformance suite: its own tests, its form, its generated code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.runners import BUILD_AND_TESTS_TIMEOUT_S, CLIENTS, LANGUAGES, build_with, go

pytestmark = pytest.mark.timeout(BUILD_AND_TESTS_TIMEOUT_S)

GO = CLIENTS / "go"
PACKAGES = [f"millrace.io/millrace{folder}" for folder in ("", "/conformance", "/example")]


@pytest.fixture(autouse=True)
def _go_is_there() -> None:
    if missing := LANGUAGES["go"].missing():
        assert not os.environ.get("CI"), f"CI lacks {missing}"
        pytest.skip(f"the go client needs {missing}")


def test_go_client_passes_its_own_tests() -> None:
    """What a scenario cannot ask of it: contexts, wrong uses, races, and that nothing is left."""
    go("test", "-race", "-count=1", PACKAGES[0])


def test_go_sources_are_formatted_and_pass_vet() -> None:
    sources = [str(path) for path in GO.rglob("*.go") if "build" not in path.parts]
    done = subprocess.run(["gofmt", "-l", *sources], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    go("vet", *PACKAGES)


def test_go_code_is_that_of_the_protos(tmp_path: Path) -> None:
    """After an edit of protos/, run `make protos`."""
    build_with("env", f"PYTHON={sys.executable}", str(GO / "generate.sh"), str(tmp_path))
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.go")}
    kept = {path.relative_to(GO / "gen"): path.read_text() for path in GO.glob("gen/**/*.go")}
    versions = [_plugin_versions(files) for files in (kept, fresh)]
    if versions[0] != versions[1]:
        pytest.skip(f"gen/ is of {versions[0]}; here is {versions[1]}")
    assert kept.keys() == fresh.keys()
    assert [str(path) for path in fresh if kept[path] != fresh[path]] == []


def _plugin_versions(files: dict[Path, str]) -> set[str]:
    return {v for text in files.values() for v in re.findall(r"protoc-gen-go v\S+", text)}
