"""The build child, as its parent sees it: lines of JSON, exit statuses, and no remains."""

import base64
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.rpc import status_pb2

from compiler_service.build_child import CANCELLED_STATUS
from compiler_service.resolve import resolve
from shared.engine import QuantConfig
from shared.errors import InvalidModel, from_status
from shared.store.local import LocalStore
from tests.checkpoints import tiny_config, write_checkpoint


def _job(model_uri: str, tmp_path: Path) -> dict[str, Any]:
    resolved = resolve(model_uri, ["cpu"], QuantConfig("int8"), "", tmp_path)
    return {
        "model_uri": model_uri,
        "model": resolved.model,
        "key": resolved.keys["cpu"].to_dict(),
        "store": str(tmp_path / "store"),
        "cache_dir": str(tmp_path),
    }


def _start(job: dict[str, Any]) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-m", "compiler_service.build_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(job) + "\n")
    child.stdin.flush()
    return child


def _error(out: str) -> status_pb2.Status:
    last = json.loads(out.splitlines()[-1])
    return status_pb2.Status.FromString(base64.b64decode(last["error"]))


def test_child_reports_progress_and_then_the_engine(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    job = _job(str(folder), tmp_path)
    out, err = _start(job).communicate(timeout=120)
    *progress, last = [json.loads(line) for line in out.splitlines()]
    (engine,) = LocalStore(tmp_path / "store").list()
    assert last == {"engine": engine.name}
    assert engine.key.to_dict() == job["key"]
    assert progress[0]["stage"] == "import"
    assert set(progress[0]) == {"stage", "fraction", "done_bytes", "total_bytes"}
    assert json.loads(err.splitlines()[-1])["event"] == "build_succeeded"


def test_child_says_why_it_failed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_shards=2)
    job = _job(str(folder), tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    child = _start(job)
    out, _ = child.communicate(timeout=120)
    status = status_pb2.Status.FromString(
        base64.b64decode(json.loads(out.splitlines()[-1])["error"])
    )
    assert isinstance(from_status(status), InvalidModel)
    assert "model-00002-of-00002.safetensors is missing" in status.message
    assert child.returncode == 1


def test_child_says_internal_and_leaks_nothing_when_it_is_at_fault(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    job = {**_job(str(folder), tmp_path), "store": 7}
    out, err = _start(job).communicate(timeout=120)
    status = status_pb2.Status.FromString(
        base64.b64decode(json.loads(out.splitlines()[-1])["error"])
    )
    assert from_status(status).reason == "INTERNAL"
    assert "Traceback" in err
    assert "Traceback" not in status.message


@pytest.fixture
def big_job(tmp_path: Path) -> dict[str, Any]:
    """A build of a second and more: 200 MB of weights."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 16384}
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config("llama", **sizes)))
    return _job(f"random:{folder}?seed=1", tmp_path)


def test_child_leaves_nothing_when_it_is_told_to_stop(
    tmp_path: Path, big_job: dict[str, Any]
) -> None:
    child = _start(big_job)
    assert child.stdout is not None
    for line in child.stdout:
        if json.loads(line)["stage"] == "quantize":
            break
    child.send_signal(signal.SIGTERM)
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == CANCELLED_STATUS
    assert all("stage" in json.loads(line) for line in rest.splitlines())
    assert LocalStore(tmp_path / "store").list() == ()
    assert list((tmp_path / "store" / "partial").iterdir()) == []
    assert list((tmp_path / "store" / "pins").iterdir()) == []


def test_next_build_succeeds_when_a_child_was_killed(
    tmp_path: Path, big_job: dict[str, Any]
) -> None:
    child = _start(big_job)
    assert child.stdout is not None
    for line in child.stdout:
        if json.loads(line)["stage"] == "quantize":
            break
    child.kill()
    child.communicate(timeout=60)
    assert LocalStore(tmp_path / "store").list() == ()
    out, _ = _start(big_job).communicate(timeout=120)
    (engine,) = LocalStore(tmp_path / "store").list()
    assert json.loads(out.splitlines()[-1]) == {"engine": engine.name}
    LocalStore(tmp_path / "store").sweep(grace_s=0)
    assert list((tmp_path / "store" / "partial").iterdir()) == []
    LocalStore(tmp_path / "store").verify(engine)
