"""Law 3 for code: an edit that does something is seen, one that does not is not."""

import gc
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared import fingerprint as module
from shared.fingerprint import fingerprint, import_closure

FILES = {
    "shared/__init__.py": '"""Shared."""\n',
    "shared/base.py": "X = 1\n",
    "shared/unused.py": "Y = 1\n",
    "kernels/__init__.py": "",
    "kernels/linear/__init__.py": "",
    "kernels/linear/op.py": "from ..ops import OPS\nimport torch\n",
    "kernels/ops.py": "OPS = ()\n",
    "compiler_service/__init__.py": "",
    "compiler_service/builder.py": '''"""Builds."""
import json
from shared import base


class Builder:
    """A builder."""

    def build(self, n: int = 2) -> int:
        """Builds."""
        from kernels.linear import op  # late
        return n + base.X
''',
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "house"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def of(root: Path) -> str:
    return fingerprint(["compiler_service.builder"], root=root)


def test_closure_follows_every_form_of_import(root: Path) -> None:
    assert set(import_closure(["compiler_service.builder"], root)) == {
        "compiler_service",
        "compiler_service.builder",
        "kernels",
        "kernels.linear",
        "kernels.linear.op",
        "kernels.ops",
        "shared",
        "shared.base",
    }


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("shared/base.py", "X = 1", "X = 2"),
        ("shared/base.py", "X = 1", "X = 1.0"),
        ("shared/base.py", "X = 1", "X = '1'"),
        ("shared/base.py", "X = 1", "X = True"),
        ("kernels/ops.py", "OPS = ()", "OPS = []"),
        ("kernels/linear/__init__.py", "", "Z = 1\n"),
        ("compiler_service/builder.py", "n: int = 2", "n: int = 3"),
        ("compiler_service/builder.py", "return n + base.X", "return n - base.X"),
        ("compiler_service/builder.py", "import json", "import json as j"),
        ("compiler_service/builder.py", "def build", "async def build"),
    ],
)
def test_code_edit_changes_the_fingerprint(root: Path, file: str, old: str, new: str) -> None:
    before = of(root)
    text = (root / file).read_text()
    (root / file).write_text(text.replace(old, new) if old else new)
    assert of(root) != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("shared/base.py", "X = 1", "# what it is\nX  =  1  # one"),
        ("shared/__init__.py", "Shared.", "Other words."),
        ("shared/__init__.py", '"""Shared."""', ""),
        ("compiler_service/builder.py", "A builder.", "The builder."),
        ("compiler_service/builder.py", '        """Builds."""\n', ""),
        ("compiler_service/builder.py", "n + base.X", "(\n            n\n            + base.X\n)"),
        ("compiler_service/builder.py", "  # late", ""),
        ("shared/unused.py", "Y = 1", "Y = 2"),
    ],
)
def test_edit_that_does_nothing_keeps_the_fingerprint(
    root: Path, file: str, old: str, new: str
) -> None:
    before = of(root)
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    assert of(root) == before


def test_moved_folder_keeps_the_fingerprint(root: Path, tmp_path: Path) -> None:
    before = of(root)
    shutil.move(root, tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == before


def test_string_that_is_no_docstring_counts(root: Path) -> None:
    before = of(root)
    (root / "shared/base.py").write_text("X = 1\n'not a docstring'\n")
    assert of(root) != before


def test_moved_code_changes_the_fingerprint(root: Path) -> None:
    before = of(root)
    (root / "shared/base.py").write_text("")
    (root / "shared/__init__.py").write_text("X = 1\n")
    assert of(root) != before


def test_libraries_count() -> None:
    none = fingerprint(["shared.engine"])
    assert len({none, fingerprint(["shared.engine"], ["torch"])}) == 2
    both = fingerprint(["shared.engine"], ["numpy", "torch"])
    assert fingerprint(["shared.engine"], ["torch", "numpy", "torch"]) == both


def test_unknown_module_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no_such"):
        fingerprint(["shared.no_such"])


def test_our_own_code_has_a_fingerprint() -> None:
    assert "shared.errors" in import_closure(["shared.store"])
    assert fingerprint(["shared.store"]) == fingerprint(["shared.store"])
    assert len(fingerprint(["shared.store"])) == 64
    assert module.__name__ not in import_closure(["shared.engine"])


def test_modules_are_read_by_any_number_of_threads_at_once() -> None:
    """Where the garbage collector gives other threads a turn inside the parser, too."""

    def give_way(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)  # lets go of the interpreter

    gc.callbacks.append(give_way)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(import_closure, [["shared.engine"]] * 80))
    finally:
        gc.callbacks.remove(give_way)
    assert len({tuple(sorted(closure)) for closure in found}) == 1
