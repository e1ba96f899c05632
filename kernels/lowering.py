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
from kernels.kv_cache import kv_format
from kernels.launch import (
    Batch,
    Grid,
    Launch,
    MatMul,
    Number,
    Operand,
    Scratch,
    Size,
    Sizes,
    Step,
    Temporary,
    Value,
    Weight,
    between,
)  # fmt: skip
from kernels.linear import candidates as linear_candidates
from kernels.linear import launch as linear
from kernels.linear import launch_int4
from kernels.operands import TRITON_DTYPES, cache_operands, in_eight_bits, rope_operands
from kernels.regimes import MOST_SEQUENCES, REGIMES, Regime
from kernels.riding import Riding
from kernels.sampling import launch as sampling
from kernels.step_inputs import launch as step_inputs
from kernels.tuning import BUILT_IN, FUSED, LIBRARY, Choices, Site, TuningTable
from kernels.variant import Argument, KernelVariant, pointer
from shared.arch import Arch
from shared.ir import Graph, Node


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
    return launched | sampling.variants(_integer(graph.config["vocab_size"]))


def _every_table(graph: Graph, arch: Arch, regime: Regime) -> Iterator[TuningTable]:
    """Tables that name, together, every candidate of every site: no site's variants depend on another's choice, but
    for that between our kernels and the library's, which is a table of its own."""
    found = sites(graph, arch, regime)
    yield from ({site: LIBRARY} for site, names in found.items() if LIBRARY in names)
    others = {site: names for site, names in found.items() if LIBRARY not in names}
    for index in range(max(map(len, others.values()), default=1)):
        yield {site: names[min(index, len(names) - 1)] for site, names in others.items()}


class _Lowering:
    """One walk over the graph."""

    def __init__(self, graph: Graph, arch: Arch, regime: Regime, choices: Choices) -> None:
        self.graph = graph
        self.arch = arch
        self.regime = regime
        self.choices = choices
        # Parts in which the squares of a riding norm's input come, by the norm's first output.
        self.num_squares: dict[str, int] = {}
        self.dtype = TRITON_DTYPES[str(graph.config["dtype"])]
        self.kv_format = kv_format(graph)
        layouts = {weight.layout for weight in graph.weights.values()}
        unknown = layouts - set(linear.LAYOUTS)
        assert not unknown, f"{', '.join(sorted(unknown))} has no GPU form"
        # With the library's products a step of few tokens is made as one of many.
        self.max_tokens = 0 if self._uses_library() else regime.max_tokens
        self.riding = Riding(graph, arch, self.max_tokens)
        # Over codes a lone query waits for memory, several for what widens codes: no tile serves both.
        is_any_step = not regime.max_tokens and not regime.max_sequences
        self.attends_apart = self.kv_format.is_scaled and is_any_step

    def _uses_library(self) -> bool:
        linears = {n.weights["weight"] for n in self.graph.nodes if n.op == "linear"}
        layouts = {self.graph.weights[name].layout for name in linears}
        if self.regime.max_tokens <= 1 or not layouts <= set(linear.LIBRARY_LAYOUTS):
            return False
        site = Site("linears", self.regime.max_tokens)
        return self.choices.of(site, {FUSED: False, LIBRARY: True})

    def steps(self) -> Iterator[Step]:
        emit = {
            "embedding": self._embedding,
            "rms_norm": self._rms_norm,
            "linear": self._linear,
            "qkv_rope_write": self._qkv_rope_write,
            "attention": self._attention,
            "silu_mul": self._silu_mul,
            "select_rows": self._select_rows,
        }
        for node in self.graph.nodes:
            assert node.op in emit, f"op {node.op!r} has no GPU form; run the fusing passes"
            if not self.riding.is_absorbed(node):
                yield from emit[node.op](node)

    # Emission, an op each.

    def _embedding(self, node: Node) -> Iterator[Step]:
        weight = self.graph.weights[node.weights["weight"]]
        rows, layout = weight.shape[1], weight.layout
        assert layout in ("plain", "int8_channel"), f"an embedding cannot be stored as {layout}"
        scaled = layout == "int8_channel"
        arguments = [pointer("token_ids", "i32"), pointer("weight", "i8" if scaled else self.dtype)]
        operands: list[Operand] = [Batch("token_ids_T"), Weight(node.weights["weight"], "weight")]
        if scaled:
            arguments.append(pointer("scale", "fp32"))
            operands.append(Weight(node.weights["weight"], "scale"))
        norm = self.riding.riding_norm(node)
        if norm is not None:
            arguments.append(pointer("gain", self.dtype))
            operands.append(Weight(norm.weights["weight"], "weight"))
        arguments.append(pointer("out", self.dtype))
        operands.append(Value(node.outputs[0]))
        absent: dict[str, object] = {} if scaled else {"scale": None}
        if norm is not None:
            arguments += [pointer("normed", self.dtype), pointer("squares_out", "fp32")]
            operands += self._norm_operands(norm, 1)
        else:
            absent |= {"gain": None, "normed": None, "squares_out": None}
        yield self._launch(
            "embedding", arguments, {"M": rows, "BLOCK": _power_of_two(rows), **absent},
            _per_token, operands,
        )  # fmt: skip

    def _norm_operands(self, norm: Node, parts: int) -> list[Operand]:
        """Where the kernel before a riding norm leaves x * gain, and its squares in `parts`."""
        self.num_squares[norm.outputs[0]] = parts
        return [Value(norm.outputs[0]), self._squares(norm)]

    def _squares(self, norm: Node) -> Temporary:
        name = norm.outputs[0]
        return Temporary(f"{name}.squares", "float32", self.num_squares[name])

    def _linear(self, node: Node) -> Iterator[Step]:
        layout = self.graph.weights[node.weights["weight"]].layout
        dtype = self.riding.activations(node)
        quantized = scale = None
        if dtype:
            quantized, scale = self._quantized(node, dtype)
            source = self.riding.producer.get(node.inputs[0])
            if source is None or not self.riding.leaves_e4m3(source):
                yield self._quantize_rows(node, quantized, scale)
        if layout == "int4_group" and not self.riding.is_few:
            yield from self._many_int4(node)
            return
        if self.riding.is_few or layout not in linear.LIBRARY_LAYOUTS:
            yield self._fused_linear(node, quantized, scale)
            return
        x, weight = quantized or Value(node.inputs[0]), node.weights["weight"]
        norm = self.riding.adding_norm(node)
        if norm is not None:
            yield MatMul(x, weight, None, Value(norm.outputs[1]), adds=Value(norm.inputs[1]))
        else:
            yield MatMul(x, weight, node.weights.get("bias"), Value(node.outputs[0]), scale)

    def _many_int4(self, node: Node) -> Iterator[Step]:
        """By tiles up to some rows; beyond, the weight is widened once and the library multiplies."""
        name = node.weights["weight"]
        weight = self.graph.weights[name]
        shape = linear.LinearShape(
            n=weight.shape[0],
            k=weight.shape[1],
            dtype=self.dtype,
            out_dtype="fp32" if node.outputs[0] in self.graph.outputs else self.dtype,
            layout=weight.layout,
            group_size=weight.group_size,
            has_bias="bias" in node.weights,
        )
        field = "rows" if self.riding.is_selected(node.inputs[0]) else "tokens"
        least = 1
        for most, launch in self._int4_tiles(node, shape, field):
            yield replace(launch, grid=between(launch.grid, field, least, most))
            least = most + 1
        values = Scratch("dense_weight", lambda _: 2 * shape.n * shape.k)
        grid = (*launch_int4.dense_int4_grid(shape), 1)
        yield Launch(
            launch_int4.dense_int4(shape, self.arch),
            between(lambda _: grid, field, least),
            (Weight(name, "weight"), Weight(name, "scale"), values),
        )
        bias, x, out = node.weights.get("bias"), Value(node.inputs[0]), Value(node.outputs[0])
        yield MatMul(x, name, bias, out, dense=values, least_rows=least)

    def _int4_tiles(
        self, node: Node, shape: linear.LinearShape, field: str
    ) -> Iterator[tuple[int, Launch]]:
        """Launches that multiply straight from 4 bits, each with the most rows that it is for, ascending."""
        if not launch_int4.takes_wgmma(shape, self.arch):
            yield launch_int4.MOST_FUSED_INT4_ROWS, self._fused_linear(node)
            return
        name = node.weights["weight"]
        operands: list[Operand] = [
            Value(node.inputs[0]),
            Weight(name, "weight"),
            Weight(name, "scale"),
        ]
        if shape.has_bias:
            operands.append(Weight(node.weights["bias"], "weight"))
        operands.append(Value(node.outputs[0]))
        for most, tiles, block_m in launch_int4.many_int4_tiles(shape):
            yield (
                most,
                Launch(
                    launch_int4.many_int4(shape, self.arch, tiles, block_m),
                    linear.tiled_grid(shape, tiles, block_m, field),
                    (*operands, *linear.tiled_scratch(shape, tiles, block_m, most), Size(field)),
                ),
            )

    def _quantized(self, node: Node, dtype: str) -> tuple[Temporary, Temporary]:
        """A linear's input in 8 bits, and the scale of each of its rows."""
        width = self.graph.weights[node.weights["weight"]].shape[1]
        return in_eight_bits(self.riding.source(node), dtype, width)

    def _quantize_rows(self, node: Node, quantized: Temporary, scale: Temporary) -> Launch:
        out_dtype, x = TRITON_DTYPES[quantized.dtype], self.riding.source(node)
        operands: tuple[Operand, ...] = (Value(x), quantized, scale)
        is_static = "input_scale" in node.attrs
        if is_static:
            operands += (Number(_number(node.attrs["input_scale"])),)
        return Launch(
            linear.quantized_rows(
                quantized.width, self.dtype, out_dtype, self.arch, is_static=is_static
            ),
            _per_row if self.riding.is_selected(x) else _per_token,
            operands,
        )

    def _fused_linear(
        self, node: Node, quantized: Temporary | None = None, x_scale: Temporary | None = None
    ) -> Launch:
        """The linear with all that rides on it; `quantized` and its scales take the place of its input."""
        weight = self.graph.weights[node.weights["weight"]]
        follower = self.riding.follower(node)
        x = self.riding.source(node)
        source = self.riding.producer.get(x)
        norm = source if source is not None and source.op == "rms_norm" else None
        if norm is not None and not self.riding.is_absorbed(norm):
            norm = None
        rope = follower if follower and follower.op == "qkv_rope_write" else None
        adds = follower if follower and follower.op == "rms_norm" else None
        attrs = rope.attrs if rope else {}
        is_logits = node.outputs[0] in self.graph.outputs
        shape = linear.LinearShape(
            n=weight.shape[0],
            k=weight.shape[1],
            dtype=self.dtype,
            out_dtype="fp32" if is_logits else self.dtype,
            layout=weight.layout,
            group_size=weight.group_size,
            activations=TRITON_DTYPES[quantized.dtype] if quantized else "",
            has_bias="bias" in node.weights,
            num_squares=self.num_squares[norm.outputs[0]] if norm else 0,
            eps=_number(norm.attrs["eps"]) if norm else 0.0,
            has_rows=x != node.inputs[0],
            has_residual=adds is not None,
            has_gain=adds is not None,
            epilogue="rope" if rope else "silu_mul" if follower and not adds else "plain",
            num_heads=_integer(attrs.get("num_heads", 0)),
            num_kv_heads=_integer(attrs.get("num_kv_heads", 0)),
            head_dim=_integer(attrs.get("head_dim", 0)),
            kv_dtype=TRITON_DTYPES[self.kv_format.dtype] if rope else "bf16",
        )
        if adds is not None:
            out = adds.outputs[1]
        elif follower is not None:
            out = follower.outputs[0]
        else:
            out = node.outputs[0]
        operands: list[Operand] = [quantized or Value(x), Weight(node.weights["weight"], "weight")]
        if shape.layout != "plain":
            operands.append(Weight(node.weights["weight"], "scale"))
        if shape.has_bias:
            operands.append(Weight(node.weights["bias"], "weight"))
        if norm is not None:
            operands.append(self._squares(norm))
        if shape.has_rows:
            operands.append(Batch("logit_rows_R"))
        if adds is not None:
            operands += [Value(adds.inputs[1]), Weight(adds.weights["weight"], "weight")]
        operands.append(Value(out))
        if adds is not None:
            operands += self._norm_operands(adds, linear.num_programs(shape, self._tiles(shape)[0]))
        if rope is not None:
            operands += rope_operands(_integer(rope.attrs["layer"]), self.kv_format)
        is_selected = shape.has_rows or self.riding.is_selected(node.inputs[0])
        return self._linear_launch(shape, operands, x_scale, is_selected)

    def _tiles(self, shape: linear.LinearShape) -> tuple[linear.Tiles, int]:
        """How the work is cut, and the tokens of a tile; 1 is the kernel for one token."""
        site = linear_candidates.site(shape, self.max_tokens)
        ways = linear_candidates.candidates(shape, self.arch, self.max_tokens)
        return self.choices.of(site, ways)

    def _linear_launch(
        self,
        shape: linear.LinearShape,
        operands: list[Operand],
        x_scale: Temporary | None,
        is_selected: bool,
    ) -> Launch:
        tiles, block_m = self._tiles(shape)
        site = linear_candidates.site(shape, self.max_tokens)
        if block_m == 1:
            programs = linear.num_programs(shape, tiles)
            variant = linear.one_token(shape, self.arch, tiles)
            return Launch(variant, lambda _: (programs, 1, 1), tuple(operands), site)
        variant = linear.few_tokens(shape, self.arch, tiles, block_m)
        field = "rows" if is_selected else "tokens"
        grid = linear.tiled_grid(shape, tiles, block_m, field)
        scratch = linear.tiled_scratch(shape, tiles, block_m)
        scales = () if x_scale is None else (x_scale,)
        return Launch(variant, grid, (*operands, *scratch, *scales, Size(field)), site)

    def _qkv_rope_write(self, node: Node) -> Iterator[Step]:
        heads = _integer(node.attrs["num_heads"])
        kv_heads = _integer(node.attrs["num_kv_heads"])
        head_dim = _integer(node.attrs["head_dim"])
        block_d = _power_of_two(head_dim // 2)
        block_h = max(1, 1024 // block_d)
        blocks = -(-(heads + 2 * kv_heads) // block_h)
        rope = rope_operands(_integer(node.attrs["layer"]), self.kv_format)
        arguments = [
            pointer("qkv", self.dtype),
            pointer("positions", "i32"),
            pointer("rope", "fp32"),
            pointer("slots", "i32"),
        ]
        operands: list[Operand] = [Value(node.inputs[0]), *rope[:3]]
        constants: dict[str, object] = {}
        for role in ("q_norm", "k_norm"):
            if role in node.weights:
                arguments.append(pointer(role, self.dtype))
                operands.append(Weight(node.weights[role], "weight"))
            else:
                constants[role] = None
        kept = self.kv_format
        stored = "u8" if kept.is_scaled else TRITON_DTYPES[kept.dtype]
        arguments += [
            pointer("q_out", self.dtype),
            pointer("k_cache", stored),
            pointer("v_cache", stored),
        ]
        if kept.is_scaled:
            arguments += [pointer("k_scale", "fp32"), pointer("v_scale", "fp32")]
        else:
            constants |= {"k_scale": None, "v_scale": None}
        operands += [Value(node.outputs[0]), *rope[3:]]
        if self.attends_apart:
            arguments += [pointer(name, self.dtype) for name in attention.NEW]
            operands += self._new(node.outputs[1], kv_heads * head_dim)
        else:
            constants |= dict.fromkeys(attention.NEW)
        constants |= {
            "NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
            "EPS": _number(node.attrs.get("eps", 0.0)), "BLOCK_H": block_h, "BLOCK_D": block_d,
            "BLOCK_TOKENS": self.regime.block_tokens, "LARGEST": kept.largest,
            "IS_FP8": kept.dtype == "float8_e4m3fn",
        }  # fmt: skip
        yield self._launch(
            "qkv_rope_write", arguments, constants, lambda s: (s.tokens, blocks, 1), operands
        )

    def _new(self, effect: str, width: int) -> list[Operand]:
        """What the codes of a step's own keys and values say."""
        dtype = str(self.graph.config["dtype"])
        return [Temporary(f"{effect}.{name}", dtype, width) for name in attention.NEW]

    def _attention(self, node: Node) -> Iterator[Step]:
        shape = attention.AttentionShape(
            num_heads=_integer(node.attrs["num_heads"]),
            num_kv_heads=_integer(node.attrs["num_kv_heads"]),
            head_dim=_integer(node.attrs["head_dim"]),
            scale=_number(node.attrs["scale"]),
            window=_integer(node.attrs["window"]),
            soft_cap=_number(node.attrs["soft_cap"]),
            dtype=self.dtype,
            kv_dtype=TRITON_DTYPES[self.kv_format.dtype],
            block_tokens=self.regime.block_tokens,
        )
        sequences = self.regime.max_sequences
        site = attention_candidates.site(shape, self.regime.max_tokens, sequences)
        ways = attention_candidates.candidates(
            shape, self.arch, sequences, is_apart=self.attends_apart
        )
        if self.attends_apart:
            alone = attention.decode_tiles(shape, MOST_SEQUENCES)
            yield self._attention_launch(node, shape, replace(alone, takes="one"), None)
        yield self._attention_launch(node, shape, self.choices.of(site, ways), site)

    def _attention_launch(
        self, node: Node, shape: attention.AttentionShape, tiles: attention.AttentionTiles,
        site: Site | None,
    ) -> Launch:  # fmt: skip
        new = self._new(node.inputs[1], shape.num_kv_heads * shape.head_dim)
        operands: list[Operand] = [
            Value(node.inputs[0]),
            *cache_operands(_integer(node.attrs["layer"]), self.kv_format),
            *(new if tiles.reads_new else ()),
            Batch("block_tables_SB"),
            Batch("seq_lens_S"),
        ]
        if tiles.reads_query_start:
            operands.append(Batch("query_start_S1"))
        operands.append(Value(node.outputs[0]))
        operands += attention.scratch(shape, tiles)
        operands += [Size("sequences"), Size("table_stride")]
        return Launch(
            attention.variant(shape, self.arch, tiles),
            lambda sizes: attention.grid(shape, tiles, sizes),
            tuple(operands),
            site,
        )

    def _rms_norm(self, node: Node) -> Iterator[Step]:
        row = self.graph.weights[node.weights["weight"]].shape[0]
        is_added = self.riding.is_added(node)
        has_residual = len(node.inputs) == 2 and not is_added
        per_head = _integer(node.attrs.get("head_dim") or 0)
        assert not per_head, "a norm over heads has no GPU form of its own; fuse it with rope"
        arguments = [pointer("x", self.dtype)]
        operands: list[Operand] = [Value(node.outputs[1] if is_added else node.inputs[0])]
        constants: dict[str, object] = {}
        if has_residual:
            arguments.append(pointer("residual", self.dtype))
            operands.append(Value(node.inputs[1]))
        out, scale = self._row_output(node, row)
        arguments += [pointer("weight", self.dtype), out[0]]
        operands += [Weight(node.weights["weight"], "weight"), out[1]]
        if has_residual:
            arguments.append(pointer("residual_out", self.dtype))
            operands.append(Value(node.outputs[1]))
        else:
            constants |= {"residual": None, "residual_out": None}
        if scale is not None:
            arguments.append(pointer("scale_out", "fp32"))
            operands.append(scale)
        else:
            constants |= {"scale_out": None}
        constants |= {"M": row, "EPS": _number(node.attrs["eps"]), "BLOCK": _power_of_two(row)}
        yield self._launch(
            "rms_norm", arguments, constants, _per_token, operands, num_warps=_row_warps(row)
        )

    def _silu_mul(self, node: Node) -> Iterator[Step]:
        source = self.riding.producer[node.inputs[0]]
        width = self.graph.weights[source.weights["weight"]].shape[0] // 2
        (argument, out), scale = self._row_output(node, width)
        arguments = [pointer("gate_up", self.dtype), argument]
        operands: list[Operand] = [Value(node.inputs[0]), out]
        if scale is not None:  # a scale needs the whole row
            yield self._launch(
                "silu_mul", [*arguments, pointer("scale_out", "fp32")],
                {"F": width, "BLOCK": _power_of_two(width)}, _per_token, [*operands, scale],
                num_warps=_row_warps(width),
            )  # fmt: skip
            return
        blocks = -(-width // 1024)
        yield self._launch(
            "silu_mul", arguments, {"scale_out": None, "F": width, "BLOCK": 1024},
            lambda sizes: (sizes.tokens, blocks, 1), operands,
        )  # fmt: skip

    def _row_output(
        self, node: Node, width: int
    ) -> tuple[tuple[Argument, Value | Temporary], Temporary | None]:
        """The argument and operand of a row kernel's output, and its rows' scale where it is to be e4m3."""
        if not self.riding.leaves_e4m3(node):
            return (pointer("out", self.dtype), Value(node.outputs[0])), None
        quantized, scale = in_eight_bits(node.outputs[0], "float8_e4m3fn", width)
        return (pointer("out", "fp8e4nv"), quantized), scale

    def _select_rows(self, node: Node) -> Iterator[Step]:
        width = _integer(self.graph.config["hidden_size"])
        yield self._launch(
            "embedding",
            [
                pointer("token_ids", "i32"),
                pointer("weight", self.dtype),
                pointer("out", self.dtype),
            ],
            {
                "scale": None,
                "gain": None,
                "normed": None,
                "squares_out": None,
                "M": width,
                "BLOCK": _power_of_two(width),
            },
            _per_row,
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
            constants=tuple({**constants, "PDL": self.arch.has_pdl}.items()),  # type: ignore[arg-type]
            num_warps=num_warps,
            has_pdl=self.arch.has_pdl,
        )
        return Launch(variant, grid, tuple(operands))  # type: ignore[arg-type]


def _per_token(sizes: Sizes) -> Grid:
    return sizes.tokens, 1, 1


def _per_row(sizes: Sizes) -> Grid:
    return sizes.rows, 1, 1


def _row_warps(row: int) -> int:
    return 4 if row <= 2048 else 8 if row <= 8192 else 16


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _integer(value: object) -> int:
    assert isinstance(value, int), f"{value!r} is no integer"
    return value


def _number(value: object) -> float:
    assert isinstance(value, int | float), f"{value!r} is no number"
    return float(value)
