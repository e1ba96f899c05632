"""The Python SDK's runner of the conformance suite: a task a line on stdin, its result on stdout.

With `--async` it uses `AsyncClient`; sessions are asynchronous either way.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import millrace
from google.protobuf.json_format import MessageToDict
from millrace.retries import Retries
from millrace.runtime.v1 import runtime_pb2

Json = dict[str, Any]


class Report:
    """What came of one generation."""

    def __init__(self, action: Json) -> None:
        self._action = action
        self.json: Json = {"num_chunks": 0, "num_bytes": 0}
        if not action.get("terse"):
            self.json |= {"chunks": [], "logprobs": [], "prompt_logprobs": []}

    def take(self, chunk: millrace.Chunk) -> bool:
        """Notes a chunk; False once the action says to leave."""
        self.json["num_chunks"] += 1
        self.json["num_bytes"] += len(chunk.text.encode())
        if not self._action.get("terse"):
            self.json["chunks"].append(chunk.text)
            self.json["logprobs"].append(_logprobs(chunk.logprobs))
            self.json["prompt_logprobs"].append(_logprobs(chunk.prompt_logprobs))
        return self.json["num_chunks"] != self._action.get("cancel_after_chunks")

    @property
    def is_pause(self) -> bool:
        """Whether the reader rests now, and then asks for the server's status."""
        return self.json["num_chunks"] == self._action.get("pause_after_chunks")

    @property
    def pause_s(self) -> float:
        """For how long."""
        return float(self._action["pause_s"])

    def finish(self, stream: millrace.Stream | millrace.AsyncStream, is_left: bool) -> Json:
        """The result, when the stream has ended without an error."""
        self.json |= {"num_resumes": stream.num_resumes, "ended": "cancelled"}
        self.json["received_tokens"] = list(stream.received_tokens)
        if is_left:
            return self.json
        result = asdict(stream.result)
        result |= {"ended": "finished", "seed": str(stream.result.seed)}
        result["tokens_per_s"] = stream.result.tokens_per_s
        if not self._action.get("terse"):
            return self.json | result | {"text": stream.result.text}
        return self.json | {"ended": "finished"}

    def fail(self, error: millrace.MillraceError) -> Json:
        """The result, when it has ended with one."""
        code = error.code.name
        told = {"reason": error.reason, "code": code, "message": error.message}
        told |= {"metadata": dict(error.metadata), "retry_after_s": error.retry_after_s}
        return self.json | {"ended": "error", "error": told}


def _logprobs(entries: tuple[runtime_pb2.TokenLogprob, ...]) -> list[Json]:
    return [
        MessageToDict(
            e, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for e in entries
    ]


def _arguments(asked: Json) -> tuple[Any, Json]:
    options = dict(asked)
    if "seed" in options:
        options["seed"] = int(options["seed"])
    if "logit_bias" in options:
        options["logit_bias"] = {int(k): v for k, v in options["logit_bias"].items()}
    return options.pop("prompt"), options


def _status(status: runtime_pb2.GetStatusResponse) -> Json:
    state = runtime_pb2.RuntimeState.Name(status.state).removeprefix("RUNTIME_STATE_").lower()
    engine = status.engine
    return {"ended": "finished", "state": state, "engine": engine.name, "model": engine.model}


def run_generation(client: millrace.Client, action: Json) -> Json:
    report = Report(action)
    try:
        if "status" in action:
            return _status(client.get_status())
        with _open(client, action) as stream:
            for chunk in stream:
                if not report.take(chunk):
                    return report.finish(stream, is_left=True)
                if report.is_pause:
                    time.sleep(report.pause_s)
                    client.get_status()
            return report.finish(stream, is_left=False)
    except millrace.MillraceError as error:
        return report.fail(error)


async def run_async_generation(client: Any, action: Json, status_of: millrace.AsyncClient) -> Json:
    """By an `AsyncClient` or a `Session`; who is slow asks `status_of` afterwards."""
    report = Report(action)
    try:
        if "status" in action:
            return _status(await client.get_status())
        async with _open(client, action) as stream:
            async for chunk in stream:
                if not report.take(chunk):
                    return report.finish(stream, is_left=True)
                if report.is_pause:
                    await asyncio.sleep(report.pause_s)
                    await status_of.get_status()
            return report.finish(stream, is_left=False)
    except millrace.MillraceError as error:
        return report.fail(error)


def _open(client: Any, action: Json) -> Any:
    if "resume" in action:
        return client.resume(**action["resume"])
    prompt, options = _arguments(action["generate"])
    return client.generate(prompt, **options)


async def run_session(client: millrace.AsyncClient, actions: list[Json]) -> list[Json]:
    async with client.session() as session:
        played = (run_async_generation(session, action, client) for action in actions)
        return await asyncio.gather(*played)


def _client_options(task: Json) -> Json:
    options = dict(task.get("options", {}))
    retries = Retries(max_attempts=options.pop("max_attempts", 4))
    return {"runtime": task["address"], "retries": retries, **options}


async def run_async(task: Json, only_sessions: bool) -> list[Json]:
    results: list[Json] = []
    async with millrace.AsyncClient(**_client_options(task)) as client:
        for action in task["do"]:
            if "session" in action:
                results += await run_session(client, action["session"])
            elif not only_sessions:
                results.append(await run_async_generation(client, action, client))
    return results


def run(task: Json) -> list[Json]:
    results: list[Json] = []
    with millrace.Client(**_client_options(task)) as client:
        for action in task["do"]:
            if "session" in action:
                results += asyncio.run(run_async({**task, "do": [action]}, only_sessions=True))
            else:
                results.append(run_generation(client, action))
    return results


def main() -> None:
    is_async = "--async" in sys.argv
    for line in sys.stdin:
        task = json.loads(line)
        results = asyncio.run(run_async(task, only_sessions=False)) if is_async else run(task)
        print(json.dumps({"results": results}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
