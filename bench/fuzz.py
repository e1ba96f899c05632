"""Random and mutated messages at every rpc of every daemon: no crash, no leak, documented errors only.

    python -m bench.fuzz [--messages 100000] [--seed 0]

Starts a compile daemon, a runtime of a tiny engine and a gateway as processes. A third of the
messages are random bytes, a third are valid ones with bits flipped, cut or joined, a third are built
field by field from the protocol's descriptors with extreme values; requests of KServe's and OpenAI's
protocols are nearly right (bench/fuzz_requests.py). Prints one JSON line a service.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status
from millrace.artifact.v1 import artifact_pb2
from millrace.compiler.v1 import compiler_pb2
from millrace.fleet.v1 import fleet_pb2
from millrace.kserve.v2 import inference_pb2
from millrace.runtime.v1 import runtime_pb2

from bench.fuzz_http import fuzz_http
from bench.fuzz_requests import EXTREME, FLOATS, infer_request, mutated, text
from shared.errors import ERRORS, reason_of
from tests.integration.fleet_processes import FleetClient, FleetProcesses

# What gRPC itself says of a call that was cut off by us.
BY_GRPC = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
# What grpc.aio's client says where it wrote on to a call that the daemon had ended.
WRITE_AFTER_END = "Internal error from Core"
CALL_S = 2.0
AT_ONCE = 128
OPENAI = "openai"


def main() -> None:
    """Fuzzes every service, and fails where a daemon did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        FleetProcesses(Path(folder), num_runtimes=1, num_compilers=1) as fleet,
    ):
        asyncio.run(fuzz(fleet, arguments.messages, arguments.seed, print_line))


def print_line(line: dict[str, Any]) -> None:
    """As it comes: all of it takes a while."""
    print(json.dumps(line), flush=True)


async def fuzz(
    fleet: FleetProcesses,
    num_messages: int,
    seed: int,
    on_line: Callable[[dict[str, Any]], None],
) -> None:
    """Tells what every service said to its share of `num_messages`.

    Raises:
        AssertionError: a daemon ended, leaked, or said what is not documented.
    """
    async with grpc.aio.insecure_channel(fleet.gateway.address) as channel:
        gateway = FleetClient(channel)
        await gateway.deploy(fleet.checkpoint, 1)
        services = [
            (fleet.gateway, runtime_pb2.DESCRIPTOR.services_by_name["RuntimeService"]),
            (fleet.runtimes[0], runtime_pb2.DESCRIPTOR.services_by_name["RuntimeService"]),
            (fleet.gateway, fleet_pb2.DESCRIPTOR.services_by_name["FleetService"]),
            (fleet.gateway, inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]),
            (fleet.gateway, None),
            (fleet.compilers[0], compiler_pb2.DESCRIPTOR.services_by_name["CompilerService"]),
            (fleet.compilers[0], artifact_pb2.DESCRIPTOR.services_by_name["ArtifactService"]),
        ]
        for number, (daemon, service) in enumerate(services):
            # The runtime may have been told to unload what it served.
            await gateway.deploy(fleet.checkpoint, 1)
            before_bytes = psutil.Process(daemon.process.pid).memory_info().rss
            started_s = time.monotonic()
            share, draw = num_messages // len(services), random.Random(seed + number)
            if service is None:
                answers = await fuzz_http(fleet.http_address, share, draw)
            else:
                answers = await fuzz_service(daemon.address, service, share, draw)
            name = service.full_name if service is not None else OPENAI
            assert daemon.process.poll() is None, f"{name} ended: {daemon.lines[-3:]}"
            unforeseen = [line for line in daemon.lines if is_unforeseen(str(line.get("event")))]
            assert not unforeseen, unforeseen[0]
            after_bytes = psutil.Process(daemon.process.pid).memory_info().rss
            on_line(
                {
                    "service": name,
                    "at": "gateway" if daemon is fleet.gateway else "daemon",
                    "messages": share,
                    "answers": dict(answers.most_common()),
                    "rss_mb": [round(before_bytes / 1e6), round(after_bytes / 1e6)],
                    "seconds": round(time.monotonic() - started_s, 1),
                }
            )
        # Whatever was asked: it still serves, and holds nothing of it.
        await gateway.deploy(fleet.checkpoint, 1)
        await gateway.freed(20.0)


def is_unforeseen(event: str) -> bool:
    """Claims that a log line of that name tells of a mistake of ours."""
    return event.endswith("_unforeseen") or event == "background_failed"


async def fuzz_service(
    address: str, service: Any, num_messages: int, draw: random.Random
) -> Counter[str]:
    """How often each answer came.

    Raises:
        AssertionError: one of them is not documented.
    """
    answers: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        left = num_messages
        while left > 0:
            methods = [draw.choice(service.methods) for _ in range(min(AT_ONCE, left))]
            left -= len(methods)
            said = await asyncio.gather(*(answer(channel, m, draw) for m in methods))
            answers.update(said)
    return answers


async def answer(channel: grpc.aio.Channel, method: MethodDescriptor, draw: random.Random) -> str:
    """`OK`, or the reason of the error, of one call."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    messages = [message_of(method, draw) for _ in range(draw.randrange(1, 4))]
    try:
        if method.client_streaming:
            stream = channel.stream_stream(path)(iterate(messages), timeout=CALL_S)
            async for _ in stream:
                pass
        elif method.server_streaming:
            async for _ in channel.unary_stream(path)(messages[0], timeout=CALL_S):
                pass
        else:
            await channel.unary_unary(path)(messages[0], timeout=CALL_S)
    except grpc.aio.AioRpcError as error:
        if error.details() == WRITE_AFTER_END:
            return "CALL_ENDED"
        if error.code() in BY_GRPC:
            return error.code().name
        return documented_reason(error, path, messages)
    return "OK"


def documented_reason(error: grpc.aio.AioRpcError, path: str, messages: list[bytes]) -> str:
    """The reason of an error that docs/API.md knows, and that is no mistake of ours."""
    status = rpc_status.from_call(error)
    reason = reason_of(status) if status is not None else ""
    is_documented = reason in ERRORS and reason != "INTERNAL"
    assert is_documented, f"{path}: {error.code()} {error.details()} for {messages}"
    return reason


async def iterate(messages: list[bytes]) -> AsyncIterator[bytes]:
    """The messages of a call, one after the other."""
    for message in messages:
        yield message


def message_of(method: MethodDescriptor, draw: random.Random) -> bytes:
    """Bytes to send as the request of `method`."""
    kind = draw.randrange(3)
    if kind == 0:
        return draw.randbytes(draw.choice((0, 1, 3, 20, 200)))
    if method.input_type is inference_pb2.ModelInferRequest.DESCRIPTOR:
        message: Message = infer_request(draw)
    else:
        message = GetMessageClass(method.input_type)()
        fill(message, draw, 0)
    # A deployment or an engine of its own would cost the others their runtime.
    valid = message.SerializeToString()
    return valid if kind == 1 else mutated(valid, draw)


def fill(message: Message, draw: random.Random, depth: int) -> None:
    """Sets fields of `message` to values that are rarely sensible."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.5 or depth > 4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            for _ in range(draw.randrange(3)):
                if field.message_type is not None:
                    fill(getattr(message, field.name).add(), draw, depth + 1)
                else:
                    getattr(message, field.name).append(value_of(field, draw))
        elif field.message_type is not None:
            fill(getattr(message, field.name), draw, depth + 1)
            getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, value_of(field, draw))


def value_of(field: FieldDescriptor, draw: random.Random) -> Any:
    """A value that the field's type can hold."""
    kinds = FieldDescriptor
    if field.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
        return draw.choice(FLOATS)
    if field.cpp_type == kinds.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if field.type == kinds.TYPE_BYTES:
        return draw.randbytes(draw.randrange(40))
    if field.cpp_type == kinds.CPPTYPE_STRING:
        return text(draw)
    if field.cpp_type == kinds.CPPTYPE_ENUM:
        return draw.choice(field.enum_type.values).number
    bits = 32 if field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_UINT32) else 64
    is_signed = field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    return min(max(draw.choice((*EXTREME, draw.randrange(300))), low), high)


if __name__ == "__main__":
    main()
