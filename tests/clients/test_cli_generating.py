"""`millrace generate` and `chat`: streams, refusals, Ctrl-C."""

import json
import re
import subprocess

from shared.errors import Draining, QueueFull
from tests.clients.command import COMMAND, millrace
from tests.clients.scripted_daemon import (
    GRAPH,
    WORDS,
    Script,
    ScriptedDaemon,
    an_engine,
)


def test_prompt_that_speaks_of_json_is_no_wish_for_it(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "generate", "--runtime", "127.0.0.1:1", "--", "--json")
    assert done.stderr.startswith("millrace: No daemon answers")


def test_generate_streams_to_stdout_and_tells_its_speed_on_stderr(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "generate", "hello")
    assert done.stdout == "".join((*WORDS * 52, "\n"))[: len(done.stdout) - 1] + "\n"
    assert re.search(r"first token \d+ ms, [\d.]+ tokens/s, 3 prompt \+ 256 tokens", done.stderr)


def test_generate_reads_stdin_and_gives_programs_one_object(
    daemon: ScriptedDaemon, script: Script
) -> None:
    done = millrace(
        daemon, "generate", "-", "--json", "-m", "5", "-t", "0.5", "--seed", "9", stdin="from stdin"
    )
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["seed"]) == ("".join(WORDS), 9)
    assert answer["samples"][0]["finish_reason"] == "length"
    assert script.asked[0].text == "from stdin"
    assert script.asked[0].sampling.temperature == 0.5


def test_refused_generation_exits_with_4_when_retrying_may_help(
    daemon: ScriptedDaemon, script: Script
) -> None:
    script.failures = [QueueFull(retry_after_s=60, waiting_tokens=9, max_waiting_tokens=8)]
    done = millrace(daemon, "generate", "hello")
    assert (done.returncode, done.stdout) == (4, "")
    script.failures = [Draining(retry_after_s=60)]
    assert millrace(daemon, "generate", "hello").returncode == 4


def test_refused_input_exits_with_2(daemon: ScriptedDaemon) -> None:
    done = millrace(daemon, "generate", "")
    assert (done.returncode, done.stderr) == (2, "millrace: prompt: is empty.\n")


def test_interrupt_exits_with_130_and_cancels(daemon: ScriptedDaemon, script: Script) -> None:
    script.blocks_after = 1
    process = subprocess.Popen(
        [*COMMAND, "generate", "hello", "--runtime", daemon.address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(4) == b"Once"
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"")
    assert script.cancelled.wait(60)


def test_chat_keeps_the_conversation(daemon: ScriptedDaemon, script: Script) -> None:
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH})]
    said = "hello\nand then?\n/reset\nagain\n"
    done = millrace(daemon, "chat", "--system", "Be brief.", "-m", "5", stdin=said)
    assert done.returncode == 0
    chats = [[m.content for m in asked.chat.messages] for asked in script.asked]
    answer = "".join(WORDS)
    assert chats == [
        ["Be brief.", "hello"],
        ["Be brief.", "hello", answer, "and then?"],
        ["Be brief.", "again"],
    ]


def test_template_is_given_what_the_command_says(daemon: ScriptedDaemon, script: Script) -> None:
    """Values are JSON, or texts as they are."""
    script.engines = [an_engine(script.blobs, {"graph.json": GRAPH})]
    given = ("--template", "enable_thinking=false", "--template", "date=May 1")
    assert millrace(daemon, "generate", "--chat", "hello", "-m", "5", *given).returncode == 0
    assert millrace(daemon, "chat", "-m", "5", *given, stdin="hello\n").returncode == 0
    for asked in script.asked:
        told = json.loads(asked.chat.template_arguments)
        assert told == {"enable_thinking": False, "date": "May 1"}
    assert len(script.asked) == 2
    done = millrace(daemon, "generate", "--chat", "hello", "--template", "thinking")
    says = "millrace: --template must be NAME=VALUE, found 'thinking'\n"
    assert (done.returncode, done.stderr) == (2, says)
    deep = f"a={'[' * 10_000}"
    done = millrace(daemon, "generate", "--chat", "hello", "--template", deep)
    says = "millrace: --template a: its value is nested too deeply\n"
    assert (done.returncode, done.stderr) == (2, says)
    done = millrace(daemon, "generate", "hello", *given)
    assert (done.returncode, "needs messages" in done.stderr) == (2, True)
