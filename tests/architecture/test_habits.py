"""House rules of the sources that a linter does not know."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_imports import PACKAGES, ROOT, sources

FILES = [path for folder in PACKAGES.values() for path in sources(folder)]
VAGUE = {"utils.py", "util.py", "helpers.py", "common.py", "base.py", "misc.py"}
# Daemons are told by settings. kernels/aot.py gives Triton's own variables to its child processes.
# `process` tells a library of its silence, before settings could be imported.
READ_ENVIRONMENT = {"shared/settings.py", "shared/process.py", "kernels/aot.py"}
# Where a process or a request ends, anything may arrive: it is logged, and told as INTERNAL.
CATCH_EVERYTHING = {
    "clients/python/millrace/cli/app.py",
    "compiler_service/build_child.py",
    "compiler_service/compiler.py",
    "compiler_service/worker.py",
    "runtime_service/engine_process.py",
    "runtime_service/gateway/http/server.py",
    "runtime_service/engine_keeper.py",
    "shared/background.py",
    "shared/edge.py",
}
# What daemons are made of.
DAEMONS = ("shared", "compiler_service", "runtime_service")
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


def test_tasks_that_nobody_awaits_are_started_in_one_place() -> None:
    """A task is its function's own, which waits for it by name, or `Background` hears how it ends."""
    lost = []
    for path in (path for package in DAEMONS for path in sources(PACKAGES[package])):
        tree = ast.parse(path.read_text())
        own = [task for function in ast.walk(tree) for task in tasks_waited_for(function)]
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and starts_task(call) and call not in own:
                lost.append(f"{name_of(path)}:{call.lineno}")
    assert [one.partition(":")[0] for one in lost] == ["shared/background.py"], lost


def starts_task(call: ast.Call) -> bool:
    """Claims that it has a coroutine run beside its caller."""
    return ast.unparse(call.func).rpartition(".")[2] in ("create_task", "ensure_future")


def tasks_waited_for(function: ast.AST) -> list[ast.expr]:
    """What `function` gives a name, and waits for by that name."""
    if not isinstance(function, ast.AsyncFunctionDef):
        return []
    named = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    waits = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Await)]
    return [task for name, task in named.items() if re.search(rf"\b{name}\b", " ".join(waits))]


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
