"""What a benchmark says when something that it needs is not there: a line, not a traceback."""

import ast
import re
import tomllib
import venv
from pathlib import Path

import pytest
import torch
from millrace.runtime.v1 import runtime_pb2 as pb

from bench.cpu_peers import check_peers
from bench.gpu_kernels import read
from bench.gpu_timing import require_gpu
from bench.peer_libraries import peer_libraries
from bench.processes import timed_start
from tests.architecture.test_imports import ROOT


def test_kernels_that_were_not_compiled_are_named_with_what_compiles_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"sm_90\.models\..* python -m bench\.gpu_kernels"):
        read(tmp_path, "sm_90.models")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named() -> None:
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        require_gpu()


def test_daemon_that_ends_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the daemon ended with status"):
        timed_start(pb.StartGeneration(text="a"), "--store", str(tmp_path), "--no-such-flag", "1")


def test_library_that_is_missing_is_named_with_what_installs_it() -> None:
    with (
        pytest.raises(SystemExit, match=r"^no_such_peer is missing: pip install no-such-peer==1$"),
        peer_libraries("no-such-peer==1"),
    ):
        import no_such_peer.part  # type: ignore[import-not-found]  # noqa: F401


def test_peers_that_another_python_lacks_are_named(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False)
    with pytest.raises(SystemExit, match=r"lacks torch, .*openvino_genai: pip install torch=="):
        check_peers(str(tmp_path / "bin/python"))


def test_libraries_of_others_are_imported_where_their_absence_is_told() -> None:
    """What the project does not install for its users, at the head of a benchmark that is run by its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    theirs = {"llmcompressor", "compressed_tensors", "torchao", "transformers", "vllm", "sglang"}
    assert not theirs & {re.split("[^a-z-]", need)[0] for need in project["dependencies"]}
    bare = [
        f"{path.name}: {ast.unparse(statement)}"
        for path in (ROOT / "bench").glob("*.py")
        for statement in ast.parse(path.read_text()).body
        if isinstance(statement, ast.Import | ast.ImportFrom)
        if theirs
        & {part for word in ast.unparse(statement).split() for part in word.split(".")[:1]}
    ]
    assert bare == []
