"""The manual's programs, copied as they are written and run before real daemons: what a new user does first.

Changed are only addresses, the model (a tiny one), and the deployment's name.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.clients.runners import BUILD_AND_TESTS_TIMEOUT_S, CLIENTS, LANGUAGES, ROOT
from tests.integration.daemon_process import DaemonProcess
from tests.integration.fleet_processes import FleetClient, FleetProcesses
from tests.shared.certificates import made_in

pytestmark = [pytest.mark.redis, pytest.mark.timeout(BUILD_AND_TESTS_TIMEOUT_S)]

PAGES = {"README": ROOT / "README.md", "API": ROOT / "docs/API.md"}
_PROGRAM_S = 300.0


def blocks(page: Path, language: str) -> list[str]:
    """What the page shows in that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


PYTHON = [
    pytest.param(block, id=f"{name}-{number}")
    for name, page in PAGES.items()
    for number, block in enumerate(blocks(page, "python"))
]


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the daemons of the manual are, as tests run them."""

    compiler: str
    runtime: str
    gateway: str
    http: str
    model_uri: str

    def here(self, text: str) -> str:
        """`text`, as a user of this stack would write it."""
        ours = f'"{self.compiler}", "{self.runtime}"'
        for written, meant in (
            ("Client()", f"Client({ours})"),
            ("127.0.0.1:7600", self.gateway),
            ("127.0.0.1:7602", self.runtime),
            ("127.0.0.1:7620", self.http),
            ("sample:smollm2-135m", self.model_uri),
            ("smollm2-135m", "tiny"),
            ('"local"', '"chat"'),
        ):
            text = text.replace(written, meant)
        return text


async def deployed(fleet: FleetProcesses) -> None:
    """Returns when the fleet serves its checkpoint."""
    async with grpc.aio.insecure_channel(fleet.gateway.address) as channel:
        await FleetClient(channel).deploy(fleet.checkpoint, len(fleet.runtimes))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A fleet with a deployment, and a runtime of its own for who loads engines."""
    root = tmp_path_factory.mktemp("documented")
    with (
        FleetProcesses(root, 1, 1) as fleet,
        DaemonProcess(
            "runtime_service",
            "--listen", "127.0.0.1:0", "--metrics-listen", "", "--arch", "cpu",
            "--store", str(root / "store"), "--kv-bytes", str(8 << 20), "--num-threads", "1",
        ) as runtime,
    ):  # fmt: skip
        asyncio.run(deployed(fleet))
        yield Stack(
            fleet.compilers[0].address,
            runtime.address,
            fleet.gateway.address,
            fleet.http_address,
            str(fleet.checkpoint),
        )


def output_of(*command: str, cwd: Path) -> str:
    """What the program prints; it ends well, and complains of nothing."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")}
    done = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=_PROGRAM_S
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("block", PYTHON)
def test_python_programs_run_as_they_are_written(stack: Stack, block: str, tmp_path: Path) -> None:
    made_in(tmp_path / "tls")
    program = stack.here(block)
    if "import" not in program:  # a part of one that has its client already
        program = stack.here("import millrace\n\nclient = millrace.Client()\n") + program
    if "except" in program:
        program += '    print(error.reason)\n    assert error.reason == "PROMPT_TOO_LONG"\n'
    path = tmp_path / "program.py"
    path.write_text(program)
    printed = output_of(sys.executable, str(path), cwd=tmp_path)
    assert ("print" in program) is bool(printed.strip())


def text_of(events: list[str]) -> str:
    """What these events of completions say."""
    told = (json.loads(event.partition("data: ")[2]) for event in events if "[DONE]" not in event)
    return "".join(choice["text"] for chunk in told for choice in chunk["choices"])


def test_curls_stream_goes_on_after_any_of_its_events(stack: Stack, tmp_path: Path) -> None:
    """The two commands of docs/API.md, the second with an id that the first one got."""
    (shown,) = (block for block in blocks(PAGES["API"], "sh") if "Last-Event-ID" in block)
    begin, go_on = re.findall(r"^curl (?:.*\\\n)*.*$", stack.here(shown), re.M)
    events = output_of("sh", "-c", f"{begin} -sS", cwd=tmp_path).strip().split("\n\n")
    assert events[-1].endswith("data: [DONE]")
    # How many tokens come in one event is the moment's: there may be one before the last.
    num_read = len(events) // 2
    last_id = events[num_read - 1].splitlines()[0].removeprefix("id: ")
    (example,) = re.findall(r'Last-Event-ID: (\S+?)"', go_on)
    assert re.fullmatch(r"cmpl-\w+:\d+", last_id)
    again = output_of("sh", "-c", go_on.replace(example, last_id) + " -sS", cwd=tmp_path)
    rest = again.strip().split("\n\n")
    assert rest[-1].endswith("data: [DONE]")
    assert text_of(events[:num_read]) + text_of(rest) == text_of(events)


def test_readmes_curl_asks_a_chat(stack: Stack, tmp_path: Path) -> None:
    (asked,) = (block for block in blocks(PAGES["README"], "sh") if block.startswith("curl"))
    answer = json.loads(output_of("sh", "-c", stack.here(asked).rstrip() + " -sS", cwd=tmp_path))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"


def program_of(name: str, language: str) -> str:
    """What the README of a client begins with; the client is built, or the test is left out."""
    client = LANGUAGES[name]
    if missing := client.missing():
        assert not (client.is_required and os.environ.get("CI")), f"CI lacks {missing}"
        pytest.skip(f"the {name} client needs {missing}")
    client.made()
    return blocks(CLIENTS / name / "README.md", language)[0]


def check_told(printed: str, rate: str) -> None:
    """A program streamed a text, and told its speed in a last line."""
    text, _, told = printed.rstrip("\n").rpartition("\n")
    assert re.fullmatch(rate, told), printed
    # A random model may draw its end first: there is no speed then.
    assert text or told.startswith("0")


def test_node_program_runs_as_it_is_written(stack: Stack, tmp_path: Path) -> None:
    """As JavaScript, once its types are checked: it writes none of its own."""
    program = stack.here(program_of("node", "ts"))
    for name in ("program.mts", "program.mjs"):
        (tmp_path / name).write_text(program)
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules/millrace").symlink_to(CLIENTS / "node")
    (tmp_path / "node_modules/@types").symlink_to(CLIENTS / "node/node_modules/@types")
    tsc = str(CLIENTS / "node/node_modules/.bin/tsc")
    strictly = ("--noEmit", "--strict", "--module", "nodenext", "--types", "node")
    assert output_of(tsc, *strictly, "program.mts", cwd=tmp_path) == ""
    check_told(
        output_of("node", "program.mjs", cwd=tmp_path),
        r"[\d.]+ tokens/s, length|[\d.]+ tokens/s, stop_token",
    )


def test_go_program_runs_as_it_is_written(stack: Stack, tmp_path: Path) -> None:
    program = program_of("go", "go")
    assert program == (CLIENTS / "go/example/main.go").read_text(), "`go run ./example` is another"
    source = tmp_path / "main.go"
    source.write_text(program.replace("millrace.DefaultRuntime", f'"{stack.gateway}"'))
    offline = str(CLIENTS / "go/offline.sh")
    # As the client's own tests are built: one compilation of the libraries serves all.
    printed = output_of(offline, "run", "-race", str(source), cwd=tmp_path)
    check_told(printed, r"[\d.]+ tokens/s")


def test_java_program_runs_as_it_is_written(stack: Stack, tmp_path: Path) -> None:
    program = program_of("java", "java")
    assert program == (CLIENTS / "java/example/Generate.java").read_text()
    (tmp_path / "Generate.java").write_text(program)
    java = str(CLIENTS / "java/build/java")
    printed = output_of(java, "Generate.java", stack.gateway, cwd=tmp_path)
    check_told(printed, r"[\d,.]+ tokens/s")


def test_cpp_program_runs_as_it_is_written(stack: Stack, tmp_path: Path) -> None:
    program = program_of("cpp", "cpp")
    assert program == (CLIENTS / "cpp/example/stream.cpp").read_text(), "build/example is another"
    example = str(CLIENTS / "cpp/build/example")
    printed = output_of(example, stack.gateway, "Once upon a time", cwd=tmp_path)
    check_told(printed, r"[\d.]+ tokens/s")


def test_python_readmes_program_runs_as_it_is_written(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program_of("python", "python"))
    printed = output_of(sys.executable, "program.py", stack.gateway, cwd=tmp_path)
    check_told(printed, r"[\d.]+ tokens/s")
