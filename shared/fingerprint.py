"""A digest of code: what a module and all that it imports of ours *do*, not how they are written.

Comments, docstrings, formatting and the place of the folder do not change it; any other edit does.
Modules are read, never imported. Imports that are strings at run time are not seen.
"""

import ast
import hashlib
import threading
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGES = ("shared", "kernels", "compiler_service")

# CPython 3.11 counts the depth of what it parses for all threads together: two that parse at once fail with a
# SystemError where the collector runs in between. Source: python/cpython#106905.
_parsing = threading.Lock()


def fingerprint(
    modules: Iterable[str],
    libraries: Iterable[str] = (),
    root: Path = Path(__file__).parents[1],
) -> str:
    """A hexadecimal digest of the modules' import closure within our own packages.

    Args:
        modules: dotted names, such as `compiler_service.passes`.
        libraries: distributions whose versions count too, such as `triton`.
        root: the folder that holds our packages.
    Raises:
        AssertionError: a module does not exist.
    """
    digest = hashlib.sha256()
    for name, tree in sorted(import_closure(modules, root).items()):
        code = hashlib.sha256(_spell(_without_docstrings(tree)).encode()).hexdigest()
        digest.update(f"{name} {code}\n".encode())
    for library in sorted(set(libraries)):
        digest.update(f"{library}=={metadata.version(library)}\n".encode())
    return digest.hexdigest()


def import_closure(
    modules: Iterable[str], root: Path = Path(__file__).parents[1]
) -> dict[str, ast.Module]:
    """The modules, and all of ours that they import, by name; packages run with their modules."""
    closure: dict[str, ast.Module] = {}
    waiting = list(modules)
    for name in waiting:
        assert _source(name, root) is not None, f"there is no module {name!r}"
    while waiting:
        name = waiting.pop()
        source = _source(name, root)
        if name in closure or source is None or name.partition(".")[0] not in PACKAGES:
            continue
        with _parsing:
            tree = closure[name] = ast.parse(source.read_bytes(), filename=str(source))
        waiting += _imports(tree, name, is_package=source.name == "__init__.py")
        waiting += _parents(name)
    return closure


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = _package_of(node, module, is_package)
            # `from a import b`: b may be a module of a.
            names += [package, *(f"{package}.{alias.name}" for alias in node.names)]
    return names


def _package_of(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _source(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    for candidate in (path / "__init__.py", path.with_name(path.name + ".py")):
        if candidate.is_file():
            return candidate
    return None


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest
    return tree


def _spell(value: object) -> str:
    # Not `ast.dump`: newer Pythons give nodes new fields, which are empty for the same code.
    if isinstance(value, ast.Constant):
        return f"{type(value.value).__name__}:{value.value!r}"
    if isinstance(value, ast.AST):
        fields = ((name, getattr(value, name, None)) for name in value._fields)
        spelled = (f"{name}={_spell(field)}" for name, field in fields if field not in (None, []))
        return f"{type(value).__name__}({', '.join(spelled)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    return repr(value)
