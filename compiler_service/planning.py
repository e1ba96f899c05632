"""How a build is planned: all decisions, and no weight read."""

import math
from collections.abc import Callable

import torch

from compiler_service.build_plan import BuildPlan
from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.engine_files import engine_files
from compiler_service.engine_graph import engine_graph, imported_weights
from compiler_service.models import lower_model
from compiler_service.quantization import scheme_named
from compiler_service.quantization.as_is import notes_of
from compiler_service.streaming import values_a_token
from compiler_service.weight_table import require_tensors, stored_tensors, weights_in_order
from kernels.linear.launch import LAYOUTS as GPU_LAYOUTS
from kernels.ops import OPS
from shared.arch import arch_named
from shared.engine import EngineKey, QuantConfig
from shared.errors import UnsupportedModel, UnsupportedQuant
from shared.ir import Graph

# What the embedding kernel reads.
_GPU_TABLES = ("plain", "int8_channel")
# Attention's tiles of wider heads want 132 KiB of shared memory, more than sm_86, sm_89 and sm_120 have; where they
# fit, none was compared with its reference.
_WIDEST_GPU_HEAD = 256
# So many bytes of activations a build may hold while it calibrates.
_MOST_CALIBRATION_BYTES = 8 << 30


def plan(
    checkpoint: Checkpoint,
    key: EngineKey,
    model: str,
    on_pass: Callable[[], None] = lambda: None,
) -> BuildPlan:
    """The plan to build `key` from `checkpoint`.

    Args:
        on_pass: called once the checkpoint was found good and before the passes run.

    Raises:
        UnsupportedModel, InvalidModel: the checkpoint cannot be used.
        UnsupportedQuant, UnsupportedArch: the key asks for what cannot be done.
    """
    scheme = scheme_named(key.quant)
    scheme.require_arch(key.quant, arch_named(key.arch))
    source = lower_model(checkpoint.config, scheme.activation_dtype)
    require_tensors(source, checkpoint.tensors)
    _require_heads(source, key)
    files = engine_files(checkpoint)
    on_pass()
    graph = engine_graph(source, checkpoint.tensors, key.quant, OPS)
    _require_room(graph, key.quant)
    imported = imported_weights(graph, key.quant)
    if imported:
        _require_layouts(graph, key)
    graph.verify(OPS)
    stored = [t for weight in graph.weights.values() for t in stored_tensors(weight).values()]
    return BuildPlan(
        key=key,
        model=model,
        source=source,
        graph=graph,
        weight_names=tuple(weights_in_order(graph)),
        files=files,
        imported=imported,
        read_bytes=sum(
            checkpoint.tensors[part].num_bytes
            for weight in graph.weights.values()
            for part in weight.parts
        ),
        stored_bytes=sum(
            math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in stored
        ),
    )


def _require_room(graph: Graph, quant: QuantConfig) -> None:
    """Checks that what calibration looks at fits into memory, whose activations are held all at once.

    Raises:
        UnsupportedQuant: it does not; says how many tokens do.
    """
    most = _MOST_CALIBRATION_BYTES // (4 * values_a_token(graph))
    if quant.calibration_tokens > most:
        problem = (
            f"calibration_tokens may be at most {most} for this model, whose activations of so many "
            f"take {_MOST_CALIBRATION_BYTES >> 30} GiB, not {quant.calibration_tokens}"
        )
        raise UnsupportedQuant(quant=str(quant), problem=problem)


def _require_heads(graph: Graph, key: EngineKey) -> None:
    """Checks that the arch's attention takes heads as wide as the model's.

    Raises:
        UnsupportedModel: it does not; says how wide they may be.
    """
    head_dim = int(str(graph.config["head_dim"]))
    if arch_named(key.arch).is_gpu and head_dim > _WIDEST_GPU_HEAD:
        known = f"at most {_WIDEST_GPU_HEAD} on a GPU, any on cpu"
        raise UnsupportedModel(architecture=f"head_dim {head_dim} on {key.arch}", known=known)


def _require_layouts(graph: Graph, key: EngineKey) -> None:
    """Checks that the arch has kernels for the layouts that a checkpoint brought.

    Raises:
        UnsupportedQuant: it has not; names what the checkpoint has and what to ask for.
    """
    arch = arch_named(key.arch)
    if not arch.is_gpu:
        return
    linears = {name for name in GPU_LAYOUTS if name != "fp8_channel" or arch.has_fp8}
    tables = {node.weights["weight"] for node in graph.nodes if node.op == "embedding"}
    lacking = {
        weight.layout
        for name, weight in graph.weights.items()
        if weight.layout not in (_GPU_TABLES if name in tables else linears)
    }
    if lacking:
        problem = (
            f"{key.arch} has no kernel for {', '.join(sorted(lacking))}, in which the checkpoint is "
            f"stored ({'; '.join(notes_of(graph))}); cpu has, or ask for bf16 or int8"
        )
        raise UnsupportedQuant(quant=str(key.quant), problem=problem)
