"""The wire contract: it lints, and the generated code in the repository is that of the protos."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.architecture.test_imports import ROOT

PROTOS = ROOT / "protos"
FILES = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
PYTHON = ROOT / "clients/python"
BIN = Path(sys.executable).parent


def protoc(*arguments: str) -> None:
    """Runs the compiler of the pinned grpcio-tools over all protos."""
    site = sysconfig.get_path("purelib")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTOS), "-I", site, *arguments,
         *FILES],
        check=True, timeout=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with freshly generated code."""
    out = tmp_path_factory.mktemp("generated")
    protoc(
        f"--plugin=protoc-gen-mypy={BIN}/protoc-gen-mypy",
        f"--plugin=protoc-gen-mypy_grpc={BIN}/protoc-gen-mypy_grpc",
        f"--python_out={out}", f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}",
    )  # fmt: skip
    return out


def test_generated_code_is_up_to_date(generated: Path) -> None:
    """After an edit of protos/, run `make protos`."""
    fresh = {path.relative_to(generated) for path in generated.rglob("*_pb2*")}
    kept = {
        path.relative_to(PYTHON)
        for path in PYTHON.rglob("*_pb2*")
        if path.suffix in (".py", ".pyi")
    }
    assert kept == fresh
    stale = [str(p) for p in fresh if (PYTHON / p).read_text() != (generated / p).read_text()]
    assert stale == []


def test_protos_pass_buf_lint(tmp_path: Path) -> None:
    image = tmp_path / "protos.binpb"
    protoc("--include_imports", "--include_source_info", "-o", str(image))
    done = subprocess.run(
        [BIN / "buf", "lint", image, "--config", "buf.yaml"],
        cwd=PROTOS, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
