"""Linears as launches: by kernels on which norms, RoPE and the rest ride, or by the library's products."""

from collections.abc import Iterator
from dataclasses import replace

from kernels.launch import (
    Batch,
    Launch,
    MatMul,
    Number,
    Operand,
    Scratch,
    Size,
    Step,
    Temporary,
    Value,
    Weight,
    between,
)
from kernels.linear import candidates as linear_candidates
from kernels.linear import launch as linear
from kernels.linear import launch_int4, launch_int8
from kernels.operands import (
    TRITON_DTYPES,
    in_eight_bits,
    integer,
    number,
    rope_operands,
)
from kernels.walk import Walk
from shared.ir import Node


class Linears:
    """Lowers the linears of one walk."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def steps(self, node: Node) -> Iterator[Step]:
        """The linear, and what makes its input in 8 bits before it."""
        layout = self.walk.graph.weights[node.weights["weight"]].layout
        dtype = self.walk.riding.activations(node)
        quantized = scale = None
        if dtype:
            quantized, scale = self._quantized(node, dtype)
            source = self.walk.riding.producer.get(node.inputs[0])
            if source is None or not self.walk.riding.leaves_e4m3(source):
                yield self._quantize_rows(node, quantized, scale)
        if self._is_widened(node, layout, dtype):
            yield from self._widened(node)
            return
        if self.walk.riding.is_few or layout not in linear.LIBRARY_LAYOUTS:
            yield self._fused_linear(node, quantized, scale)
            return
        x, weight = quantized or Value(node.inputs[0]), node.weights["weight"]
        norm = self.walk.riding.adding_norm(node)
        if norm is not None:
            out, adds = Value(norm.outputs[1]), Value(norm.inputs[1])
            yield MatMul(x, weight, None, out, self._size(node), adds=adds)
        else:
            bias, out = node.weights.get("bias"), Value(node.outputs[0])
            yield MatMul(x, weight, bias, out, self._size(node), scale)

    def _is_widened(self, node: Node, layout: str, rounded: str) -> bool:
        """Claims that the library multiplies many rows by the weight's values.

        Not by those of a head in int8: its rows are few, and its values would take a gigabyte.
        """
        if self.walk.riding.is_few or rounded:
            return False
        is_logits = node.outputs[0] in self.walk.graph.outputs
        return layout == "int4_group" or (layout == "int8_channel" and not is_logits)

    def _widened(self, node: Node) -> Iterator[Step]:
        """By tiles, of all rows or up to some; beyond, the weight is widened once and the library multiplies."""
        name = node.weights["weight"]
        weight = self.walk.graph.weights[name]
        shape = linear.LinearShape(
            n=weight.shape[0],
            k=weight.shape[1],
            dtype=self.walk.dtype,
            out_dtype="fp32" if node.outputs[0] in self.walk.graph.outputs else self.walk.dtype,
            layout=weight.layout,
            group_size=weight.group_size,
            has_bias="bias" in node.weights,
        )
        field = self._size(node)
        if launch_int4.takes_wgmma(shape, self.walk.arch):
            yield from self._many_int4(node, shape, field)
            return
        int4 = shape.layout == "int4_group"
        most = launch_int4.MOST_FUSED_INT4_ROWS if int4 else launch_int8.MOST_FUSED_INT8_ROWS
        fused, least = self._fused_linear(node, is_site=False), most + 1
        yield replace(fused, grid=between(fused.grid, field, 1, most))
        values = Scratch("dense_weight", lambda _: 2 * shape.n * shape.k)
        if int4:
            variant = launch_int4.dense_int4(shape, self.walk.arch)
            grid = launch_int4.dense_int4_grid(shape)
        else:
            variant = launch_int8.dense_int8(shape, self.walk.arch)
            grid = launch_int8.dense_int8_grid(shape)
        yield Launch(
            variant,
            between(lambda _: grid, field, least),
            (Weight(name, "weight"), Weight(name, "scale"), values),
        )
        bias, x, out = node.weights.get("bias"), Value(node.inputs[0]), Value(node.outputs[0])
        yield MatMul(x, name, bias, out, field, dense=values, least_rows=least)

    def _many_int4(self, node: Node, shape: linear.LinearShape, field: str) -> Iterator[Launch]:
        """A launch for each way of cutting the work; all but one of them are of no programs."""
        name = node.weights["weight"]
        operands: list[Operand] = [
            Value(node.inputs[0]),
            Weight(name, "weight"),
            Weight(name, "scale"),
        ]
        if shape.has_bias:
            operands.append(Weight(node.weights["bias"], "weight"))
        operands.append(Value(node.outputs[0]))
        for (tiles, block_m), most in launch_int4.many_int4_ways(shape).items():
            yield Launch(
                launch_int4.many_int4(shape, self.walk.arch, tiles, block_m),
                launch_int4.chosen_int4_grid(shape, tiles, block_m, field),
                (*operands, *linear.tiled_scratch(shape, tiles, block_m, most), Size(field)),
            )

    def _quantized(self, node: Node, dtype: str) -> tuple[Temporary, Temporary]:
        """A linear's input in 8 bits, and the scale of each of its rows."""
        width = self.walk.graph.weights[node.weights["weight"]].shape[1]
        return in_eight_bits(self.walk.riding.source(node), dtype, width)

    def _quantize_rows(self, node: Node, quantized: Temporary, scale: Temporary) -> Launch:
        out_dtype, x = TRITON_DTYPES[quantized.dtype], self.walk.riding.source(node)
        operands: tuple[Operand, ...] = (Value(x), quantized, scale)
        is_static = "input_scale" in node.attrs
        if is_static:
            operands += (Number(number(node.attrs["input_scale"])),)
        return Launch(
            linear.quantized_rows(
                quantized.width, self.walk.dtype, out_dtype, self.walk.arch, is_static=is_static
            ),
            self.walk.per_row_of(x),
            operands,
        )

    def _fused_linear(
        self,
        node: Node,
        quantized: Temporary | None = None,
        x_scale: Temporary | None = None,
        *,
        is_site: bool = True,
    ) -> Launch:
        """The linear with all that rides on it; `quantized` and its scales take the place of its input.

        Args:
            is_site: its tiles can be chosen; not where it runs in some of a regime's steps alone, which tuning may
                not time.
        """
        weight = self.walk.graph.weights[node.weights["weight"]]
        follower = self.walk.riding.follower(node)
        x = self.walk.riding.source(node)
        source = self.walk.riding.producer.get(x)
        norm = source if source is not None and source.op == "rms_norm" else None
        if norm is not None and not self.walk.riding.is_absorbed(norm):
            norm = None
        rope = follower if follower and follower.op == "qkv_rope_write" else None
        adds = follower if follower and follower.op == "rms_norm" else None
        attrs = rope.attrs if rope else {}
        is_logits = node.outputs[0] in self.walk.graph.outputs
        shape = linear.LinearShape(
            n=weight.shape[0],
            k=weight.shape[1],
            dtype=self.walk.dtype,
            out_dtype="fp32" if is_logits else self.walk.dtype,
            layout=weight.layout,
            group_size=weight.group_size,
            activations=TRITON_DTYPES[quantized.dtype] if quantized else "",
            has_bias="bias" in node.weights,
            num_squares=self.walk.num_squares[norm.outputs[0]] if norm else 0,
            eps=number(norm.attrs["eps"]) if norm else 0.0,
            has_rows=x != node.inputs[0],
            has_residual=adds is not None,
            has_gain=adds is not None,
            epilogue="rope" if rope else "silu_mul" if follower and not adds else "plain",
            num_heads=integer(attrs.get("num_heads", 0)),
            num_kv_heads=integer(attrs.get("num_kv_heads", 0)),
            head_dim=integer(attrs.get("head_dim", 0)),
            kv_dtype=TRITON_DTYPES[self.walk.kv_format.dtype] if rope else "bf16",
            block_tokens=self.walk.regime.block_tokens if rope else 0,
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
            operands.append(self.walk.squares(norm))
        if shape.has_rows:
            operands.append(Batch("logit_rows_R"))
        if adds is not None:
            operands += [Value(adds.inputs[1]), Weight(adds.weights["weight"], "weight")]
        operands.append(Value(out))
        if adds is not None:
            operands += self.walk.norm_operands(
                adds, linear.num_programs(shape, self._tiles(shape)[0])
            )
        if rope is not None:
            operands += rope_operands(integer(rope.attrs["layer"]), self.walk.kv_format)
        return self._linear_launch(shape, operands, x_scale, self._size(node), is_site)

    def _size(self, node: Node) -> str:
        return self.walk.size_of(node.inputs[0])

    def _tiles(self, shape: linear.LinearShape, is_site: bool = True) -> tuple[linear.Tiles, int]:
        """How the work is cut, and the tokens of a tile; 1 is the kernel for one token."""
        site = linear_candidates.site(shape, self.walk.max_tokens)
        ways = linear_candidates.candidates(shape, self.walk.arch, self.walk.max_tokens)
        if not is_site:
            return next(iter(ways.values()))
        return self.walk.choices.of(site, ways)

    def _linear_launch(
        self,
        shape: linear.LinearShape,
        operands: list[Operand],
        x_scale: Temporary | None,
        field: str,
        is_site: bool,
    ) -> Launch:
        tiles, block_m = self._tiles(shape, is_site)
        site = linear_candidates.site(shape, self.walk.max_tokens) if is_site else None
        if block_m == 1:
            programs = linear.num_programs(shape, tiles)
            variant = linear.one_token(shape, self.walk.arch, tiles)
            return Launch(variant, lambda _: (programs, 1, 1), tuple(operands), site)
        variant = linear.few_tokens(shape, self.walk.arch, tiles, block_m)
        grid = linear.tiled_grid(shape, tiles, block_m, field)
        scratch = linear.tiled_scratch(shape, tiles, block_m)
        scales = () if x_scale is None else (x_scale,)
        return Launch(variant, grid, (*operands, *scratch, *scales, Size(field)), site)
