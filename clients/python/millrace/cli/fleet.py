"""`millrace deploy`, `undeploy`, `status` and `top`: what the fleet is to serve, and what it does."""

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from millrace.cli import output
from millrace.cli.building import done_text, parse_quant, state_text
from millrace.cli.failures import USAGE, CommandFailed
from millrace.cli.listing import quant_text
from millrace.client import Client
from millrace.compiler.v1 import compiler_pb2
from millrace.errors import MillraceError, from_status
from millrace.fleet.v1 import fleet_pb2
from millrace.fleet_client import FleetClient
from millrace.runtime.v1 import runtime_pb2

if TYPE_CHECKING:
    from rich.console import RenderableType

_POLL_S = 1.0
_MAX_BUILDS = 8
_RUNTIME_COLUMNS = (
    "runtime", "state", "start", "serves", "deployment", "running", "waiting", "KV", "tokens/s", "TTFT",
)  # fmt: skip
_LEAST_COLUMNS = ("start", "deployment", "KV", "TTFT")
_DEPLOYMENT_COLUMNS = ("deployment", "model", "quant", "version", "ready")
_BUILD_COLUMNS = ("build", "model", "arch", "quant", "state", "done")


def deploy(
    fleet: FleetClient,
    name: str,
    model: str,
    quant: str,
    model_uri: str,
    replicas: int,
    *,
    wait_s: float,
) -> fleet_pb2.Deployment:
    """Writes a deployment down, and waits until all of its replicas serve it.

    Args:
        wait_s: at most; 0: not at all.

    Raises:
        CommandFailed: they do not, by then.
        MillraceError: or will not at all, as no engine can be made of what was asked for.
    """
    scheme, group_size, kv_cache = parse_quant(quant)
    deployment = fleet.deploy(name, model, scheme, group_size, model_uri, replicas, kv_cache)
    deadline, num_able = time.monotonic() + wait_s, 0
    problems: list[str] = []
    for_what = f"waiting for {replicas} to serve {name}"
    with output.waiting(for_what) as tell:
        while wait_s and deployment.ready_replicas < replicas:
            if time.monotonic() > deadline:
                are_ready = "replica of {} is" if replicas == 1 else "replicas of {} are"
                raise CommandFailed(
                    f"{deployment.ready_replicas} of {replicas} {are_ready.format(name)} ready after "
                    f"{output.duration_text(wait_s)}; runtimes that work for it or are idle: {num_able}; "
                    + ("".join(problems[:1]) or "`millrace status` shows them")
                )
            time.sleep(_POLL_S / 4)
            seen = fleet.get_fleet()
            num_able = sum(_is_able(runtime, name) for runtime in seen.runtimes)
            problems = _problems(seen, name)
            now = {d.name: d for d in seen.deployments}
            # Redis may be away for a moment.
            deployment = now.get(name, deployment)
            _raise_if_hopeless(seen, deployment)
            tell(f"{for_what}: {deployment.ready_replicas} ready")
    return deployment


def _raise_if_hopeless(seen: fleet_pb2.GetFleetResponse, deployment: fleet_pb2.Deployment) -> None:
    """Raises why nothing can be built, where that is known for the arch of every runtime that may serve it."""
    errors = {
        runtime.arch: from_status(problem.status)
        for runtime in seen.runtimes
        for problem in [runtime.deployment_problem]
        if (problem.deployment, problem.version) == (deployment.name, deployment.version)
    }
    # No other runtime of that arch, and no later try, fares better.
    errors = {arch: error for arch, error in errors.items() if error.retry_after_s is None}
    able = {runtime.arch for runtime in seen.runtimes if _is_able(runtime, deployment.name)}
    if errors and able <= errors.keys():
        raise next(iter(errors.values()))


def _is_able(runtime: fleet_pb2.Runtime, deployment: str) -> bool:
    return _is_idle(runtime) or runtime.deployment == deployment


def _is_idle(runtime: fleet_pb2.Runtime) -> bool:
    return runtime.state == runtime_pb2.RUNTIME_STATE_IDLE and not runtime.deployment


def undeploy(fleet: FleetClient, name: str, *, as_json: bool) -> None:
    """Ends a deployment, and says so."""
    fleet.undeploy(name)
    if as_json:
        output.print_json({"undeployed": name})
    else:
        output.print_line(f"{name} is undeployed")


def show_deployment(deployment: fleet_pb2.Deployment, *, as_json: bool) -> None:
    """Prints a deployment as it stands."""
    if as_json:
        output.print_json(output.to_dict(deployment))
    else:
        output.print_line(
            f"{deployment.name}  version {deployment.version}  "
            f"{deployment.ready_replicas} of {deployment.replicas} ready"
        )


def show_status(fleet: FleetClient, *, as_json: bool) -> None:
    """Prints the fleet once."""
    found = fleet.get_fleet()
    if as_json:
        output.print_json(output.to_dict(found))
        return
    output.print_table(
        _RUNTIME_COLUMNS,
        [_runtime_row(r) for r in found.runtimes],
        "The gateway knows no runtime.",
        _LEAST_COLUMNS,
    )
    for line in (*_starts(found), *_problems(found)):
        output.print_line(line)
    if found.deployments:
        output.print_line("")
        output.print_table(_DEPLOYMENT_COLUMNS, [_deployment_row(d) for d in found.deployments], "")
        for line in _vacancies(found):
            output.print_line(line)
    if not found.redis_answers:
        output.say("The gateway has no Redis that answers: runtimes that start are not seen.")


def watch_status(fleet: FleetClient, compiler: Client) -> None:
    """Shows the fleet and its builds on the whole screen, until Ctrl-C.

    Raises:
        CommandFailed: stdout is no terminal.
    """
    from rich.live import Live

    if not sys.stdout.isatty():
        raise CommandFailed("top needs a terminal; `millrace status` prints the fleet once", USAGE)

    with Live(screen=True, auto_refresh=False, console=output.console()) as live:
        try:
            while True:
                live.update(screen(fleet, compiler), refresh=True)
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            return


def screen(fleet: FleetClient, compiler: Client) -> "RenderableType":
    """What the whole screen shows now; what does not answer says so in its place."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    try:
        found = fleet.get_fleet()
    except MillraceError as error:
        parts.append(Text(str(error), "red"))
    else:
        parts += [_head(found), ""]
        parts.append(
            output.table(_RUNTIME_COLUMNS, map(_runtime_row, found.runtimes), _LEAST_COLUMNS)
        )
        # The phase that goes on is the last one: a narrow screen must not cut it off.
        width = output.console().width
        parts += [Text(output.indented(line, width), "dim") for line in _starts(found)]
        parts += [Text(output.indented(line, width), "yellow") for line in _problems(found)]
        if found.deployments:
            rows = map(_deployment_row, found.deployments)
            parts += ["", output.table(_DEPLOYMENT_COLUMNS, rows)]
            parts += [Text(output.indented(line, width), "dim") for line in _vacancies(found)]
        if not found.redis_answers:
            parts.append(Text("The gateway has no Redis that answers", "yellow"))
    parts += ["", _builds(compiler)]
    return Group(*parts)


def _head(found: fleet_pb2.GetFleetResponse) -> "RenderableType":
    from rich.text import Text

    heard = [runtime for runtime in found.runtimes if not _is_silent(runtime)]
    running = sum(runtime.load.running_sequences for runtime in heard)
    waiting = sum(runtime.load.waiting_sequences for runtime in heard)
    rate = sum(runtime.tokens_per_s for runtime in heard)
    return Text.assemble(
        ("millrace  ", "bold"),
        f"{time.strftime('%H:%M:%S')}  {output.count_text(len(found.runtimes), 'runtime')}  {running} running  "
        f"{waiting} waiting  {rate:.0f} tokens/s",
    )


def _builds(compiler: Client) -> "RenderableType":
    from itertools import islice

    from rich.text import Text

    try:
        builds = list(islice(compiler.list_builds(), _MAX_BUILDS))
    except MillraceError as error:
        return Text(str(error), "dim")
    if not builds:
        return Text("no builds yet", "dim")
    return output.table(_BUILD_COLUMNS, map(_build_row, builds))


def _runtime_row(runtime: fleet_pb2.Runtime) -> tuple[str, ...]:
    load = runtime.load
    served = f"{runtime.model} {quant_text(runtime.quant)}" if runtime.engine else "-"
    version = f" v{runtime.deployment_version}" if runtime.deployment_version else ""
    deployment = f"{runtime.deployment}{version}" or "-"
    if _is_silent(runtime):
        # How busy it was is not how busy it is.
        state = f"silent {output.duration_text(runtime.silent_for.ToMilliseconds() / 1000)}"
        return (runtime.address, state, "-", served, deployment, "-", "-", "-", "-", "-")
    state = runtime_pb2.RuntimeState.Name(runtime.state).removeprefix("RUNTIME_STATE_").lower()
    start_s = sum(seconds for _, seconds in _phases(runtime))
    used = 1 - load.free_blocks / runtime.num_blocks if runtime.num_blocks else 0.0
    first_ms = load.time_to_first_token.ToNanoseconds() / 1e6
    return (
        runtime.address,
        state,
        output.duration_text(start_s) if runtime.startup else "-",
        served,
        deployment,
        str(load.running_sequences),
        # Short: a column that grew with what waits would push others off a narrow screen.
        f"{load.waiting_sequences}" + (f" ({load.waiting_tokens})" if load.waiting_tokens else ""),
        f"{used:.0%} of {runtime.num_blocks}" if runtime.num_blocks else "-",
        f"{runtime.tokens_per_s:.0f}",
        _latency_text(first_ms) if first_ms else "-",
    )


def _latency_text(milliseconds: float) -> str:
    """`42 ms`, `4.0 s`."""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def _is_silent(runtime: fleet_pb2.Runtime) -> bool:
    return runtime.state == runtime_pb2.RUNTIME_STATE_UNSPECIFIED


def _phases(runtime: fleet_pb2.Runtime) -> list[tuple[str, float]]:
    return [(phase.name, phase.duration.ToNanoseconds() / 1e9) for phase in runtime.startup]


def _starts(found: fleet_pb2.GetFleetResponse) -> list[str]:
    """A line for each runtime that starts: its phases so far, the last of which goes on."""
    states = (runtime_pb2.RUNTIME_STATE_BUILDING, runtime_pb2.RUNTIME_STATE_LOADING)
    return [
        f"{runtime.address} starts: "
        + ", ".join(f"{name} {output.duration_text(s)}" for name, s in _phases(runtime))
        for runtime in found.runtimes
        if runtime.state in states and runtime.startup
    ]


def _problems(found: fleet_pb2.GetFleetResponse, deployment: str = "") -> list[str]:
    """A line for each runtime that does not serve what a deployment, or that one, had it try.

    Others may serve it since, or it may have changed: then that is over.
    """
    lacking = {
        (d.name, d.version)
        for d in found.deployments
        if d.ready_replicas < d.replicas and deployment in ("", d.name)
    }
    return [
        f"{runtime.address} does not serve {problem.deployment} v{problem.version}, {_retry_text(problem)}: "
        f"{problem.status.message}"
        for runtime in found.runtimes
        for problem in [runtime.deployment_problem]
        if (problem.deployment, problem.version) in lacking and not _is_silent(runtime)
    ]


def _retry_text(problem: runtime_pb2.DeploymentProblem) -> str:
    """`tries again after 30 s`, or that it does not."""
    retry_s = from_status(problem.status).retry_after_s
    return (
        "does not try again"
        if retry_s is None
        else f"tries again after {output.duration_text(retry_s)}"
    )


def _vacancies(found: fleet_pb2.GetFleetResponse) -> list[str]:
    """A line for each deployment that has fewer runtimes than replicas, while none is idle."""
    if any(_is_idle(runtime) for runtime in found.runtimes):
        return []
    num_runtimes = Counter(runtime.deployment for runtime in found.runtimes)
    return [
        f"{d.name} has {num_runtimes[d.name]} of its {output.count_text(d.replicas, 'runtime')}, and no other is idle"
        for d in found.deployments
        if num_runtimes[d.name] < d.replicas
    ]


def _deployment_row(deployment: fleet_pb2.Deployment) -> tuple[str, ...]:
    return (
        deployment.name,
        deployment.model,
        quant_text(deployment.quant),
        str(deployment.version),
        f"{deployment.ready_replicas} of {deployment.replicas}",
    )


def _build_row(build: compiler_pb2.Build) -> tuple[str, ...]:
    return (
        output.short_name(build.name),
        build.model_uri,
        build.key.arch,
        quant_text(build.key.quant),
        state_text(build),
        done_text(build),
    )
