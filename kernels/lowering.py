"""A fused graph as launches: which kernels a step runs, and on what.

The graph's meaning does not change with the number of tokens, but what runs fastest does. For few tokens the
weights' memory is everything: norms, residual adds, RoPE and KV writes ride on the linear kernels. For many tokens
torch's matrix products win and the rest are kernels between them. The compiler asks for all regimes' variants; the
runtime binds and launches them. No Triton here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kernels.attention import launch as attention
from kernels.kv_cache import KvFormat, kv_format
from kernels.launch import (
    Batch,
    Grid,
    KvCache,
    Launch,
    MatMul,
    Operand,
    Size,
    Sizes,
    Step,
    Temporary,
    Value,
    Weight,
)  # fmt: skip
from kernels.linear import launch as linear
from kernels.sampling import launch as sampling
from kernels.step_inputs import launch as step_inputs
from kernels.variant import Argument, KernelVariant, pointer
from shared.arch import Arch
from shared.ir import Graph, Node

TRITON_DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8e4nv",
    "int32": "i32", "int8": "i8", "uint8": "u8",
}  # fmt: skip


# Tokens of a KV block on a GPU: a constant of the compiled kernels.
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Regime:
    """A range of steps that share their launches.

    Args:
        max_tokens: 1: one token; up to 64: few tokens in tiles of that many; 0: any number.
        max_sequences: decode only, bounds how attention splits; 0 where sequences may have several query tokens.
        block_tokens: tokens of one KV block.
    """

    max_tokens: int
    max_sequences: int
    block_tokens: int = BLOCK_TOKENS


DECODE_REGIMES = tuple(
    Regime(tokens, sequences)
    for tokens, sequences in (
        (1, 1),
        (16, 2),
        (16, 4),
        (16, 8),
        (16, 16),
        (32, 32),
        (64, 64),
        (0, 512),
    )
)
REGIMES = (*DECODE_REGIMES, Regime(16, 0), Regime(64, 0), Regime(0, 0))


def lower(graph: Graph, arch: Arch, regime: Regime) -> tuple[Step, ...]:
    """The launches of one step of `graph`, in order.

    Raises:
        AssertionError: the graph holds an op or a layout that has no GPU form.
    """
    return tuple(_Lowering(graph, arch, regime).steps())


def variants(graph: Graph, arch: Arch, regimes: Iterable[Regime] = REGIMES) -> set[KernelVariant]:
    """Every kernel variant that the regimes launch, and those around them: inputs and draws."""
    regimes = tuple(regimes)
    launched = {
        step.variant
        for regime in regimes
        for step in lower(graph, arch, regime)
        if isinstance(step, Launch)
    }
    for block_tokens in {regime.block_tokens for regime in regimes}:
        launched |= step_inputs.variants(block_tokens)
    return launched | sampling.variants(_integer(graph.config["vocab_size"]))


class _Lowering:
    """One walk over the graph; `absorbed` are nodes that ride on another's kernel."""

    def __init__(self, graph: Graph, arch: Arch, regime: Regime) -> None:
        self.graph = graph
        self.arch = arch
        self.regime = regime
        # Parts in which the squares of a riding norm's input come, by the norm's first output.
        self.num_squares: dict[str, int] = {}
        self.dtype = TRITON_DTYPES[str(graph.config["dtype"])]
        self.kv_format = kv_format(graph)
        layouts = {weight.layout for weight in graph.weights.values()}
        unknown = layouts - set(linear.LAYOUTS)
        assert not unknown, f"{', '.join(sorted(unknown))} has no GPU form"
        self.most_few = min(linear.MOST_FEW_TOKENS[layout] for layout in layouts)
        self.producer = {name: node for node in graph.nodes for name in node.outputs}
        self.users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)

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
            if not self._is_absorbed(node):
                yield from emit[node.op](node)

    # Which nodes ride on a linear kernel.

    @property
    def _is_few(self) -> bool:
        return 0 < self.regime.max_tokens <= self.most_few

    def _is_absorbed(self, node: Node) -> bool:
        if not self._is_few:
            return False
        if node.op == "rms_norm":
            return self._rides_before(node) and self._rides_on_source(node)
        if node.op == "select_rows":
            return self._only_linears_use(node.outputs[0])
        if node.op in ("silu_mul", "qkv_rope_write"):
            return self._rides_after(node)
        return False

    def _only_linears_use(self, value: str) -> bool:
        users = self.users.get(value, [])
        return bool(users) and all(user.op == "linear" for user in users)

    def _rides_before(self, norm: Node) -> bool:
        """Claims that every reader of the norm is a linear, or a selection that linears read."""
        users = self.users.get(norm.outputs[0], [])
        return (
            not norm.attrs.get("head_dim")
            and bool(users)
            and all(
                user.op == "linear"
                or (user.op == "select_rows" and self._only_linears_use(user.outputs[0]))
                for user in users
            )
        )

    def _rides_on_source(self, norm: Node) -> bool:
        """Claims that what the norm reads is made by a kernel that can add the residual and give the squares."""
        source = self.producer.get(norm.inputs[0])
        if source is None:
            return False
        if len(norm.inputs) == 1:
            return source.op == "embedding"
        return source.op == "linear" and self._has_one_use(norm.inputs[0])

    def _rides_after(self, node: Node) -> bool:
        source = self.producer.get(node.inputs[0])
        return (
            source is not None
            and source.op == "linear"
            and self._has_one_use(node.inputs[0])
            and "q_norm" not in node.weights
            # A scale is of a whole head, which lies in several of the linear's programs.
            and not (node.op == "qkv_rope_write" and self.kv_format.is_scaled)
        )

    def _has_one_use(self, value: str) -> bool:
        return len(self.users.get(value, [])) == 1 and value not in self.graph.outputs

    def _follower(self, node: Node) -> Node | None:
        """The node that rides on this linear, if any."""
        users = self.users.get(node.outputs[0], [])
        if len(users) != 1 or not self._is_absorbed(users[0]):
            return None
        follower = users[0]
        adds = len(follower.inputs) == 2 and follower.inputs[0] == node.outputs[0]
        if follower.op in ("silu_mul", "qkv_rope_write") or (follower.op == "rms_norm" and adds):
            return follower
        return None

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
        norm = self._riding_norm(node)
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

    def _riding_norm(self, node: Node) -> Node | None:
        """The norm whose gain rides on this embedding, if any."""
        for user in self.users.get(node.outputs[0], []):
            if user.op == "rms_norm" and len(user.inputs) == 1 and self._is_absorbed(user):
                return user
        return None

    def _norm_operands(self, norm: Node, parts: int) -> list[Operand]:
        """Where the kernel before a riding norm leaves x * gain, and its squares in `parts`."""
        self.num_squares[norm.outputs[0]] = parts
        return [Value(norm.outputs[0]), self._squares(norm)]

    def _squares(self, norm: Node) -> Temporary:
        name = norm.outputs[0]
        return Temporary(f"{name}.squares", "float32", self.num_squares[name])

    def _linear(self, node: Node) -> Iterator[Step]:
        if self._is_few:
            yield self._fused_linear(node)
            return
        bias = node.weights.get("bias")
        x: Value | Temporary = Value(node.inputs[0])
        layout = self.graph.weights[node.weights["weight"]].layout
        if layout not in ("plain", "fp8_channel"):
            yield self._fused_linear(node)  # no library product; the tiles' kernel takes any number
            return
        scale = None
        if layout == "fp8_channel":
            k = self.graph.weights[node.weights["weight"]].shape[1]
            quantized = Temporary(f"{node.inputs[0]}.fp8", "float8_e4m3fn", k)
            scale = Temporary(f"{node.inputs[0]}.scale", "float32", 1)
            yield self._launch(
                "linear",
                [pointer("x", self.dtype), pointer("out", "fp8e4nv"), pointer("scale_out", "fp32")],
                {"K": k, "BLOCK": _power_of_two(k)},
                _per_row if self._is_selected(node.inputs[0]) else _per_token,
                [x, quantized, scale],
                kernel="quantize_rows",
                num_warps=8,
            )
            x = quantized
        yield MatMul(x, node.weights["weight"], bias, Value(node.outputs[0]), scale)

    def _is_selected(self, value: str) -> bool:
        source = self.producer.get(value)
        return source is not None and source.op == "select_rows"

    def _fused_linear(self, node: Node) -> Step:
        weight = self.graph.weights[node.weights["weight"]]
        follower = self._follower(node)
        source = self.producer.get(node.inputs[0])
        rows = source if source is not None and self._is_absorbed(source) else None
        rows = rows if rows is not None and rows.op == "select_rows" else None
        x = rows.inputs[0] if rows else node.inputs[0]
        source = self.producer.get(x)
        norm = source if source is not None and source.op == "rms_norm" else None
        if norm is not None and not self._is_absorbed(norm):
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
            has_bias="bias" in node.weights,
            num_squares=self.num_squares[norm.outputs[0]] if norm else 0,
            eps=_number(norm.attrs["eps"]) if norm else 0.0,
            has_rows=rows is not None,
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
        operands: list[Operand] = [Value(x), Weight(node.weights["weight"], "weight")]
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
            operands += self._norm_operands(adds, linear.num_programs(shape, self._tiles(shape)))
        if rope is not None:
            operands += _rope_operands(_integer(rope.attrs["layer"]), self.kv_format)
        is_selected = shape.has_rows or self._is_selected(node.inputs[0])
        return self._linear_launch(shape, operands, is_selected)

    def _tiles(self, shape: linear.LinearShape) -> linear.Tiles:
        if self.regime.max_tokens == 1:
            return linear.one_token_tiles(shape)
        return linear.few_tokens_tiles(shape, self.arch, self._block_m)

    @property
    def _block_m(self) -> int:
        return self.regime.max_tokens or linear.MAX_BLOCK_M

    def _linear_launch(
        self, shape: linear.LinearShape, operands: list[Operand], is_selected: bool
    ) -> Launch:
        block_m = self._block_m
        tiles = self._tiles(shape)
        programs = linear.num_programs(shape, tiles)
        if block_m == 1:
            variant = linear.one_token(shape, self.arch, tiles)
            return Launch(variant, lambda _: (programs, 1, 1), tuple(operands))
        variant = linear.few_tokens(shape, self.arch, tiles, block_m)
        field = "rows" if is_selected else "tokens"

        def grid(sizes: Sizes) -> Grid:
            return programs, -(-int(getattr(sizes, field)) // block_m), tiles.split_k

        scratch = linear.few_tokens_scratch(shape, tiles, block_m)
        return Launch(variant, grid, (*operands, *scratch, Size(field)))

    def _qkv_rope_write(self, node: Node) -> Iterator[Step]:
        heads = _integer(node.attrs["num_heads"])
        kv_heads = _integer(node.attrs["num_kv_heads"])
        head_dim = _integer(node.attrs["head_dim"])
        block_d = _power_of_two(head_dim // 2)
        block_h = max(1, 1024 // block_d)
        blocks = -(-(heads + 2 * kv_heads) // block_h)
        rope = _rope_operands(_integer(node.attrs["layer"]), self.kv_format)
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
        constants |= {
            "NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
            "EPS": _number(node.attrs.get("eps", 0.0)), "BLOCK_H": block_h, "BLOCK_D": block_d,
            "BLOCK_TOKENS": self.regime.block_tokens, "LARGEST": kept.largest,
            "IS_FP8": kept.dtype == "float8_e4m3fn",
        }  # fmt: skip
        yield self._launch(
            "qkv_rope_write", arguments, constants, lambda s: (s.tokens, blocks, 1), operands
        )

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
        if self.regime.max_sequences:
            tiles = attention.decode_tiles(shape, self.regime.max_sequences)
        else:
            tiles = attention.prefill_tiles(shape, self.arch)
        layer = _integer(node.attrs["layer"])
        operands: list[Operand] = [
            Value(node.inputs[0]),
            *_cache_operands(layer, self.kv_format),
            Batch("block_tables_SB"),
            Batch("seq_lens_S"),
        ]
        if not tiles.is_decode:
            operands.append(Batch("query_start_S1"))
        operands.append(Value(node.outputs[0]))
        operands += attention.scratch(shape, tiles)
        operands += [Size("sequences"), Size("table_stride")]
        yield Launch(
            attention.variant(shape, self.arch, tiles),
            lambda sizes: attention.grid(shape, tiles, sizes),
            tuple(operands),
        )

    def _rms_norm(self, node: Node) -> Iterator[Step]:
        row = self.graph.weights[node.weights["weight"]].shape[0]
        has_residual = len(node.inputs) == 2
        per_head = _integer(node.attrs.get("head_dim") or 0)
        assert not per_head, "a norm over heads has no GPU form of its own; fuse it with rope"
        arguments = [pointer("x", self.dtype)]
        operands: list[Operand] = [Value(node.inputs[0])]
        constants: dict[str, object] = {"scale_out": None}
        if has_residual:
            arguments.append(pointer("residual", self.dtype))
            operands.append(Value(node.inputs[1]))
        arguments += [pointer("weight", self.dtype), pointer("out", self.dtype)]
        operands += [Weight(node.weights["weight"], "weight"), Value(node.outputs[0])]
        if has_residual:
            arguments.append(pointer("residual_out", self.dtype))
            operands.append(Value(node.outputs[1]))
        else:
            constants |= {"residual": None, "residual_out": None}
        constants |= {"M": row, "EPS": _number(node.attrs["eps"]), "BLOCK": _power_of_two(row)}
        yield self._launch(
            "rms_norm", arguments, constants, _per_token, operands, num_warps=_row_warps(row)
        )

    def _silu_mul(self, node: Node) -> Iterator[Step]:
        source = self.producer[node.inputs[0]]
        width = self.graph.weights[source.weights["weight"]].shape[0] // 2
        blocks = -(-width // 1024)
        yield self._launch(
            "silu_mul",
            [pointer("gate_up", self.dtype), pointer("out", self.dtype)],
            {"scale_out": None, "F": width, "BLOCK": 1024},
            lambda sizes: (sizes.tokens, blocks, 1),
            [Value(node.inputs[0]), Value(node.outputs[0])],
        )

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


def _rope_operands(layer: int, kept: KvFormat) -> list[Operand]:
    return [
        Batch("positions_T"),
        Batch("rope"),
        Batch("slot_mapping_T"),
        *_cache_operands(layer, kept),
    ]


def _cache_operands(layer: int, kept: KvFormat) -> list[Operand]:
    return [KvCache(layer, part) for part in range(4 if kept.is_scaled else 2)]


def _per_token(sizes: Sizes) -> Grid:
    return sizes.tokens, 1, 1


def _per_row(sizes: Sizes) -> Grid:
    return sizes.rows, 1, 1


def _row_warps(row: int) -> int:
    return 4 if row <= 2048 else 8


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _integer(value: object) -> int:
    assert isinstance(value, int), f"{value!r} is no integer"
    return value


def _number(value: object) -> float:
    assert isinstance(value, int | float), f"{value!r} is no number"
    return float(value)
