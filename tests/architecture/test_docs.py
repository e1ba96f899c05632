"""The manual says what is there: commands, settings, metrics, links."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from google.protobuf import json_format, message_factory
from millrace.artifact.v1 import artifact_pb2
from millrace.cli.app import app
from millrace.cli.building import parse_quant
from millrace.cli.failures import CommandFailed
from millrace.compiler.v1 import compiler_pb2
from millrace.fleet.v1 import fleet_pb2
from millrace.kserve.v2 import inference_pb2
from millrace.runtime.v1 import runtime_pb2
from prometheus_client import CollectorRegistry
from typer.core import TyperGroup
from typer.exceptions import TyperException

from compiler_service.metrics import CompilerMetrics
from compiler_service.quantization import scheme_named
from compiler_service.settings import CompilerSettings
from runtime_service.gateway.metrics import GatewayMetrics
from runtime_service.gateway.settings import GatewaySettings
from runtime_service.metrics import RuntimeMetrics
from runtime_service.settings import RuntimeSettings
from shared.background import FAILURES
from shared.edge import EdgeInterceptor
from shared.engine import QuantConfig
from shared.errors import UnsupportedQuant
from shared.settings import Settings, SettingsError, flag_of, variable_of
from tests.architecture.test_imports import PACKAGES, ROOT, sources

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
OPERATIONS = (ROOT / "docs/OPERATIONS.md").read_text()
# How a command line that is none is answered.
REFUSED = (TyperException, SystemExit, SettingsError, CommandFailed, UnsupportedQuant)


def in_pages(pattern: str) -> set[str]:
    """Everything in the manual that matches the pattern's group."""
    return {found for page in PAGES for found in re.findall(pattern, page.read_text(), re.M)}


def test_every_command_that_is_named_exists() -> None:
    named = in_pages(r"(?:^|`)millrace ([a-z]+)")
    assert named, "no page names a command"
    done = subprocess.run(
        [sys.executable, "-m", "millrace.cli", "--help"], capture_output=True, text=True, timeout=60
    )
    assert named - set(re.findall(r"^  (\w+) ", done.stdout, re.M)) == set()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert in_pages(r"(?:^|`)make (\w+)") - targets == set()


def test_options_of_commands_in_the_manual_exist() -> None:
    shell = "\n".join(page.read_text().replace("\\\n", " ") for page in PAGES)
    known = {}
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        for path, one in ((name, command), *subcommands(name, command)):
            known[path] = {option for parameter in one.params for option in parameter.opts}
    for daemon in (CompilerSettings, RuntimeSettings, GatewaySettings):
        flags = {flag_of(field) for field in daemon.model_fields}
        known[daemon.component] = flags | {flag.replace("--", "--no-", 1) for flag in flags}
    used = re.findall(r"\bmillrace(?:-| )([a-z]+)((?: [^`\n#>|;]*)?)", shell)
    num_options = 0
    for name, rest in used:
        words = rest.split()
        path = f"{name} {words[0]}" if words and f"{name} {words[0]}" in known else name
        options = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        num_options += len(options)
        assert options - known.get(path, set()) - {"--help"} == set(), f"millrace {name}{rest}"
    assert num_options > 80, "the manual shows commands with options"


def shown_commands() -> list[list[str]]:
    """Every command of ours in blocks of the manual and of clients' READMEs, as a shell divides it."""
    found = []
    for page in (*PAGES, *sorted((ROOT / "clients").glob("*/README.md"))):
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            if language != "sh":  # then it may be of a terminal, with what is answered
                lines = [line[2:] for line in lines if line.startswith("$ ")]
            for line in lines:
                found += [words for words in commands_of(line) if "millrace" in words[0]]
    return found


def commands_of(line: str) -> list[list[str]]:
    """The commands of a line of shell, without assignments, redirections and comments."""
    line = re.sub(r"\$\([^)]*\)", "VALUE", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if set(word) <= set("<>"):
            next(words)
        elif set(word) <= set("&|;"):
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [command for command in commands if command]


def parses(command: list[str]) -> None:
    """Asserts that a command of ours is one: it and its options exist, and values are of their kinds.

    Raises:
        one of REFUSED: it is none.
    """
    program, *arguments = command
    for daemon in (CompilerSettings, RuntimeSettings, GatewaySettings):
        if program == f"millrace-{daemon.component}":
            settings = daemon.parse(arguments, {})
            check_scheme(getattr(settings, "quant", "fp32"))
            return
    assert program == "millrace", program
    one, path = typer.main.get_command(app), [program]
    while isinstance(one, TyperGroup):
        path.append(arguments.pop(0))
        assert path[-1] in one.commands, path
        one = one.commands[path[-1]]
    given = one.make_context(" ".join(path), arguments).params
    if given.get("quant"):
        check_scheme(given["quant"])


def check_scheme(text: str) -> None:
    """Asserts that there is such a scheme, with such groups and such a cache."""
    scheme, group_size, kv_cache = parse_quant(text)
    quant = QuantConfig(scheme, group_size=group_size, kv_cache=kv_cache)
    scheme_named(quant).resolve(quant)


def test_commands_that_are_shown_parse() -> None:
    commands = shown_commands()
    programs = {command[0] for command in commands}
    assert programs == {"millrace", "millrace-compiler", "millrace-runtime", "millrace-gateway"}
    assert len(commands) > 50, "the manual shows commands"
    for command in commands:
        try:
            parses(command)
        except REFUSED as error:
            pytest.fail(f"{shlex.join(command)}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "millrace build ./model --archs cpu",
        "millrace build ./model --quant int5",
        "millrace deploy chat",
        "millrace deploy chat --model tiny --replicas two",
        "millrace keys make ops",
        "millrace heath a:1",
        "millrace health a:1 b:2",
        "millrace health a:1 --no",
        "millrace-gateway --runtime a:1",
        "millrace-runtime --listen 7602",
        "millrace-compiler --lease-s long > log",
    ],
)
def test_command_that_does_not_parse_is_found(line: str) -> None:
    with pytest.raises((*REFUSED, AssertionError)):
        parses(*commands_of(line))


def subcommands(name: str, command: object) -> list[tuple[str, Any]]:
    """The commands of a group, by their full names."""
    if not isinstance(command, TyperGroup):
        return []
    return [(f"{name} {child}", one) for child, one in command.commands.items()]


def test_benchmarks_that_are_named_exist_and_take_what_they_are_given() -> None:
    """The manual's commands, and those that benchmarks tell of themselves."""
    pattern = r"(python (?:-m bench\.|bench/)[^`\n;#]*)"
    told = {
        found
        for path in (ROOT / "bench").glob("*.py")
        for found in re.findall(pattern, ast.get_docstring(ast.parse(path.read_text())) or "")
    }
    commands = in_pages(pattern) | told
    assert len(commands) > 60, "the manual names its benchmarks"
    for command in commands:
        # Prose may stand behind a command of a docstring, at some distance or in parentheses.
        line = re.split(r"  +| \(", command.translate({ord(c): None for c in "[]"}))[0]
        words = shlex.split(line)
        module = re.fullmatch(r"bench[./](\w+)(?:\.py)?", words[1 + (words[1] == "-m")])
        assert module is not None, command
        arguments = words[2 + (words[1] == "-m") :]
        path = ROOT / f"bench/{module[1]}.py"
        assert path.is_file(), command
        if arguments:  # else it is only named
            try:
                parser_of(path).parse_args(arguments)
            except SystemExit:
                pytest.fail(f"{command} does not parse")


def parser_of(path: Path) -> argparse.ArgumentParser:
    """A benchmark's parser, read from its source: the libraries that it measures need not be there."""
    parser = argparse.ArgumentParser()
    known = {"action", "nargs", "choices", "dest"}
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parser.add_argument":
            names = [ast.literal_eval(name) for name in call.args if isinstance(name, ast.Constant)]
            options = {
                word.arg: ast.literal_eval(word.value)
                for word in call.keywords
                if word.arg in known
            }
            parser.add_argument(*names, **options)
    return parser


@pytest.mark.parametrize("daemon", [CompilerSettings, RuntimeSettings, GatewaySettings])
def test_every_setting_is_documented(daemon: type[Settings]) -> None:
    variables = {variable_of(daemon, field) for field in daemon.model_fields}
    assert {name for name in variables if f"`{name}`" not in OPERATIONS} == set()


def test_every_variable_that_is_named_exists() -> None:
    known = {
        variable_of(daemon, field)
        for daemon in (CompilerSettings, RuntimeSettings, GatewaySettings)
        for field in daemon.model_fields
    }
    named = in_pages(r"`(MILLRACE_[A-Z_]+)`")
    assert {n for n in named - known if not n.startswith("MILLRACE_CLI_")} - {"MILLRACE_"} == set()


def test_variables_of_the_command_are_documented_and_exist() -> None:
    folder = ROOT / "clients/python/millrace/cli"
    pattern = r"MILLRACE_CLI_[A-Z_]*[A-Z]\b"
    known = {
        name for path in folder.rglob("*.py") for name in re.findall(pattern, path.read_text())
    }
    assert known == {name for page in PAGES for name in re.findall(pattern, page.read_text())}


def test_metrics_are_documented_and_exist() -> None:
    registry = CollectorRegistry()
    registry.register(FAILURES)
    EdgeInterceptor(registry)
    CompilerMetrics(registry)
    GatewayMetrics(registry)
    families = {family.name for family in (*registry.collect(), *RuntimeMetrics().collect())}
    assert families == set(re.findall(r"`(millrace_[a-z_]+)`", OPERATIONS))


def test_log_lines_that_are_named_exist() -> None:
    named = re.search(r"^Logs: .*?\((.*?)\)", OPERATIONS, re.M | re.S)
    assert named is not None, "the manual names no log lines"
    written = {
        call.args[0].value
        for folder in PACKAGES.values()
        for path in sources(folder)
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)
        if ast.unparse(call.func).endswith(("canonical_line", ".info"))
    }
    assert set(re.findall(r"`(\w+)`", named[1])) - written == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)\)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    targets = {(name, anchor): page.parent / name if name else page for name, anchor in links}
    gone = [link for link, target in targets.items() if link[1] not in anchors(target)]
    assert gone == []


def anchors(page: Path) -> set[str]:
    """What links to headings of the page are called, as GitHub has it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_grpcurl_commands_ask_rpcs_that_exist_for_what_they_take() -> None:
    """Each body is a message of its rpc: a field that is misspelled or of another type is none."""
    shell = "\n".join(page.read_text().replace("\\\n", " ") for page in PAGES)
    commands = [shlex.split(line) for line in re.findall(r"^grpcurl .*$", shell, re.M)]
    methods = {
        f"{service.full_name}/{method.name}": method.input_type
        for module in (artifact_pb2, compiler_pb2, fleet_pb2, inference_pb2, runtime_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    asked = [words for words in commands if words[-1] != "list"]
    assert len(asked) > 5, "the manual shows calls"
    for words in asked:
        kind = message_factory.GetMessageClass(methods[words[-1]])
        body = words[words.index("-d") + 1] if "-d" in words else "{}"
        json_format.Parse(body, kind())


def test_python_examples_compile() -> None:
    for page, least in ((ROOT / "README.md", 1), (ROOT / "docs/API.md", 3)):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
        assert len(blocks) >= least
        for block in blocks:
            compile(block, str(page), "exec")
