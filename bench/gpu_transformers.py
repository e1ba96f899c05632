"""transformers on the workloads of `bench.gpu_offline`, same shapes, same device: what a user has without a server.

python -m bench.gpu_transformers --model llama-3.1-8b --cases "generate b1,generate t2,continuous t2"
Random bf16 weights and prompts, greedy, end tokens never drawn. Prints one JSON line a case.
"""

import argparse
import json
import time
from typing import Any

import torch

from bench.gpu_models import MODELS, LlamaSizes
from bench.gpu_offline import CASES
from bench.gpu_timing import require_gpu
from bench.peer_libraries import peer_libraries

with peer_libraries("transformers==5.23.0"):
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def model_of(sizes: LlamaSizes) -> Any:
    """transformers' model, bf16, random."""
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, head_dim=sizes.head_dim,
        num_key_value_heads=sizes.kv_heads, max_position_embeddings=8192,
        eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation("sdpa")
    return model.eval()


def generate(model: Any, prompts: torch.Tensor, settings: GenerationConfig) -> int:
    """`model.generate` on one padded batch; tokens drawn."""
    mask = torch.ones_like(prompts)
    out = model.generate(prompts, attention_mask=mask, generation_config=settings)
    return int(out.shape[1] - prompts.shape[1]) * len(prompts)


def continuous(model: Any, prompts: torch.Tensor, settings: GenerationConfig) -> int:
    """Its continuous batching, over a paged cache of the size that it chooses; tokens drawn. Its manager starts anew.

    Raises:
        RuntimeError: a request failed; with its message.
    """
    outputs = model.generate_batch(
        inputs=prompts.tolist(), generation_config=settings, progress_bar=False
    )
    for output in outputs.values():
        if output.error:
            raise RuntimeError(output.error)
    return sum(len(output.generated_tokens) for output in outputs.values())


WAYS = {"generate": generate, "continuous": continuous}


def measured(model: Any, way: str, case: str, vocab_size: int) -> dict[str, object]:
    """One workload after a small warm-up of the same way."""
    count, prompt_tokens, output_tokens = CASES[case]

    def run(count: int, output_tokens: int) -> float:
        prompts = torch.randint(0, vocab_size, (count, prompt_tokens), device="cuda")
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=output_tokens, min_new_tokens=output_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        began = time.perf_counter()
        total = WAYS[way](model, prompts, settings)
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
        assert total == count * output_tokens, f"{total} tokens came"
        return wall

    run(min(count, 8), 4)
    wall = run(count, output_tokens)
    total = count * output_tokens
    return {
        "out_tok_s": round(total / wall, 1), "wall_s": round(wall, 2),
        "ms_per_token": round(wall / output_tokens * 1e3, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--cases", default="generate b1,generate t2,continuous t2")
    options = parser.parse_args()
    require_gpu()
    sizes = MODELS[options.model]
    common = {"model": options.model, "gpu": torch.cuda.get_device_name()}
    with torch.no_grad():  # its continuous batching does not run in inference mode
        model = model_of(sizes)
        for wanted in options.cases.split(","):
            way, case = wanted.split()
            try:
                result = measured(model, way, case, sizes.vocab)
            except Exception as error:  # a line for the failing case, and on to the next
                result = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(common | {"case": f"transformers {wanted}"} | result), flush=True)


if __name__ == "__main__":
    main()
