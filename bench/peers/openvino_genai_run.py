"""OpenVINO GenAI on the workloads of bench/cpu_peers.py: one JSON line.

python bench/peers/openvino_genai_run.py MODEL.gguf STREAMS PROMPT_TOKENS NEW_TOKENS
"""

import json
import random
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


def main(model: str, streams: int, prompt_tokens: int, new_tokens: int) -> None:
    """Runs `streams` generations in one continuous batch, after a warm-up, and prints the speed."""
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 1024
    scheduler.max_num_seqs = max(streams, 1)
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = False
    pipeline = genai.LLMPipeline(model, "CPU", scheduler_config=scheduler)
    config = genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    config.do_sample = False
    generator = random.Random(0)

    def run(count: int, tokens: int) -> tuple[float, genai.PerfMetrics]:
        rows = [[generator.randrange(100, 40_000) for _ in range(tokens)] for _ in range(count)]
        inputs = genai.TokenizedInputs(
            ov.Tensor(np.array(rows, dtype=np.int64)),
            ov.Tensor(np.ones((count, tokens), dtype=np.int64)),
        )
        start = time.perf_counter()
        result = pipeline.generate(inputs, config)
        return time.perf_counter() - start, result.perf_metrics

    run(streams, 8)
    wall_s, metrics = run(streams, prompt_tokens)
    ttft_s = metrics.get_ttft().mean / 1000
    print(
        json.dumps(
            {
                "decode_tok_s": (new_tokens - 1) / (wall_s - ttft_s),
                "prompt_tok_s": prompt_tokens / ttft_s,
                "total_tok_s": streams * new_tokens / wall_s,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:5]))
