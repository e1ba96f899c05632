"""Quantized checkpoints of every kind that is read, and their builds."""

from pathlib import Path
from typing import Any

import torch

from compiler_service.builder import BuildRequest, build
from compiler_service.quantization.as_is import AS_IS
from compiler_service.resolve import resolve
from shared.engine import EngineManifest, QuantConfig
from shared.ir import Graph
from shared.store.local import LocalStore
from tests.compiler_service.quantized_folders import (
    Quantize,
    awq,
    compressed_bytes,
    compressed_packed,
    gptq,
    write_quantized,
)

FP8, INT8 = torch.float8_e4m3fn, torch.int8
QUANT = QuantConfig(AS_IS)
# Takes what the checkpoint has.
UNSET_QUANT = QuantConfig("")
UP = "model.layers.1.mlp.up_proj"

# How it is written; the layout that holds it and its group size, "" where none does.
CASES: dict[str, tuple[tuple[dict[str, Any], Quantize], str, int]] = {
    "AWQ": (awq(), "int4_group", 32),
    "AWQ, groups of 64": (awq(64), "int4_group", 64),
    "AWQ, whole rows": (awq(-1), "int4_group", 64),
    "AWQ, groups of 16": (awq(16), "", 0),
    "GPTQ": (gptq(), "int4_group", 32),
    "GPTQ with zero points": (gptq(symmetric=False), "int4_group", 32),
    "GPTQ v2 with zero points": (gptq(symmetric=False, is_v2=True), "int4_group", 32),
    "GPTQ, whole rows": (gptq(group_size=-1), "int4_group", 64),
    "GPTQ 8-bit": (gptq(8), "int8_group", 32),
    "GPTQ 8-bit with zero points": (gptq(8, symmetric=False), "", 0),
    "GPTQ with act-order": (gptq(act_order_seed=3), "", 0),
    "compressed 4-bit": (compressed_packed(), "int4_group", 32),
    "compressed 4-bit with zero points": (compressed_packed(symmetric=False), "int4_group", 32),
    "compressed 4-bit, channels": (compressed_packed(group_size=-1), "int4_group", 64),
    "compressed 4-bit, fp16 scales": (
        compressed_packed(scale_dtype=torch.float16, symmetric=False), "int4_group", 32
    ),
    "compressed 4-bit with act-order": (compressed_packed(act_order_seed=4), "", 0),
    "compressed 8-bit, groups": (compressed_packed(8), "int8_group", 32),
    "compressed FP8, channels": (compressed_bytes(FP8), "fp8_channel", 0),
    "compressed FP8, tensors": (compressed_bytes(FP8, per_tensor=True), "fp8_channel", 0),
    "compressed FP8, static": (
        compressed_bytes(FP8, per_tensor=True, is_static=True), "fp8_channel", 0
    ),
    "compressed FP8, fp32 scales": (
        compressed_bytes(FP8, scale_dtype=torch.float32), "fp8_channel", 0
    ),
    "compressed INT8": (compressed_bytes(INT8), "int8_channel", 0),
}  # fmt: skip


def write_case(case: str, folder: Path, **sizes: Any) -> dict[str, torch.Tensor]:
    """Writes a checkpoint of a case; what each of its linears is worth, by name."""
    (settings, quantize_one), _, _ = CASES[case]
    return write_quantized(folder, settings, quantize_one, **sizes)


def build_folder(
    folder: Path, tmp_path: Path, quant: QuantConfig = QUANT
) -> tuple[LocalStore, EngineManifest, Graph]:
    """Builds a checkpoint for CPUs: the store, the engine and its graph."""
    resolved = resolve(str(folder), ["cpu"], quant, "", tmp_path)
    store = LocalStore(tmp_path / "store")
    request = BuildRequest(str(folder), resolved.keys["cpu"], "tiny", tmp_path)
    engine = build(request, store, lambda progress: None)
    graph = Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode())
    return store, engine, graph
