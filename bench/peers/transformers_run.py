"""transformers `generate` in bf16 on the workloads of bench/cpu_peers.py: one JSON line.

python bench/peers/transformers_run.py FOLDER_OR_GGUF STREAMS PROMPT_TOKENS NEW_TOKENS
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
import transformers


def main(model: str, streams: int, prompt_tokens: int, new_tokens: int) -> None:
    """Runs one batch of `streams` greedy generations, after a warm-up, and prints the speed."""
    torch.set_num_threads(2)
    path = Path(model)
    arguments = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent) if arguments else model
    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **arguments
    ).eval()
    generator = random.Random(0)

    def run(tokens: int, count: int) -> float:
        ids = torch.tensor(
            [[generator.randrange(100, 40_000) for _ in range(tokens)] for _ in range(streams)]
        )
        start = time.perf_counter()
        with torch.inference_mode():
            out = net.generate(
                ids, attention_mask=torch.ones_like(ids),
                max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == tokens + count
        return time.perf_counter() - start

    run(8, 4)
    first_s = run(prompt_tokens, 1)
    wall_s = run(prompt_tokens, new_tokens)
    print(
        json.dumps(
            {
                "decode_tok_s": (new_tokens - 1) / (wall_s - first_s) if new_tokens > 1 else None,
                "prompt_tok_s": streams * prompt_tokens / first_s,
                "total_tok_s": streams * new_tokens / wall_s,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:5]))
