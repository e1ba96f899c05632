"""House rules of the sources that a linter does not know."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_imports import PACKAGES, ROOT, sources

FILES = [path for folder in PACKAGES.values() for path in sources(folder)]
VAGUE = {"utils.py", "util.py", "helpers.py", "common.py", "base.py", "misc.py"}
# Daemons are told by settings. kernels/aot.py gives Triton's own variables to its child processes.
READ_ENVIRONMENT = {"shared/settings.py", "kernels/aot.py"}
# Where a process or a request ends, anything may arrive: it is logged, and told as INTERNAL.
CATCH_EVERYTHING = {
    "clients/python/millrace/cli/app.py",
    "compiler_service/build_child.py",
    "compiler_service/compiler.py",
    "compiler_service/worker.py",
    "runtime_service/engine_process.py",
    "runtime_service/gateway/http/server.py",
    "runtime_service/runtime.py",
    "shared/edge.py",
}
# About 300 is the aim; beyond this a file is cut by noun.
MAX_FILE_LINES = 620


def name_of(path: Path) -> str:
    """`path` as people write it."""
    return str(path.relative_to(ROOT))


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of `kind` in the sources, and the file it is in."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield name_of(path), node


def test_no_file_has_a_vague_name() -> None:
    assert [name_of(path) for path in FILES if path.name in VAGUE] == []


def test_every_file_opens_with_what_it_is_for() -> None:
    bare = [
        name_of(path)
        for path in FILES
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert bare == []


def test_files_stay_readable() -> None:
    long = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES} == {}


def test_environment_is_read_in_one_place() -> None:
    read = {
        name
        for name, node in nodes(ast.Attribute)
        if ast.unparse(node) in ("os.environ", "os.environb", "os.getenv")
    }
    assert {n for n in read if "/cli/" not in n} - READ_ENVIRONMENT == set()


def test_nothing_is_swallowed() -> None:
    """`except Exception` belongs to the edges of processes; a bare `except` to nobody."""
    broad = {
        name
        for name, node in nodes(ast.ExceptHandler)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or "Exception" in ast.unparse(node.type).split(", "))
    }
    assert broad - CATCH_EVERYTHING == set()


def test_nothing_is_left_to_do_in_comments() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    left = [name_of(p) for p in FILES if any(f"# {m}" in p.read_text() for m in marks)]
    assert left == []


@pytest.mark.parametrize("kind", [ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef])
def test_public_things_say_what_they_give(kind: type[ast.AST]) -> None:
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            is_public = isinstance(node, kind) and not node.name.startswith("_")
            if is_public and ast.get_docstring(node) is None:
                bare.append(f"{name_of(path)}: {node.name}")
    assert bare == []
