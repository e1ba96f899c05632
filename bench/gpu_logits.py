"""Logits of the GPU path beside transformers in bf16, both against transformers in fp32, teacher-forced.

python -m bench.gpu_kernels .gpu --models llama-3.2-1b   (needs no GPU)
python -m bench.gpu_logits .gpu --model llama-3.2-1b
Random weights of the model's shape, the same for all. Positions are computed twice: as prompts (many tokens a step)
and as decode steps of 1 and of 16 sequences. Prints one JSON line a way of computing. Law 5 wants an error to fp32 at
most 1.5 times that of transformers in bf16, and the same best token where fp32's margin exceeds bf16's noise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.gpu_kernels import read
from bench.gpu_models import MODELS, LlamaSizes, llama_graph, random_weights
from runtime_service.execution.cuda_engine import CudaEngine, assemble
from runtime_service.execution.device_stream import CudaStream
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams

_TOKENS, _BLOCK_TOKENS, _PREFILLED = 512, 16, 384


def transformers_model(sizes: LlamaSizes, packed: dict[str, dict[str, torch.Tensor]]) -> Any:
    """The same weights in transformers' model, fp32 on the device."""
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, head_dim=sizes.head_dim,
        num_key_value_heads=sizes.kv_heads, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config)
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    state = {
        "model.embed_tokens.weight": packed["embed"]["weight"],
        "model.norm.weight": packed[f"{sizes.layers}.norm"]["weight"],
        "lm_head.weight": packed["head"]["weight"],
    }
    for i in range(sizes.layers):
        at = f"model.layers.{i}."
        parts = torch.split(packed[f"{i}.qkv"]["weight"], [q, kv, kv])
        names = [f"{at}self_attn.{n}_proj.weight" for n in "qkv"]
        state |= dict(zip(names, parts, strict=True))
        gate, up = packed[f"{i}.gate_up"]["weight"].chunk(2)
        state |= {
            f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up,
            f"{at}self_attn.o_proj.weight": packed[f"{i}.o"]["weight"],
            f"{at}mlp.down_proj.weight": packed[f"{i}.down"]["weight"],
            f"{at}input_layernorm.weight": packed[f"{i}.norm"]["weight"],
            f"{at}post_attention_layernorm.weight": packed[f"{i}.norm2"]["weight"],
        }  # fmt: skip
    model.load_state_dict(state, strict=True)
    return model.eval()


def of_transformers(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """fp32 [sequences, tokens, vocab], on the host."""
    with torch.inference_mode():
        return torch.stack([model(row[None]).logits[0].float().cpu() for row in sequences])


def of_engine(engine: CudaEngine, sequences: torch.Tensor, batch: int) -> torch.Tensor:
    """As `of_transformers`: the first tokens as one prompt each, the rest by decode steps of `batch` sequences."""
    num_blocks = _TOKENS // _BLOCK_TOKENS
    parts = []
    for first in range(0, len(sequences), batch):
        group = sequences[first : first + batch].cpu().int()
        new = tuple(
            NewSequence(
                row, tokens.tolist(), _TOKENS, SamplingParams(), StopParams(1), 0, 0,
                [*range(row * num_blocks, (row + 1) * num_blocks)],
            )
            for row, tokens in enumerate(group)
        )  # fmt: skip
        engine.rows.apply(SchedulerOutput(0, (), new, (), ()))
        prompts = []
        for row in range(len(group)):
            sent = engine.rows.send([ScheduledSequence(row, 0, _PREFILLED)])
            prompts.append(engine.graphs.run_for_all_logits(sent).cpu())
        steps = []
        for at in range(_PREFILLED, _TOKENS):
            sent = engine.rows.send([ScheduledSequence(row, at, 1) for row in range(len(group))])
            steps.append(engine.graphs.run(sent).cpu())
        parts.append(torch.cat([torch.stack(prompts), torch.stack(steps, 1)], 1))
    return torch.cat(parts)


def compared(found: torch.Tensor, noisy: torch.Tensor, truth: torch.Tensor) -> dict[str, object]:
    """Errors of ours and of transformers in bf16, and how often ours picks fp32's best token where that is clear."""
    ours = ((found - truth).norm(dim=-1) / truth.norm(dim=-1)).flatten()
    theirs = ((noisy - truth).norm(dim=-1) / truth.norm(dim=-1)).flatten()
    two = truth.topk(2, -1).values
    # Two deviations of the difference of two logits that bf16 has blurred.
    noise = 2 * 2**0.5 * (noisy - truth).std(-1)
    clear = (two[..., 0] - two[..., 1]) > noise
    agrees = found.argmax(-1) == truth.argmax(-1)
    theirs_agree = noisy.argmax(-1) == truth.argmax(-1)
    return {
        "error": round(float(ours.mean()), 5), "transformers_bf16_error": round(float(theirs.mean()), 5),
        "ratio": round(float(ours.mean() / theirs.mean()), 4),
        "worst_ratio": round(float((ours / theirs).max()), 3),
        "clear_positions": int(clear.sum()), "positions": clear.numel(),
        "top1_where_clear": round(float(agrees[clear].float().mean()), 5),
        "transformers_bf16_top1_where_clear": round(float(theirs_agree[clear].float().mean()), 5),
        "top1": round(float(agrees.float().mean()), 5),
        "transformers_bf16_top1": round(float(theirs_agree.float().mean()), 5),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    sizes = MODELS[options.model]
    graph = llama_graph(sizes, "plain")
    packed = random_weights(graph)
    generator = torch.Generator("cuda").manual_seed(1)
    sequences = torch.randint(0, sizes.vocab, (4, _TOKENS), device="cuda", generator=generator)
    model = transformers_model(sizes, packed)
    truth = of_transformers(model, sequences)
    for parameter in model.parameters():  # and no buffer: transformers keeps RoPE's in fp32
        parameter.data = parameter.data.bfloat16()
    noisy = of_transformers(model, sequences)
    del model
    torch.cuda.empty_cache()
    limits = RunnerOptions(
        max_sequences=_TOKENS,
        max_sequence_tokens=_TOKENS,
        max_step_tokens=_TOKENS,
        kv_bytes=1 << 30,
    )
    with torch.inference_mode():
        library = read(options.folder, f"{options.arch}.models")
        engine = assemble(graph, library, packed, limits, CudaStream(), lambda: 8 << 30)
        engine.graphs.capture()
        for batch in (1, 4):
            found = of_engine(engine, sequences, batch)
            for name, part in (("prompt", slice(0, _PREFILLED)), ("decode", slice(_PREFILLED, None))):  # fmt: skip
                line = compared(found[:, part], noisy[:, part], truth[:, part])
                case = {"model": options.model, "gpu": torch.cuda.get_device_name(), "way": name}
                print(json.dumps(case | {"batch": batch} | line), flush=True)


if __name__ == "__main__":
    main()
