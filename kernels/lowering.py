"""A fused graph as launches: which kernels a step runs, and on what.

The graph's meaning does not change with the number of tokens, but what runs fastest does. For few tokens the
weights' memory is everything: norms, residual adds, RoPE and KV writes ride on the linear kernels. For many tokens
torch's matrix products win and the rest are kernels between them. The compiler asks for all regimes' variants; the
runtime binds and launches them. No Triton here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from kernels.attention import candidates as attention_candidates
from kernels.attention import launch as attention
from kernels.early_rows import select_rows_early
from kernels.launch import (
    Batch,
    Launch,
    Operand,
    Size,
    Step,
    Temporary,
    Value,
    Weight,
    power_of_two,
)  # fmt: skip
from kernels.linear.lowering import Linears
from kernels.operands import (
    TRITON_DTYPES,
    cache_operands,
    in_eight_bits,
    integer,
    number,
    per_row,
    per_token,
    rope_operands,
)
from kernels.regimes import MOST_SEQUENCES, REGIMES, Regime
from kernels.sampling import launch as sampling
from kernels.step_inputs import launch as step_inputs
from kernels.tuning import BUILT_IN, LIBRARY, Choices, Site, TuningTable
from kernels.variant import Argument, KernelVariant, pointer
from kernels.walk import Walk
from shared.arch import Arch
from shared.ir import Graph, Node


def step_graph(graph: Graph, regime: Regime) -> Graph:
    """The graph as steps of a regime run it.

    Where steps have prompts of many tokens, few rows' logits are wanted. Steps that only decode want all of them; in
    those of few tokens the selection rides on the head's product, and the other products wait for their weights.
    """
    has_prompts = not regime.max_tokens and not regime.max_sequences
    return select_rows_early(graph) if has_prompts else graph


def lower(
    graph: Graph, arch: Arch, regime: Regime, table: TuningTable = BUILT_IN
) -> tuple[Step, ...]:
    """The launches of one step of `graph`, in order.

    Args:
        table: candidates that take the place of built-in choices.
    Raises:
        AssertionError: the graph holds an op or a layout that has no GPU form.
    """
    return tuple(_Lowering(graph, arch, regime, Choices(table)).steps())


def sites(graph: Graph, arch: Arch, regime: Regime) -> dict[Site, tuple[str, ...]]:
    """Where a step's lowering can choose, and the names of the candidates, the built-in one first."""
    choices = Choices()
    for _ in _Lowering(graph, arch, regime, choices).steps():
        pass
    return {site: names for site, names in choices.seen.items() if len(names) > 1}


def variants(
    graph: Graph,
    arch: Arch,
    regimes: Iterable[Regime] = REGIMES,
    *,
    with_candidates: bool = False,
) -> set[KernelVariant]:
    """Every kernel variant that the regimes launch, and those around them: inputs and draws.

    Args:
        with_candidates: also those that no built-in choice wants: what a tuning table may name.
    """
    regimes = tuple(regimes)
    launched = {
        step.variant
        for regime in regimes
        for table in (_every_table(graph, arch, regime) if with_candidates else (BUILT_IN,))
        for step in lower(graph, arch, regime, table)
        if isinstance(step, Launch)
    }
    for block_tokens in {regime.block_tokens for regime in regimes}:
        launched |= step_inputs.variants(block_tokens)
    return launched | sampling.variants(integer(graph.config["vocab_size"]))


def _every_table(graph: Graph, arch: Arch, regime: Regime) -> Iterator[TuningTable]:
    """Tables that name, together, every candidate of every site: no site's variants depend on another's choice, but
    for that between our kernels and the library's, which is a table of its own."""
    found = sites(graph, arch, regime)
    yield from ({site: LIBRARY} for site, names in found.items() if LIBRARY in names)
    others = {site: names for site, names in found.items() if LIBRARY not in names}
    for index in range(max(map(len, others.values()), default=1)):
        yield {site: names[min(index, len(names) - 1)] for site, names in others.items()}


class _Lowering:
    """Lowers a graph, an op after the other."""

    def __init__(self, graph: Graph, arch: Arch, regime: Regime, choices: Choices) -> None:
        self.walk = Walk(step_graph(graph, regime), arch, regime, choices)
        self.linears = Linears(self.walk)

    def steps(self) -> Iterator[Step]:
        emit = {
            "embedding": self._embedding,
            "rms_norm": self._rms_norm,
            "linear": self.linears.steps,
            "qkv_rope_write": self._qkv_rope_write,
            "attention": self._attention,
            "silu_mul": self._silu_mul,
            "select_rows": self._select_rows,
        }
        for node in self.walk.graph.nodes:
            assert node.op in emit, f"op {node.op!r} has no GPU form; run the fusing passes"
            if not self.walk.riding.is_absorbed(node):
                yield from emit[node.op](node)

    # Emission, an op each.

    def _embedding(self, node: Node) -> Iterator[Step]:
        weight = self.walk.graph.weights[node.weights["weight"]]
        rows, layout = weight.shape[1], weight.layout
        assert layout in ("plain", "int8_channel"), f"an embedding cannot be stored as {layout}"
        scaled = layout == "int8_channel"
        arguments = [
            pointer("token_ids", "i32"),
            pointer("weight", "i8" if scaled else self.walk.dtype),
        ]
        operands: list[Operand] = [Batch("token_ids_T"), Weight(node.weights["weight"], "weight")]
        if scaled:
            arguments.append(pointer("scale", "fp32"))
            operands.append(Weight(node.weights["weight"], "scale"))
        norm = self.walk.riding.riding_norm(node)
        if norm is not None:
            arguments.append(pointer("gain", self.walk.dtype))
            operands.append(Weight(norm.weights["weight"], "weight"))
        arguments.append(pointer("out", self.walk.dtype))
        operands.append(Value(node.outputs[0]))
        absent: dict[str, object] = {} if scaled else {"scale": None}
        if norm is not None:
            arguments += [pointer("normed", self.walk.dtype), pointer("squares_out", "fp32")]
            operands += self.walk.norm_operands(norm, 1)
        else:
            absent |= {"gain": None, "normed": None, "squares_out": None}
        yield self._launch(
            "embedding", arguments, {"M": rows, "BLOCK": power_of_two(rows), **absent},
            per_token, operands,
        )  # fmt: skip

    def _qkv_rope_write(self, node: Node) -> Iterator[Step]:
        heads = integer(node.attrs["num_heads"])
        kv_heads = integer(node.attrs["num_kv_heads"])
        head_dim = integer(node.attrs["head_dim"])
        block_d = power_of_two(head_dim // 2)
        block_h = max(1, 1024 // block_d)
        blocks = -(-(heads + 2 * kv_heads) // block_h)
        rope = rope_operands(integer(node.attrs["layer"]), self.walk.kv_format)
        arguments = [
            pointer("qkv", self.walk.dtype),
            pointer("positions", "i32"),
            pointer("rope", "fp32"),
            pointer("slots", "i32"),
        ]
        operands: list[Operand] = [Value(node.inputs[0]), *rope[:3]]
        constants: dict[str, object] = {}
        for role in ("q_norm", "k_norm"):
            if role in node.weights:
                arguments.append(pointer(role, self.walk.dtype))
                operands.append(Weight(node.weights[role], "weight"))
            else:
                constants[role] = None
        kept = self.walk.kv_format
        stored = "u8" if kept.is_scaled else TRITON_DTYPES[kept.dtype]
        arguments += [
            pointer("q_out", self.walk.dtype),
            pointer("k_cache", stored),
            pointer("v_cache", stored),
        ]
        if kept.is_scaled:
            arguments += [pointer("k_scale", "fp32"), pointer("v_scale", "fp32")]
        else:
            constants |= {"k_scale": None, "v_scale": None}
        operands += [Value(node.outputs[0]), *rope[3:]]
        if self.walk.attends_apart:
            arguments += [pointer(name, self.walk.dtype) for name in attention.NEW]
            operands += self._new(node.outputs[1], kv_heads * head_dim)
        else:
            constants |= dict.fromkeys(attention.NEW)
        constants |= {
            "NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
            "EPS": number(node.attrs.get("eps", 0.0)), "BLOCK_H": block_h, "BLOCK_D": block_d,
            "BLOCK_TOKENS": self.walk.regime.block_tokens, "LARGEST": kept.largest,
            "IS_FP8": kept.dtype == "float8_e4m3fn",
        }  # fmt: skip
        yield self._launch(
            "qkv_rope_write", arguments, constants, lambda s: (s.tokens, blocks, 1), operands
        )

    def _new(self, effect: str, width: int) -> list[Operand]:
        """What the codes of a step's own keys and values say."""
        dtype = str(self.walk.graph.config["dtype"])
        return [Temporary(f"{effect}.{name}", dtype, width) for name in attention.NEW]

    def _attention(self, node: Node) -> Iterator[Step]:
        shape = attention.shape_of(node, self.walk.graph, self.walk.regime.block_tokens)
        sequences = self.walk.regime.max_sequences
        site = attention_candidates.site(shape, self.walk.regime.max_tokens, sequences)
        ways = attention_candidates.candidates(
            shape, self.walk.arch, sequences, is_apart=self.walk.attends_apart
        )
        if self.walk.attends_apart:
            alone = attention.decode_tiles(shape, self.walk.arch, MOST_SEQUENCES)
            yield self._attention_launch(node, shape, replace(alone, takes="one"), None)
        yield self._attention_launch(node, shape, self.walk.choices.of(site, ways), site)

    def _attention_launch(
        self, node: Node, shape: attention.AttentionShape, tiles: attention.AttentionTiles,
        site: Site | None,
    ) -> Launch:  # fmt: skip
        new = self._new(node.inputs[1], shape.num_kv_heads * shape.head_dim)
        operands: list[Operand] = [
            Value(node.inputs[0]),
            *cache_operands(integer(node.attrs["layer"]), self.walk.kv_format),
            *(new if tiles.reads_new else ()),
            Batch("block_tables_SB"),
            Batch("seq_lens_S"),
        ]
        if tiles.reads_query_start:
            operands.append(Batch("query_start_S1"))
        if tiles.reads_part_start:
            operands.append(Batch("part_start_S1"))
        operands.append(Value(node.outputs[0]))
        operands += attention.scratch(shape, tiles)
        operands += [Size("sequences"), Size("table_stride")]
        return Launch(
            attention.variant(shape, self.walk.arch, tiles),
            lambda sizes: attention.grid(shape, tiles, sizes),
            tuple(operands),
            site,
        )

    def _rms_norm(self, node: Node) -> Iterator[Step]:
        row = self.walk.graph.weights[node.weights["weight"]].shape[0]
        is_added = self.walk.riding.is_added(node)
        has_residual = len(node.inputs) == 2 and not is_added
        per_head = integer(node.attrs.get("head_dim") or 0)
        assert not per_head, "a norm over heads has no GPU form of its own; fuse it with rope"
        arguments = [pointer("x", self.walk.dtype)]
        operands: list[Operand] = [Value(node.outputs[1] if is_added else node.inputs[0])]
        constants: dict[str, object] = {}
        if has_residual:
            arguments.append(pointer("residual", self.walk.dtype))
            operands.append(Value(node.inputs[1]))
        out, scale = self._row_output(node, row)
        arguments += [pointer("weight", self.walk.dtype), out[0]]
        operands += [Weight(node.weights["weight"], "weight"), out[1]]
        if has_residual:
            arguments.append(pointer("residual_out", self.walk.dtype))
            operands.append(Value(node.outputs[1]))
        else:
            constants |= {"residual": None, "residual_out": None}
        if scale is not None:
            arguments.append(pointer("scale_out", "fp32"))
            operands.append(scale)
        else:
            constants |= {"scale_out": None}
        constants |= {"M": row, "EPS": number(node.attrs["eps"]), "BLOCK": power_of_two(row)}
        yield self._launch(
            "rms_norm", arguments, constants, self.walk.per_row_of(node.inputs[0]), operands,
            num_warps=_row_warps(row),
        )  # fmt: skip

    def _silu_mul(self, node: Node) -> Iterator[Step]:
        source = self.walk.riding.producer[node.inputs[0]]
        width = self.walk.graph.weights[source.weights["weight"]].shape[0] // 2
        (argument, out), scale = self._row_output(node, width)
        rows = self.walk.per_row_of(node.inputs[0])
        arguments = [pointer("gate_up", self.walk.dtype), argument]
        operands: list[Operand] = [Value(node.inputs[0]), out]
        if scale is not None:  # a scale needs the whole row
            yield self._launch(
                "silu_mul", [*arguments, pointer("scale_out", "fp32")],
                {"F": width, "BLOCK": power_of_two(width)}, rows, [*operands, scale],
                num_warps=_row_warps(width),
            )  # fmt: skip
            return
        blocks = -(-width // 1024)
        yield self._launch(
            "silu_mul", arguments, {"scale_out": None, "F": width, "BLOCK": 1024},
            lambda sizes: (rows(sizes)[0], blocks, 1), operands,
        )  # fmt: skip

    def _row_output(
        self, node: Node, width: int
    ) -> tuple[tuple[Argument, Value | Temporary], Temporary | None]:
        """The argument and operand of a row kernel's output, and its rows' scale where it is to be e4m3."""
        if not self.walk.riding.leaves_e4m3(node):
            return (pointer("out", self.walk.dtype), Value(node.outputs[0])), None
        quantized, scale = in_eight_bits(node.outputs[0], "float8_e4m3fn", width)
        return (pointer("out", "fp8e4nv"), quantized), scale

    def _select_rows(self, node: Node) -> Iterator[Step]:
        width = self.walk.width_of(node.inputs[0])
        yield self._launch(
            "embedding",
            [
                pointer("token_ids", "i32"),
                pointer("weight", self.walk.dtype),
                pointer("out", self.walk.dtype),
            ],
            {
                "scale": None,
                "gain": None,
                "normed": None,
                "squares_out": None,
                "M": width,
                "BLOCK": power_of_two(width),
            },
            per_row,
            [Batch("logit_rows_R"), Value(node.inputs[0]), Value(node.outputs[0])],
        )

    def _launch(
        self,
        op: str,
        arguments: list[Argument],
        constants: dict[str, object],
        grid: "object",
        operands: list[Operand],
        *,
        kernel: str | None = None,
        num_warps: int = 4,
    ) -> Launch:
        variant = KernelVariant(
            op=op,
            kernel=kernel or op,
            arguments=tuple(arguments),
            constants=tuple({**constants, "PDL": self.walk.arch.has_pdl}.items()),  # type: ignore[arg-type]
            num_warps=num_warps,
            has_pdl=self.walk.arch.has_pdl,
        )
        return Launch(variant, grid, tuple(operands))  # type: ignore[arg-type]


def _row_warps(row: int) -> int:
    return 4 if row <= 2048 else 8 if row <= 8192 else 16
