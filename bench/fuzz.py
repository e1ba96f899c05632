"""Random and mutated messages at every rpc of every daemon: no crash, no leak, documented errors only.

    python -m bench.fuzz [--messages 100000] [--seed 0]

Starts a compile daemon, a runtime of a tiny engine and a gateway as processes. A third of the
messages are random bytes, a third are valid ones with bits flipped, cut or joined, a third are built
field by field from the protocol's descriptors with extreme values. Prints one JSON line a service.
"""

import argparse
import asyncio
import json
import math
import random
import string
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
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
from millrace.runtime.v1 import runtime_pb2

from shared.errors import ERRORS, reason_of
from tests.integration.fleet_processes import FleetClient, FleetProcesses

# What gRPC itself says of a call that was cut off by us.
BY_GRPC = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
# What grpc.aio's client says where it wrote on to a call that the daemon had ended.
WRITE_AFTER_END = "Internal error from Core"
CALL_S = 2.0
AT_ONCE = 16
# Numbers that break what was not thought of.
EXTREME = (0, 1, -1, 2, 63, 64, 65, 2**31 - 1, -(2**31), 2**63 - 1, 2**64 - 1)


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
        for line in asyncio.run(fuzz(fleet, arguments.messages, arguments.seed)):
            print(json.dumps(line))


async def fuzz(fleet: FleetProcesses, num_messages: int, seed: int) -> list[dict[str, Any]]:
    """What every service said to its share of `num_messages`.

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
            (fleet.compilers[0], compiler_pb2.DESCRIPTOR.services_by_name["CompilerService"]),
            (fleet.compilers[0], artifact_pb2.DESCRIPTOR.services_by_name["ArtifactService"]),
        ]
        lines = []
        for number, (daemon, service) in enumerate(services):
            before_bytes = psutil.Process(daemon.process.pid).memory_info().rss
            started_s = time.monotonic()
            answers = await fuzz_service(
                daemon.address, service, num_messages // len(services), random.Random(seed + number)
            )
            assert daemon.process.poll() is None, f"{service.name} ended: {daemon.lines[-3:]}"
            unforeseen = [x for x in daemon.lines if x.get("event") == "rpc_failed_unforeseen"]
            assert not unforeseen, unforeseen[0]
            after_bytes = psutil.Process(daemon.process.pid).memory_info().rss
            lines.append(
                {
                    "service": service.full_name,
                    "at": "gateway" if daemon is fleet.gateway else "daemon",
                    "messages": num_messages // len(services),
                    "answers": dict(answers.most_common()),
                    "rss_mb": [round(before_bytes / 1e6), round(after_bytes / 1e6)],
                    "seconds": round(time.monotonic() - started_s, 1),
                }
            )
        # Whatever was asked: it still serves, and holds nothing of it.
        await gateway.deploy(fleet.checkpoint, 1)
        await gateway.freed(20.0)
        return lines


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
    message = GetMessageClass(method.input_type)()
    fill(message, draw, 0)
    # A deployment or an engine of its own would cost the others their runtime.
    valid = message.SerializeToString()
    return valid if kind == 1 else mutated(valid, draw)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with some of it flipped, cut off, or said twice."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed * 2 if draw.random() < 0.2 else changed)


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
        return draw.choice((0.0, 1.0, -1.0, 0.5, 1e30, -1e30, math.nan, math.inf))
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


def text(draw: random.Random) -> str:
    """A string of some kind."""
    alphabet = draw.choice((string.ascii_lowercase, "aä🙂\0\n", string.printable, "/.:"))
    return "".join(draw.choices(alphabet, k=draw.choice((0, 1, 5, 70, 300))))


if __name__ == "__main__":
    main()
