"""The SDK as its own users have it: built, installed without anything of the daemons, type-checked."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.clients.runners import CLIENTS, ROOT
from tests.clients.scripted_daemon import WORDS, ScriptedDaemon

PYTHON = CLIENTS / "python"
# What it declares, and what these need themselves.
NEEDS = ("grpcio", "protobuf", "googleapis-common-protos", "typing_extensions")
STUBS = ("types-grpcio", "types-protobuf")
TYPED = """
import asyncio
from typing import assert_type

import millrace


async def ask() -> float:
    async with millrace.AsyncClient(runtime="a:1", retries=millrace.Retries()) as client:
        async with client.generate([{"role": "user", "content": "Hi"}], stop="END") as stream:
            async for chunk in stream:
                assert_type(chunk.text, str)
        assert_type(stream.result, millrace.Generation)
        return (await client.generate([1, 2], max_new_tokens=4).wait()).tokens_per_s


messages: list[millrace.Message] = [{"role": "user", "content": "Hi"}]
written: list[dict[str, str]] = [{"role": "user", "content": "Hi"}]
for prompt in ("Hi", (1, 2), messages, written):
    millrace.Client("a:1").generate(prompt)
assert_type(asyncio.run(ask()), float)
"""
MISTYPED = """
import millrace

millrace.Client().generate("hi", max_new_tokens="many")
"""


def output_of(*command: str | Path, cwd: Path = PYTHON) -> str:
    """What a program says; fails with all of it where it fails."""
    run = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built package."""
    folder = tmp_path_factory.mktemp("wheel")
    output_of(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (built,) = folder.glob("millrace-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the package, and of all that is installed only what it needs."""
    folder = tmp_path_factory.mktemp("environment")
    output_of(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in (*NEEDS, *STUBS):
        for file in distribution(name).files or ():
            if not file.parts[0].startswith(("..", "__pycache__")):
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.symlink_to(Path(str(file.locate())).resolve())
    return folder / "bin/python"


def test_package_has_no_command_and_says_that_it_is_typed(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "millrace/py.typed",
        "millrace/client.py",
        "millrace/runtime/v1/runtime_pb2.pyi",
    } < files
    assert not [file for file in files if "/cli/" in file or "/kserve/" in file]
    whole, alone = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        for folder in (ROOT, PYTHON)
    )
    assert whole["version"] == alone["version"]


def test_every_module_of_the_package_is_imported_with_what_it_declares(python: Path) -> None:
    program = (
        "import millrace, pkgutil, importlib; names = [found.name for found in"
        " pkgutil.walk_packages(millrace.__path__, 'millrace.')];"
        "[importlib.import_module(name) for name in names];"
        "print(*names, *(getattr(millrace, name).__name__ for name in ('Client', 'Retries')))"
    )
    names = output_of(python, "-W", "error", "-c", program, cwd=python.parent).split()
    assert {"millrace.session", "millrace.compiler.v1.compiler_pb2_grpc", "Retries"} <= set(names)


def test_the_readmes_program_streams(python: Path, daemon: ScriptedDaemon, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (PYTHON / "README.md").read_text(), re.S)
    (tmp_path / "program.py").write_text(program)
    told = output_of(python, tmp_path / "program.py", daemon.address, cwd=tmp_path)
    said = "".join(WORDS[place % len(WORDS)] for place in range(64))
    assert told == f"{said}\n315 tokens/s\n"


def test_programs_that_use_the_package_are_type_checked(python: Path, tmp_path: Path) -> None:
    """As mypy sees installed packages: one without `py.typed` has no types."""
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(TYPED)
    wrong.write_text(MISTYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", python, right, wrong],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    problems = checked.stdout.splitlines()
    assert len(problems) == 2, checked.stdout
    assert problems[0].startswith(f'{wrong.name}:4: error: Argument "max_new_tokens"')
