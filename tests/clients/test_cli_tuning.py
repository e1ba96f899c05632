"""`millrace tune`: what it says of what was measured, and of a machine where nothing can be."""

import json
import subprocess
import sys

import pytest
from millrace.cli import machine
from millrace.cli.failures import CommandFailed
from millrace.cli.tuning import program, tune

_SITE = {
    "op": "linear", "tokens": 1, "sequences": 0, "n": 28672, "k": 4096, "dtype": "bf16",
    "layout": "fp8_channel", "rides": "norm+silu_mul", "built_in": "m1 n2 k2048 w4",
    "built_in_us": 40.0, "choice": "m1 n1 k1024 w1", "choice_us": 38.0,
}  # fmt: skip
_KEPT = {**_SITE, "n": 128, "choice": _SITE["built_in"], "choice_us": 40.0}
_LAST = {
    "record": {"gpu": "NVIDIA Test", "sites": [_SITE, _KEPT]},
    "engine": "engines/" + "ab" * 32,
    "published": ["local", "remote"],
}


def _saying(*lines: object, error: str = "", code: int = 0) -> list[str]:
    """A program that says these lines, and ends."""
    text = "\n".join(json.dumps(line) for line in lines)
    return [
        sys.executable, "-c",
        f"import sys; print({text!r}); sys.stderr.write({error!r}); sys.exit({code})",
    ]  # fmt: skip


def test_table_shows_what_changed_and_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    tune(_saying({"site": _SITE}, {"site": _KEPT}, _LAST), as_json=False)
    said = capsys.readouterr()
    for part in ("linear", "M<=1", "28672x4096 bf16 fp8_channel norm+silu_mul", "m1 n2 k2048 w4",
                 "40.00", "m1 n1 k1024 w1", "38.00", "5.0%",
                 "1 of 2 choices changed on NVIDIA Test", "local and remote"):  # fmt: skip
        assert part in said.out, part
    assert "128x4096" not in said.out
    assert "kept" in said.err, "each site is told while it is measured"


def test_json_is_the_last_line_as_it_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    tune(_saying({"site": _SITE}, _LAST), as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out) == _LAST
    assert said.err == ""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("noise\nmillrace tune: Engine x was not found.\n", 1, "Engine x was not found."),
        ("", 137, "it ended with 137"),
        ("", 0, "it ended with 0"),
    ],
)
def test_failure_is_the_programs_last_word(error: str, code: int, told: str) -> None:
    with pytest.raises(CommandFailed) as failed:
        tune(_saying({"site": _SITE}, error=error, code=code), as_json=False)
    assert str(failed.value) == told
    assert failed.value.exit_code == (code or 1)


def test_program_is_a_runtimes_with_its_own_flags() -> None:
    command = program("m", "fp8", "s3://b/p", "")
    assert command[1:3] == ["-m", "runtime_service.tune"]
    assert "--compiler" not in command
    assert program("m", "fp8", "s3://b/p", "c:1")[-2:] == ["--compiler", "c:1"]


@pytest.mark.skipif(not isinstance(machine.nvidia_driver(), str), reason="there is a GPU here")
def test_no_gpu_is_told_in_one_line() -> None:
    command = [sys.executable, "-m", "millrace.cli", "tune", "some-model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("millrace: there is no NVIDIA GPU here to measure on: ")
    assert done.stderr.count("\n") == 1
