"""What a token costs a gateway on its way through, without sockets: parse, dispatch, join, serialize.

    python -m bench.gateway_path [--streams 64] [--steps 2000]

One message a step carries a token of every stream, as runtimes send them. Prints one JSON line.
"""

import argparse
import asyncio
import json
import time

from millrace.runtime.v1 import runtime_pb2 as pb
from prometheus_client import CollectorRegistry

from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.gateway import Gateway
from runtime_service.gateway.kept import KeptGenerations
from runtime_service.gateway.metrics import GatewayMetrics
from runtime_service.gateway.runtime_link import LinkOptions, RuntimeLink
from shared.log import configure_logging


class DeafLink(RuntimeLink):
    """A runtime that always serves, and that nothing is sent to."""

    @property
    def is_usable(self) -> bool:
        return True

    def start(self) -> None:
        pass

    def _open_call(self) -> None:
        pass


async def measure(num_streams: int, num_steps: int) -> float:
    """Microseconds of CPU time a token."""
    options = LinkOptions(1.0, 10.0, 1 << 20)
    fleet = Fleet(None, (), options)
    link = DeafLink("127.0.0.1:1", options, lambda: None)
    fleet._links[link.address] = link
    gateway = Gateway(fleet, GatewayMetrics(CollectorRegistry()), 30.0, KeptGenerations(60.0))
    call = gateway.open_call()
    for number in range(num_streams):
        start = pb.StartGeneration(request_id=str(number), token_ids=pb.TokenIds(ids=[1, 2, 3]))
        call.follow(pb.GenerateRequest(start=start))
    started = pb.GenerationStarted(seed=1, prompt_tokens=3)
    chunk = pb.TokenChunk(token_ids=[40], text="ab")
    names = list(link._runs)
    for name in names:
        link._dispatch(pb.Event(request_id=name, started=started))
    step = pb.GenerateResponse(events=[pb.Event(request_id=n, tokens=chunk) for n in names])
    data = step.SerializeToString()
    messages = call.messages()
    await anext(messages)
    spent_s = 0.0
    for number in range(num_steps):
        if number == num_steps // 10:  # warm by now
            spent_s = time.process_time()
        for event in pb.GenerateResponse.FromString(data).events:
            link._dispatch(event)
        pb.GenerateResponse(events=await anext(messages)).SerializeToString()
    spent_s = time.process_time() - spent_s
    gateway.close_call(call)
    await link.close()
    return spent_s / (num_steps - num_steps // 10) / num_streams * 1e6


def main() -> None:
    """Measures once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    configure_logging("warning", "auto", "bench")
    cost_us = asyncio.run(measure(arguments.streams, arguments.steps))
    print(json.dumps({"streams": arguments.streams, "us_per_token": round(cost_us, 2)}))


if __name__ == "__main__":
    main()
