"""`millrace up` and `millrace demo`: the local stack in the foreground."""

import signal
import time
from pathlib import Path

from rich.markup import escape

from millrace.builds import engine_names
from millrace.cli import output
from millrace.cli.building import build, parse_quant
from millrace.cli.fleet import deploy
from millrace.cli.generating import speed_text, stream_text
from millrace.cli.listing import quant_text
from millrace.cli.loading import serve
from millrace.cli.machine import local_arch
from millrace.cli.options import COMPILER, GATEWAY, RUNTIME
from millrace.cli.stack import Stack
from millrace.client import Client
from millrace.errors import MillraceError
from millrace.fleet_client import FleetClient
from millrace.generation import Message

# What a fleet of `millrace up` serves, and how long it has to come to that.
DEPLOYMENT = "local"
_DEPLOY_S = 300.0
QUESTION = "In one short paragraph: why is the sky blue?"


def up(stack: Stack, model_uri: str, quant: str, *, as_json: bool) -> None:
    """Runs the stack until Ctrl-C or SIGTERM, serving a model where one is named.

    Raises:
        CommandFailed: a child ended, or did not start.
        MillraceError: the model cannot be built or served.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runtimes = f"{stack.num_runtimes} runtimes and a gateway"
    what = "the runtime daemon" if stack.num_runtimes == 1 else runtimes
    output.say(f"[dim]starting Valkey, the compile daemon, {what} ...[/]")
    with stack:
        _show_addresses(stack)
        try:
            if model_uri:
                with Client(stack.compiler, stack.runtime) as client:
                    _serve(stack, client, model_uri, quant)
            if as_json:
                output.print_json(_addresses(stack))
            else:
                _show_next(stack, bool(model_uri))
            while True:
                stack.check()
                time.sleep(0.3)
        except KeyboardInterrupt:
            output.say("\n[dim]stopping: what runs is finished first, Ctrl-C again cuts it off[/]")
    output.say("stopped")


def demo(state: Path, model_uri: str, quant: str, question: str) -> None:
    """The main job, once: builds a model, serves it, streams an answer, stops."""
    stack = Stack(state, "127.0.0.1:0", "127.0.0.1:0", with_metrics=False)
    output.say("[bold]1[/] starting the local stack: Valkey, a compile daemon, a runtime daemon")
    with stack, Client(stack.compiler, stack.runtime) as client:
        what = f"[bold]{escape(model_uri)}[/] for {local_arch()} in {quant}"
        output.say(f"[bold]2[/] building {what}")
        _serve(stack, client, model_uri, quant)
        output.say(f"[bold]3[/] asking: [bold]{escape(question)}[/]\n")
        asked = [Message(role="user", content=question)]
        result, first_s = stream_text(client, asked, {"max_new_tokens": 160})
        output.say(f"\n[green]{speed_text(result, first_s)}[/]")
        output.say("[dim]stopping the stack[/]")
    output.say(
        f"""
Next, with the stack running in one terminal:
  [bold]. .venv/bin/activate[/]
  [bold]millrace up --state {state} --model {model_uri} --quant {quant}[/]
and in another:
  [bold]millrace chat[/]
  [bold]millrace generate "Once upon a time"[/]
  [bold]millrace engines[/]   [bold]millrace inspect ENGINE --graph[/]   [bold]millrace --help[/]"""
    )


def _serve(stack: Stack, client: Client, model_uri: str, quant: str) -> None:
    """Builds `model_uri` for this machine, and has the runtime serve it."""
    start = time.monotonic()
    scheme, group_size, kv_cache = parse_quant(quant)
    try:
        operation = build(
            client,
            model_uri,
            [local_arch()],
            scheme,
            group_size,
            "",
            {"kv_cache": kv_cache},
            tell=output.say,
        )
        engine = client.get_engine(engine_names(operation.builds)[0]).engine
        if stack.num_runtimes == 1:
            serve(client, engine)
        else:
            with FleetClient(stack.gateway) as fleet:
                deploy(
                    fleet,
                    DEPLOYMENT,
                    engine.model,
                    quant_text(engine.key.quant),
                    model_uri,
                    stack.num_runtimes,
                    wait_s=_DEPLOY_S,
                )
    except MillraceError:
        stack.check()  # where a daemon has ended, its last words say more
        raise
    output.say(f"[dim]serving after {output.duration_text(time.monotonic() - start)}[/]")


def _addresses(stack: Stack) -> dict[str, str]:
    addresses = {"compiler": stack.compiler, "runtime": stack.runtime}
    return addresses if stack.num_runtimes == 1 else {**addresses, "gateway": stack.gateway}


def _show_addresses(stack: Stack) -> None:
    output.say(f"  compile daemon  [bold]{stack.compiler}[/]")
    is_fleet = stack.num_runtimes > 1
    name = "gateway       " if is_fleet else "runtime daemon"
    output.say(f"  {name}  [bold]{stack.front}[/]")
    if stack.with_metrics:
        if is_fleet:
            output.say("  page, HTTP API  http://127.0.0.1:7620/")
        port = 7610 if is_fleet else 7612
        output.say(
            f"  metrics         http://127.0.0.1:7611/metrics http://127.0.0.1:{port}/metrics"
        )
    output.say(f"  engines         {stack.store}")
    output.say(f"  logs            {stack.logs}")


def _show_next(stack: Stack, has_model: bool) -> None:
    where = ""
    if stack.compiler != COMPILER:
        where += f" --compiler {stack.compiler}"
    at = f" --runtime {stack.front}" if stack.front != RUNTIME else ""
    gateway = f" --gateway {stack.gateway}" if stack.gateway != GATEWAY else ""
    output.say("\nready; in another terminal:")
    if not has_model:
        output.say(f"  [bold]millrace build sample:smollm2-135m --quant int8{where}[/]")
        if stack.num_runtimes == 1:
            output.say(f"  [bold]millrace load smollm2-135m{where}{at}[/]")
        else:
            flags = f"--replicas {stack.num_runtimes}{gateway}"
            output.say(f"  [bold]millrace deploy local --model smollm2-135m {flags}[/]")
    output.say(f"  [bold]millrace chat{at}[/]")
    if stack.num_runtimes > 1:
        output.say(f"  [bold]millrace top{gateway}{where}[/]")
    output.say("Ctrl-C stops it.")
