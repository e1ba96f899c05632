"""Logits of the GPU path beside transformers in bf16, both against transformers in fp32, teacher-forced.

python -m bench.gpu_kernels .gpu --models llama-3.2-1b   (needs no GPU)
python -m bench.gpu_logits .gpu --model llama-3.2-1b
python -m bench.gpu_logits STORE --engine engines/NAME
The first has random weights of the model's shape, the same for all; the second a real bf16 engine out of a store, its
weights and a text that comes with the project. Positions are computed twice: as prompts (many tokens a step)
and as decode steps of 1 and of 4 sequences. Prints one JSON line a way of computing. Law 5 wants an error to fp32 at
most 1.5 times that of transformers in bf16, and the same best token where fp32's margin exceeds bf16's noise.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from bench.gpu_kernels import read
from bench.gpu_models import MODELS, LlamaSizes, llama_graph, random_weights
from bench.gpu_timing import require_gpu
from bench.peer_libraries import peer_libraries
from kernels.launcher import KernelLibrary
from runtime_service.execution.cuda_engine import CudaEngine, assemble
from runtime_service.execution.device_stream import CudaStream
from runtime_service.execution.loading import read_graph
from runtime_service.execution.machine_code import library_of
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightReader

with peer_libraries("transformers==5.23.0"):
    from transformers import LlamaConfig, LlamaForCausalLM

_TOKENS, _BLOCK_TOKENS, _PREFILLED = 512, 16, 384
_TEXT = Path(__file__).parents[1] / "compiler_service/calibration/public_domain.txt"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is computed in all ways.

    Args:
        packed: of all weights in bf16, by name and role, on the device.
        parts: by name, the checkpoint's tensors that a weight is made of, and their rows.
        sequences: int64 [sequences, _TOKENS], on the device.
    """

    name: str
    graph: Graph
    library: KernelLibrary
    packed: dict[str, dict[str, torch.Tensor]]
    parts: Mapping[str, tuple[tuple[str, int], ...]]
    sequences: torch.Tensor


def random_subject(folder: Path, model: str, arch: str) -> Subject:
    """Random weights of the model's shape, and random tokens."""
    sizes = MODELS[model]
    graph = llama_graph(sizes, "plain")
    generator = torch.Generator("cuda").manual_seed(1)
    sequences = torch.randint(0, sizes.vocab, (4, _TOKENS), device="cuda", generator=generator)
    library, packed = read(folder, f"{arch}.models"), random_weights(graph)
    return Subject(model, graph, library, packed, _parts(sizes), sequences)


def real_subject(root: Path, name: str) -> Subject:
    """An engine of a store, and four pieces of the text that builds calibrate with."""
    store = LocalStore(root)
    engine = store.get(name)
    graph = read_graph(store, engine)
    with WeightReader(store, engine) as reader:
        reader.start_verify()
        packed = {
            weight: {role: t.cuda() for role, t in reader.roles(weight).items()}
            for weight in graph.weights
        }
        reader.verify()
    parts = {
        weight: tuple(zip(spec.parts, spec.part_rows, strict=True))
        for weight, spec in graph.weights.items()
    }
    content = store.read_all(engine.layer("tokenizer.json").digest).decode()
    ids = Tokenizer.from_str(content).encode(_TEXT.read_text()).ids
    stride = (len(ids) - _TOKENS) // 3
    sequences = torch.tensor([ids[at * stride : at * stride + _TOKENS] for at in range(4)])
    library = library_of(store, engine)()
    return Subject(engine.model, graph, library, packed, parts, sequences.cuda())


def _parts(sizes: LlamaSizes) -> dict[str, tuple[tuple[str, int], ...]]:
    """As `Subject.parts`, of `llama_graph`."""
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    parts: dict[str, tuple[tuple[str, int], ...]] = {
        "embed": (("model.embed_tokens.weight", sizes.vocab),),
        f"{sizes.layers}.norm": (("model.norm.weight", sizes.hidden),),
        "head": (("lm_head.weight", sizes.vocab),),
    }
    for i in range(sizes.layers):
        at = f"model.layers.{i}."
        parts |= {
            f"{i}.qkv": tuple(
                (f"{at}self_attn.{n}_proj.weight", rows) for n, rows in zip("qkv", (q, kv, kv), strict=True)
            ),
            f"{i}.gate_up": (
                (f"{at}mlp.gate_proj.weight", sizes.ffn), (f"{at}mlp.up_proj.weight", sizes.ffn),
            ),
            f"{i}.o": ((f"{at}self_attn.o_proj.weight", sizes.hidden),),
            f"{i}.down": ((f"{at}mlp.down_proj.weight", sizes.hidden),),
            f"{i}.norm": ((f"{at}input_layernorm.weight", sizes.hidden),),
            f"{i}.norm2": ((f"{at}post_attention_layernorm.weight", sizes.hidden),),
        }  # fmt: skip
    return parts


def transformers_model(subject: Subject) -> Any:
    """The same weights in transformers' model, fp32 on the device."""
    sizes: dict[str, Any] = {**subject.graph.config}
    norm = next(node for node in subject.graph.nodes if node.op == "rms_norm").attrs
    rope: dict[str, Any] = {
        **next(node for node in subject.graph.nodes if node.op == "qkv_rope_write").attrs
    }
    state: dict[str, torch.Tensor] = {}
    for weight, parts in subject.parts.items():
        tensors = torch.split(subject.packed[weight]["weight"], [rows for _, rows in parts])
        state |= dict(zip([name for name, _ in parts], tensors, strict=True))
    tied = "lm_head.weight" not in state
    theta = rope["inv_freq"][1] ** -(rope["head_dim"] / 2)
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"],
        intermediate_size=len(state["model.layers.0.mlp.up_proj.weight"]),
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"],
        head_dim=sizes["head_dim"], num_key_value_heads=sizes["num_kv_heads"],
        max_position_embeddings=8192, tie_word_embeddings=tied,
        rms_norm_eps=float(str(norm["eps"])),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
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
    parser.add_argument("--engine", default="")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    require_gpu()
    subject = (
        real_subject(options.folder, options.engine)
        if options.engine
        else random_subject(options.folder, options.model, options.arch)
    )
    model = transformers_model(subject)
    truth = of_transformers(model, subject.sequences)
    for parameter in model.parameters():  # and no buffer: transformers keeps RoPE's in fp32
        parameter.data = parameter.data.bfloat16()
    noisy = of_transformers(model, subject.sequences)
    del model
    torch.cuda.empty_cache()
    limits = RunnerOptions(
        max_sequences=_TOKENS,
        max_sequence_tokens=_TOKENS,
        max_step_tokens=_TOKENS,
        kv_bytes=1 << 30,
    )
    with torch.inference_mode():
        engine = assemble(
            subject.graph, subject.library, subject.packed, limits, CudaStream(), lambda: 8 << 30
        )
        engine.graphs.capture()
        for batch in (1, 4):
            found = of_engine(engine, subject.sequences, batch)
            for name, part in (("prompt", slice(0, _PREFILLED)), ("decode", slice(_PREFILLED, None))):  # fmt: skip
                line = compared(found[:, part], noisy[:, part], truth[:, part])
                case = {"model": subject.name, "gpu": torch.cuda.get_device_name(), "way": name}
                print(json.dumps(case | {"batch": batch} | line), flush=True)


if __name__ == "__main__":
    main()
