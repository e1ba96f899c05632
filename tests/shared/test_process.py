"""What a process keeps of the bytecode that it compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.process import keep_bytecode

_PROGRAM = """
import sys
from shared.process import keep_bytecode
keep_bytecode("plain")
import plain
print(plain.__cached__, plain.__doc__)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A module without bytecode."""
    folder = tmp_path / "site"
    folder.mkdir()
    path = folder / "plain.py"
    path.write_text('"""first"""\n')
    return path


def imported(source: Path, *, home: Path | str, **environment: str) -> list[str]:
    """Where a fresh process has the module's bytecode, and its docstring."""
    root = Path(__file__).parents[2]
    environment |= {"HOME": str(home), "PYTHONPATH": f"{source.parent}{os.pathsep}{root}"}
    program = [sys.executable, "-c", _PROGRAM]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.split()


def test_bytecode_is_kept_in_the_cache_where_it_may_not_lie_beside_the_sources(
    source: Path, tmp_path: Path
) -> None:
    kept, text = imported(source, home=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert Path(kept).is_relative_to(tmp_path / ".cache/millrace/bytecode")
    assert Path(kept).exists()
    assert text == "first"
    assert not (source.parent / "__pycache__").exists()
    # Bytecode of the same second and size is taken for the source's.
    status = source.stat()
    source.write_text('"""other"""\n')
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert imported(source, home=tmp_path, PYTHONDONTWRITEBYTECODE="1") == [kept, "first"]


def test_a_changed_source_is_compiled_again(source: Path, tmp_path: Path) -> None:
    imported(source, home=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    source.write_text('"""second"""\n')
    assert imported(source, home=tmp_path, PYTHONDONTWRITEBYTECODE="1")[1] == "second"


def test_bytecode_beside_the_sources_is_left_to_python(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    beside = Path(imported(source, home=home)[0])
    assert beside.parent == source.parent / "__pycache__"
    assert beside.exists()
    assert imported(source, home=home, PYTHONDONTWRITEBYTECODE="1")[0] == str(beside)
    assert not home.exists()


def test_a_prefix_that_the_user_chose_stays(source: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    kept, _ = imported(source, home=tmp_path / "home", PYTHONPYCACHEPREFIX=str(chosen))
    assert Path(kept).is_relative_to(chosen)
    assert not (tmp_path / "home").exists()


def test_without_a_home_every_start_compiles(source: Path) -> None:
    kept, text = imported(source, home="/proc/none", PYTHONDONTWRITEBYTECODE="1")
    assert text == "first"
    assert not Path(kept).exists()


def test_a_package_that_is_missing_changes_nothing() -> None:
    before = sys.pycache_prefix, sys.dont_write_bytecode
    keep_bytecode("no_such_package")
    assert (sys.pycache_prefix, sys.dont_write_bytecode) == before


@pytest.mark.parametrize(("said", "kept"), [(None, "NONE"), ("debug", "debug")])
def test_grpcs_core_writes_nothing_unless_somebody_says_otherwise(
    said: str | None, kept: str
) -> None:
    program = "import os; from shared.process import quiet_grpc; quiet_grpc(); print(os.environ['GRPC_VERBOSITY'])"
    environ = {"PYTHONPATH": str(Path(__file__).parents[2])} | (
        {"GRPC_VERBOSITY": said} if said else {}
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True
    )
    assert ran.stdout.strip() == kept
