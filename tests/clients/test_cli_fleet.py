"""The commands of a fleet: what it is to serve, and how it stands."""

import json

from google.rpc import error_details_pb2, status_pb2
from millrace.cli.output import duration_text
from millrace.compiler.v1 import compiler_pb2
from millrace.fleet.v1 import fleet_pb2
from millrace.runtime.v1 import runtime_pb2

from shared.errors import DeploymentNotFound, Draining, QualityGate, UnsupportedQuant, to_status
from tests.clients.command import millrace, on_a_terminal
from tests.clients.scripted_daemon import DIGEST, Script, ScriptedDaemon, a_build


def a_fleet() -> fleet_pb2.GetFleetResponse:
    """Three runtimes, one of which has not answered for a while, and one that loads its engine."""
    serving = fleet_pb2.Runtime(
        address="10.0.0.1:7602", state=runtime_pb2.RUNTIME_STATE_SERVING, engine="engines/ab",
        model="tiny", arch="cpu", deployment="chat", deployment_version=3, num_blocks=100,
        tokens_per_s=123.4,
    )  # fmt: skip
    serving.quant.scheme = "int8"
    serving.load.free_blocks, serving.load.running_sequences = 25, 6
    serving.load.time_to_first_token.FromMilliseconds(42)
    silent = fleet_pb2.Runtime(address="10.0.0.2:7602")
    silent.silent_for.FromMilliseconds(12_000)
    silent.load.running_sequences = 100
    starting = fleet_pb2.Runtime(address="10.0.0.3:7602", state=runtime_pb2.RUNTIME_STATE_LOADING)
    for name, milliseconds in (("find_engine", 1250), ("load_engine", 2500)):
        for runtime in (serving, starting):
            runtime.startup.add(name=name).duration.FromMilliseconds(milliseconds)
    return fleet_pb2.GetFleetResponse(runtimes=[serving, silent, starting], redis_answers=True)


def test_status_shows_every_runtime_and_deployment() -> None:
    script = Script(fleet=a_fleet())
    script.fleet.deployments.add(name="chat", model="tiny", replicas=2, version=3)
    with ScriptedDaemon(script) as daemon:
        lines = millrace(daemon, "status").stdout.splitlines()
        as_json = json.loads(millrace(daemon, "status", "--json").stdout)
    for shown in ("serving", "tiny int8", "chat v3", "75% of 100", "123", "42 ms"):
        assert shown in lines[1]
    assert f"serving {duration_text(3.75)} tiny" in " ".join(lines[1].split())
    assert "silent 12 s" in lines[2]
    assert lines[2].split()[-5:] == ["-"] * 5  # what it said before it fell silent is not how it is
    assert lines[3].split()[:4] == ["10.0.0.3:7602", "loading", *duration_text(3.75).split()]
    phases = f"find_engine {duration_text(1.25)}, load_engine {duration_text(2.5)}"
    assert lines[4] == f"10.0.0.3:7602 starts: {phases}"
    assert "load_engine" not in lines[1]
    assert lines[-2].split() == ["chat", "tiny", "3", "1", "of", "2"]
    assert as_json["runtimes"][0]["address"] == "10.0.0.1:7602"


def test_why_a_deployment_is_not_served_is_said_by_whoever_shows_or_waits_for_it() -> None:
    script = Script(fleet=a_fleet())
    script.fleet.deployments.add(name="chat", model="tiny", replicas=50, version=7)
    for runtime in script.fleet.runtimes[1:]:  # the first of them is silent
        has_problem(runtime, 7)
    line = "10.0.0.3:7602 does not serve chat v7, tries again after 30 s: No model at [/b] here."
    with ScriptedDaemon(script) as daemon:
        shown = millrace(daemon, "status").stdout.splitlines()
        assert [text for text in shown if "does not serve" in text] == [line]
        assert "10.0.0.3:7602 does not serve" in on_a_terminal(daemon, "top", until="[/b] here")
        waited = ("deploy", "chat", "--model", "tiny", "--replicas", "2", "--wait", "0.1")
        assert millrace(daemon, *waited).stderr.endswith(f"idle: 1; {line}\n")
        other = ("deploy", "other", "--model", "tiny", "--replicas", "2", "--wait", "0.1")
        assert "`millrace status` shows them" in millrace(daemon, *other).stderr


def test_why_a_deployment_was_not_served_is_not_said_once_it_is_or_has_changed() -> None:
    script = Script(fleet=a_fleet())
    served, changed = "No disk.", "No memory."
    has_problem(script.fleet.runtimes[0], 7, served)
    has_problem(script.fleet.runtimes[2], 7, changed, deployment="other")
    fleet = script.fleet.deployments
    fleet.add(name="chat", model="tiny", replicas=2, ready_replicas=2, version=7)
    fleet.add(name="other", model="tiny", replicas=50, version=8)
    with ScriptedDaemon(script) as daemon:
        assert "does not serve" not in millrace(daemon, "status").stdout
        # A replica more, and it lacks one.
        fleet[0].replicas, fleet[1].version = 50, 7
        shown = millrace(daemon, "status").stdout
        assert f"does not serve chat v7, tries again after 30 s: {served}" in shown
        assert f"does not serve other v7, tries again after 30 s: {changed}" in shown


def has_problem(
    runtime: fleet_pb2.Runtime,
    version: int,
    message: str = "No model at [/b] here.",
    deployment: str = "chat",
) -> status_pb2.Status:
    """It has tried that version in vain and will again; gives why."""
    problem = runtime.deployment_problem
    problem.deployment, problem.version = deployment, version
    problem.status.message = message
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromSeconds(30)
    problem.status.details.add().Pack(retry)
    return problem.status


def test_status_says_that_redis_is_away() -> None:
    with ScriptedDaemon(Script()) as daemon:
        said = millrace(daemon, "status").stderr
    assert "knows no runtime" in said
    assert "no Redis that answers" in said


def test_deploy_waits_until_all_replicas_are_ready() -> None:
    script = Script()
    asked = ("deploy", "chat", "--model", "tiny", "-q", "int4-g64", "--replicas", "3")
    with ScriptedDaemon(script) as daemon:
        at_once = millrace(daemon, *asked)
        assert at_once.stdout == "chat  version 7  0 of 3 ready\n"
        del script.fleet.deployments[:]
        assert millrace(daemon, *asked, "--wait", "30").stdout == "chat  version 7  3 of 3 ready\n"
        del script.fleet.deployments[:]
        idle = runtime_pb2.RUNTIME_STATE_IDLE
        for deployment in ("chat", "", "another"):
            script.fleet.runtimes.add(address="10.0.0.1:7602", state=idle, deployment=deployment)
        late = millrace(daemon, *asked, "--wait", "0.1")
    assert (late.returncode, late.stdout) == (1, "")
    assert "of 3 replicas of chat are ready after" in late.stderr
    assert "runtimes that work for it or are idle: 2;" in late.stderr
    wanted = script.asked[0].deployment
    assert (wanted.quant.scheme, wanted.quant.group_size) == ("int4", 64)


def test_deploy_does_not_wait_for_an_engine_that_cannot_be_made() -> None:
    """It is told once no arch is left for which a runtime may still find otherwise."""
    no_fp8 = UnsupportedQuant(quant="fp8", problem="sm_80 has no fp8")
    script = Script()
    for arch in ("sm_80", "sm_80", "sm_90"):
        runtime = script.fleet.runtimes.add(state=runtime_pb2.RUNTIME_STATE_IDLE, arch=arch)
    has_problem(script.fleet.runtimes[0], 7).CopyFrom(to_status(no_fp8))
    asked = ("deploy", "chat", "--model", "tiny", "--replicas", "50", "--json", "--wait")
    with ScriptedDaemon(script) as daemon:
        other_may = millrace(daemon, *asked, "1")
        del script.fleet.deployments[:]
        has_problem(runtime, 7).CopyFrom(to_status(Draining()))
        again_may = millrace(daemon, *asked, "1")
        del script.fleet.deployments[:]
        has_problem(runtime, 7).CopyFrom(to_status(QualityGate(problem="KL divergence")))
        none_may = millrace(daemon, *asked, "100000")  # longer than the test waits for the command
        shown = millrace(daemon, "status").stdout
    for waited in (other_may, again_may):
        assert "replicas of chat are ready after" in waited.stderr
    told = json.loads(none_may.stderr)["error"]
    assert told["message"] == str(no_fp8)
    assert f"does not serve chat v7, does not try again: {no_fp8}" in shown


def test_undeploying_what_is_not_there_is_an_error() -> None:
    script = Script(failures=[DeploymentNotFound(deployment="chat")])
    with ScriptedDaemon(script) as daemon:
        failed = millrace(daemon, "undeploy", "chat")
        done = millrace(daemon, "undeploy", "chat")
        told = millrace(daemon, "undeploy", "chat", "--json")
    assert failed.returncode == 3
    assert "No deployment 'chat'" in failed.stderr
    assert done.stdout == "chat is undeployed\n"
    assert json.loads(told.stdout) == {"undeployed": "chat"}


def test_top_shows_fleet_and_builds_until_it_is_interrupted() -> None:
    script = Script(fleet=a_fleet(), builds=[a_build(compiler_pb2.BUILD_STATE_RUNNING)])
    script.fleet.deployments.add(name="chat", model="tiny", replicas=2, version=3)
    with ScriptedDaemon(script) as daemon:
        shown = on_a_terminal(daemon, "top", until=DIGEST[:12])
    for part in (
        "3 runtimes  6 running",
        "load_engine",
        "tokens/s",
        "TTFT",
        "10.0.0.1:7602",
        "chat",
        "silent",
    ):
        assert part in shown


def test_top_of_one_runtime_on_a_narrow_screen_shows_what_its_start_does_now() -> None:
    script = Script(fleet=a_fleet(), builds=[a_build(compiler_pb2.BUILD_STATE_RUNNING)])
    starting = script.fleet.runtimes[2]
    for name in ("start_process", "import_torch", "read_graph", "pack_weights", "warm_up"):
        starting.startup.add(name=name).duration.FromMilliseconds(500)
    starting.load.waiting_sequences, starting.load.waiting_tokens = 1, 2048
    del script.fleet.runtimes[:2]
    with ScriptedDaemon(script) as daemon:
        shown = on_a_terminal(daemon, "top", until=DIGEST[:12], columns=80)
    for part in ("1 runtime  ", "1 (2048)", "warm_up"):
        assert part in shown


def test_top_on_a_narrow_screen_leaves_out_the_same_columns_however_busy_runtimes_are() -> None:
    script = Script(fleet=a_fleet())
    del script.fleet.runtimes[1:]
    (runtime,) = script.fleet.runtimes
    runtime.address, runtime.model = "127.0.0.1:46313", "smollm2-135m"
    with ScriptedDaemon(script) as daemon:
        quiet = on_a_terminal(daemon, "top", until="no builds", columns=80)
        runtime.load.waiting_tokens = 2048
        runtime.load.time_to_first_token.FromSeconds(4)
        busy = on_a_terminal(daemon, "top", until="no builds", columns=80)
    assert "42 ms" in quiet
    assert "0 (2048)" in busy
    assert "4.0 s" in busy


def test_a_deployment_that_has_too_few_runtimes_says_so_unless_one_is_idle() -> None:
    script = Script(fleet=a_fleet())
    script.fleet.deployments.add(name="chat", model="tiny", replicas=2, version=3)
    script.fleet.deployments.add(name="code", model="tiny", replicas=1, version=1)
    lines = [
        "chat has 1 of its 2 runtimes, and no other is idle",
        "code has 0 of its 1 runtime, and no other is idle",
    ]
    with ScriptedDaemon(script) as daemon:
        assert millrace(daemon, "status").stdout.splitlines()[-2:] == lines
        assert lines[0] in on_a_terminal(daemon, "top", until="code has")
        script.fleet.runtimes.add(address="10.0.0.4:7602", state=runtime_pb2.RUNTIME_STATE_IDLE)
        assert "no other is idle" not in millrace(daemon, "status").stdout


def test_top_shows_what_does_not_answer_and_goes_on() -> None:
    script = Script(fleet=a_fleet(), failures=[Draining()])
    with ScriptedDaemon(script) as daemon:
        shown = on_a_terminal(daemon, "top", until="10.0.0.1")
    assert "stopping" in shown
