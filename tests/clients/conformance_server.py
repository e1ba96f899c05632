"""The scripted server of the clients' conformance suite: a real gRPC server that plays one scenario.

clients/conformance/README.md describes the script. By itself, for whoever writes a client:

    python -m tests.clients.conformance_server streaming      # prints its port, serves until killed
"""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict

# Imported so that their messages can stand in a status' details.
from google.rpc import error_details_pb2 as _details  # noqa: F401
from google.rpc import status_pb2
from grpc_status import rpc_status
from millrace.runtime.v1 import runtime_pb2 as pb
from millrace.runtime.v1 import runtime_pb2_grpc

from tests.clients.relay import Relay

SCENARIOS = Path(__file__).parents[2] / "clients/conformance/scenarios.json"
# Nothing of a scenario takes so long; a client that hangs is told apart from a slow machine.
_PATIENCE_S = 60.0
_MAX_MESSAGE_BYTES = 64 << 20
_EVENTS = ("started", "tokens", "finished", "error")

Json = dict[str, Any]


def load_scenarios() -> dict[str, Json]:
    """The scenarios by name."""
    return {scenario["name"]: scenario for scenario in json.loads(SCENARIOS.read_text())}


class ConformanceServer:
    """Plays the `server` part of a scenario at `address`; a context manager.

    Args:
        certificates: folder with the server's certificate, its key and its CA, where the scenario asks for TLS.
        rests: as a relay asks of its client.
    """

    def __init__(
        self,
        script: Json,
        certificates: Path | None = None,
        rests: Callable[[], bool] = lambda: True,
    ) -> None:
        self._is_down = script.get("down", False)
        self._server = grpc.server(
            ThreadPoolExecutor(32),
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ],
        )
        if script.get("tls"):
            assert certificates is not None, "the scenario asks for TLS"
            names = ("server.key", "server.crt", "ca.crt")
            key, chain, ca = ((certificates / name).read_bytes() for name in names)
            is_mutual = script["tls"] == "mutual"
            credentials = grpc.ssl_server_credentials(
                [(key, chain)], ca if is_mutual else None, is_mutual
            )
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        else:
            port = self._server.add_insecure_port("127.0.0.1:0")
        self._relay = Relay(port, rests)
        self._runtime = _Runtime(script, self._relay)
        runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(self._runtime, self._server)
        self.address = f"127.0.0.1:{self._relay.port}"

    def __enter__(self) -> "ConformanceServer":
        self._server.start()
        if self._is_down:
            self._relay.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._relay.close()
        self._server.stop(0).wait()

    def wait(self) -> None:
        """Serves until the process is killed."""
        self._server.wait_for_termination()

    def seen(self, num_cancelled: int = 0) -> Json:
        """What clients did, once `num_cancelled` generations were cancelled or time is up."""
        runtime = self._runtime
        for _ in range(num_cancelled):
            runtime.cancellations.acquire(timeout=_PATIENCE_S)
        return {
            "commands": runtime.commands,
            "calls": dict(runtime.calls),
            "cancelled": runtime.num_cancelled,
            "sent_before_status": runtime.num_sent_before_status,
            "unanswered": len(runtime.answers),
        }


class _Runtime(runtime_pb2_grpc.RuntimeServiceServicer):
    def __init__(self, script: Json, relay: Relay) -> None:
        self.answers: list[Json] = list(script.get("answers", ()))
        self.commands: list[Json] = []
        self.calls: Counter[str] = Counter()
        self.cancellations = threading.Semaphore(0)
        self.num_cancelled = 0
        self.num_sent_before_status: int | None = None
        self._num_sent = 0
        self._credit: dict[str, _Credit] = {}
        self._api_key = script.get("api_key", "")
        self._relay = relay
        self._lock = threading.Lock()
        # Answers of which everything was given to be sent.
        self._num_whole = 0
        self._is_whole = threading.Condition()

    def GetStatus(self, request: Any, context: Any) -> Any:
        self._enter("GetStatus", context)
        if self.num_sent_before_status is None:
            self.num_sent_before_status = self._num_sent
        for step in self._answer("status"):
            if "fail" in step:
                _abort(context, step["fail"])
            return ParseDict(step["status"], pb.GetStatusResponse())
        raise AssertionError("an answer to GetStatus has a step")

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        self._enter("GenerateStream", context)
        ended = threading.Event()
        steps = self._answer_to(request)
        # Noted here: gRPC drops what a cancelled call had still to send, and the wait behind it.
        if any("wait_for_cancel" in step for step in steps):
            context.add_callback(self._note_cancel)
        context.add_callback(ended.set)
        for events in self._play(request, steps, ended, context):
            yield pb.GenerateStreamResponse(events=events)

    def Generate(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        self._enter("Generate", context)
        news: Queue[list[pb.Event] | None] = Queue()
        running: dict[str, threading.Event] = {}

        def end_all() -> None:
            for ended in list(running.values()):
                ended.set()

        context.add_callback(end_all)
        reader = threading.Thread(target=self._read, args=(requests, running, news), daemon=True)
        reader.start()
        while (events := news.get()) is not None:
            yield pb.GenerateResponse(events=events)
            news.task_done()  # gRPC comes back when it has sent them

    def _read(
        self,
        requests: Iterator[Any],
        running: dict[str, threading.Event],
        news: "Queue[list[pb.Event] | None]",
    ) -> None:
        players = []
        with suppress(grpc.RpcError):  # the caller broke its call
            for request in requests:
                if request.WhichOneof("command") == "cancel":
                    running[request.cancel.request_id].set()
                    continue
                if request.WhichOneof("command") == "credit":
                    self._credit[request.credit.request_id].add(request.credit.tokens)
                    continue
                ended = threading.Event()
                command = _command(request)
                running[command.request_id] = ended
                self._credit[command.request_id] = _Credit(command)
                player = threading.Thread(
                    target=self._play_into, args=(news, request, ended), daemon=True
                )
                player.start()
                players.append(player)
        for player in players:
            player.join()
        news.put(None)

    def _play_into(
        self, news: "Queue[list[pb.Event] | None]", request: Any, ended: threading.Event
    ) -> None:
        for events in self._play(request, self._answer_to(request), ended, None, news.join):
            for event in events:
                event.request_id = _command(request).request_id
            news.put(events)
        with self._is_whole:
            self._num_whole += 1
            self._is_whole.notify_all()

    def _answer_to(self, request: Any) -> list[Json]:
        """The steps of the answer to a command, which is noted."""
        command, name = _command(request), request.WhichOneof("command")
        told = {name: MessageToDict(command, preserving_proto_field_name=True)}
        told[name].pop("request_id", None)
        if len(text := told[name].get("text", "")) > 1000:
            told[name]["text"] = f"{len(text)} characters"
        if arguments := told[name].get("chat", {}).get("template_arguments"):
            # Each client spaces it in its own way.
            told[name]["chat"]["template_arguments"] = json.loads(arguments)
        self.commands.append(told)
        return self._answer(command.generation_id if name == "resume" else command.text)

    def _play(
        self,
        request: Any,
        steps: list[Json],
        ended: threading.Event,
        context: Any,
        are_sent: Callable[[], None] = lambda: None,
    ) -> Iterator[list[pb.Event]]:
        """Follows the steps; a generation that is resumed skips what its client has.

        Args:
            are_sent: returns when what was given so far has been sent.
        """
        known = list(request.resume.received_tokens)
        for step in steps:
            if "fail" in step:
                _abort(context, step["fail"])
            elif "cut" in step:
                are_sent()
                self._relay.cut(for_good=step["cut"] == "for_good")
            elif "wait_for_answers" in step:
                num_others = step["wait_for_answers"]
                with self._is_whole:
                    are_whole = self._is_whole.wait_for(
                        lambda num=num_others: self._num_whole >= num, _PATIENCE_S
                    )
                assert are_whole, "others are not asked for"
            elif "wait_for_cancel" in step:
                if ended.wait(_PATIENCE_S) and context is None:
                    self._note_cancel()
            else:
                for events in _events(step):
                    if context is None:
                        self._credit[_command(request).request_id].spend(events)
                    if left := [event for event in events if not _is_known(event, known)]:
                        self._num_sent += 1
                        yield left

    def _answer(self, to: str) -> list[Json]:
        """The steps of the first answer left that is to `to`, or to anything."""
        with self._lock:
            for answer in self.answers:
                if answer.get("to", to) == to:
                    self.answers.remove(answer)
                    return list(answer["steps"])
        unexpected = {"code": 9, "message": f"the scenario has no (further) answer to {to[:99]!r}"}
        return [{"error": unexpected}] if to != "status" else [{"fail": unexpected}]

    def _note_cancel(self) -> None:
        with self._lock:
            self.num_cancelled += 1
        self.cancellations.release()

    def _enter(self, name: str, context: Any) -> None:
        self.calls[name] += 1
        shown = dict(context.invocation_metadata()).get("authorization", "")
        if self._api_key and shown != f"Bearer {self._api_key}":
            reason = {"reason": "UNAUTHENTICATED", "domain": "millrace"}
            info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", **reason}
            message = "An API key is needed."
            _abort(context, {"code": 16, "message": message, "details": [info]})


class _Credit:
    """Tokens that a client takes of a generation; without a limit where it names none."""

    def __init__(self, command: Any) -> None:
        self._is_limited = command.HasField("credit_tokens")
        self._left = command.credit_tokens
        self._has_more = threading.Condition()

    def add(self, tokens: int) -> None:
        """The client takes so many more."""
        with self._has_more:
            self._left += tokens
            self._has_more.notify()

    def spend(self, events: list[pb.Event]) -> None:
        """Waits until the client takes these, as a daemon does."""
        if not self._is_limited:
            return
        wanted = sum(len(event.tokens.token_ids) for event in events)
        with self._has_more:
            is_there = self._has_more.wait_for(lambda: self._left >= wanted, _PATIENCE_S)
            assert is_there, "the client gives no credit"
            self._left -= wanted


def _command(request: Any) -> Any:
    return getattr(request, request.WhichOneof("command"))


def _events(step: Json) -> Iterator[list[pb.Event]]:
    """Messages of events: one of one, one of several, or a flood of them."""
    if "flood" in step:
        flood = step["flood"]
        for index in range(flood["chunks"]):
            tokens = pb.TokenChunk(token_ids=[index], text="x" * flood["bytes"])
            yield [pb.Event(tokens=tokens)]
        return
    parts = step.get("events", [step])
    assert all(key in _EVENTS for part in parts for key in part), f"no such step: {step}"
    yield [ParseDict(part, pb.Event()) for part in parts]


def _is_known(event: pb.Event, known: list[int]) -> bool:
    """Whether a client has that chunk; takes it off what it has."""
    if event.WhichOneof("event") != "tokens":
        return False
    index, num_tokens = event.tokens.sample_index, len(event.tokens.token_ids)
    if index >= len(known) or known[index] < num_tokens:
        return False
    known[index] -= num_tokens
    return True


def _abort(context: Any, status: Json) -> None:
    context.abort_with_status(rpc_status.to_status(ParseDict(status, status_pb2.Status())))


def main() -> None:
    """Serves the scenario named by the first argument."""
    with ConformanceServer(load_scenarios()[sys.argv[1]]["server"]) as server:
        print(server.address.rpartition(":")[2], flush=True)  # noqa: T201
        server.wait()


if __name__ == "__main__":
    main()
