"""llama.cpp (PyPI `xllamacpp`) on the workloads of bench/cpu_peers.py: one JSON line.

python bench/peers/llamacpp.py MODEL.gguf STREAMS PROMPT_TOKENS NEW_TOKENS
"""

import json
import random
import sys
import threading
import time

import xllamacpp


def main(model: str, streams: int, prompt_tokens: int, new_tokens: int) -> None:
    """Runs `streams` completions at once, after a warm-up, and prints their speed."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = streams
    params.n_ctx = streams * (prompt_tokens + new_tokens + 64)
    params.cpuparams.n_threads = 2
    params.cpuparams_batch.n_threads = 2
    params.warmup = True
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    generator = random.Random(0)

    def completion(tokens: int, out: list[dict]) -> None:
        prompt = [generator.randrange(100, 40_000) for _ in range(tokens)]
        request = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
        }
        out.append(server.handle_completions(request))

    completion(8, [])
    results: list[dict] = []
    threads = [
        threading.Thread(target=completion, args=(prompt_tokens, results)) for _ in range(streams)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s = time.perf_counter() - start
    timings = [result["timings"] for result in results]
    assert all(t["predicted_n"] == new_tokens for t in timings), timings
    print(
        json.dumps(
            {
                "decode_tok_s": timings[0]["predicted_per_second"],
                "prompt_tok_s": timings[0]["prompt_per_second"],
                "total_tok_s": streams * new_tokens / wall_s,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:5]))
