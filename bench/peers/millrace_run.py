"""A Millrace runtime daemon over gRPC on the workloads of bench/cpu_peers.py: one JSON line.

    python bench/peers/millrace_run.py ADDRESS STREAMS PROMPT_TOKENS NEW_TOKENS

The daemon must be serving; what is measured is what a client sees.
"""

import json
import random
import sys
import time
from collections.abc import Iterator

import grpc
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc


def main(address: str, streams: int, prompt_tokens: int, new_tokens: int) -> None:
    """Runs `streams` generations on one call, after a warm-up, and prints their speed."""
    generator = random.Random(time.time_ns())
    with grpc.insecure_channel(address) as channel:
        stub = runtime_pb2_grpc.RuntimeServiceStub(channel)

        def run(count: int, tokens: int, new: int) -> tuple[float, float, float]:
            """(start, first token of all, end), perf_counter seconds."""

            def starts() -> Iterator[runtime_pb2.GenerateRequest]:
                for index in range(count):
                    ids = [generator.randrange(100, 40_000) for _ in range(tokens)]
                    yield runtime_pb2.GenerateRequest(
                        start=runtime_pb2.StartGeneration(
                            request_id=str(index),
                            token_ids=runtime_pb2.TokenIds(ids=ids),
                            stop=runtime_pb2.StopConditions(
                                max_new_tokens=new, ignore_end_tokens=True
                            ),
                        )
                    )

            waiting = {str(index) for index in range(count)}
            begin = first = time.perf_counter()
            produced = 0
            for response in stub.Generate(starts()):
                for event in response.events:
                    kind = event.WhichOneof("event")
                    assert kind != "error", event
                    if kind == "tokens":
                        produced += len(event.tokens.token_ids)
                        if event.request_id in waiting:
                            waiting.discard(event.request_id)
                            first = time.perf_counter()
            assert produced == count * new, f"{produced} tokens of {count * new}"
            return begin, first, time.perf_counter()

        run(streams, 8, 4)
        begin, first, end = run(streams, prompt_tokens, new_tokens)
    print(
        json.dumps(
            {
                "decode_tok_s": (new_tokens - 1) / (end - first) if new_tokens > 1 else None,
                "prompt_tok_s": streams * prompt_tokens / (first - begin),
                "total_tok_s": streams * new_tokens / (end - begin),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:5]))
