"""The graph: straight-line SSA over packed tokens, the one description of a model's arithmetic.

The compiler lowers a checkpoint to it, passes rewrite it, the engine stores it and the runtime's
executor walks it. It knows names, shapes, dtypes and attributes; what an op *means* is in
`kernels/<op>/op.py`, handed to `verify` as a mapping.

Symbolic dims: "T" packed tokens of a step, "R" rows whose logits are wanted, "S" sequences.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Dim = int | str
Attr = bool | int | float | str | None | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a value. dtype is torch's name without the prefix: `bfloat16`, `int32`."""

    dims: tuple[Dim, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight as the graph uses it: checkpoint tensors joined along dim 0, stored in a layout.

    Args:
        shape: logical shape, before packing; [N, K] for linears.
        parts: checkpoint tensor names, concatenated along dim 0; q, k, v or gate, up once fused.
        part_rows: rows of each part, in order; sums to shape[0].
        dtype: logical dtype of the values that the layout stands for.
        layout: a name in `kernels.linear.op.LAYOUTS`; "plain" until a scheme chooses another.
        group_size: values along K that share a scale; 0 = one scale per row.
        shard_dim: dim that tensor parallelism splits, None where every rank keeps all of it.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    part_rows: tuple[int, ...]
    dtype: str
    layout: str = "plain"
    group_size: int = 0
    shard_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One op applied to values.

    Args:
        op: a name in `kernels.OPS`.
        inputs: value names, in the op's order.
        outputs: value names, each defined exactly here.
        weights: role ("weight", "bias", "q_norm", ...) to weight name.
        attrs: the op's attributes; fusion is an attribute, not another op.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Attr] = field(default_factory=dict)


class ShapeRule(Protocol):
    """What `verify` asks of an op."""

    def infer(
        self, node: Node, inputs: tuple[TensorSpec, ...], weights: Mapping[str, WeightSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of the outputs; AssertionError where the node contradicts its op."""
        ...


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's arithmetic for one step.

    Args:
        inputs: names and specs of what the runtime feeds: `token_ids` [T] int32.
            Positions, slots and block tables are not values: ops that need them (rope, kv_write,
            attention, select_rows) read the step's batch.
        nodes: in execution order.
        outputs: value names; `logits` [R, V] for a language model.
        weights: every weight that a node names.
        config: what the runtime must know beside the nodes: num_layers, num_heads, num_kv_heads,
            head_dim, hidden_size, vocab_size, max_position_embeddings, activation dtype, family.
    """

    inputs: Mapping[str, TensorSpec]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, WeightSpec]
    config: Mapping[str, Attr]

    def infer(self, ops: Mapping[str, ShapeRule]) -> dict[str, TensorSpec]:
        """The spec of every value.

        Raises:
            AssertionError: the graph breaks a rule; says which node and what.
        """
        specs = dict(self.inputs)
        for index, node in enumerate(self.nodes):
            where = f"node {index} ({node.op} -> {', '.join(node.outputs)})"
            assert node.op in ops, f"{where}: no such op"
            for name in node.inputs:
                assert name in specs, f"{where}: {name!r} is used before it is defined"
            for name in node.outputs:
                assert name not in specs, f"{where}: {name!r} is defined twice"
            for role, name in node.weights.items():
                assert name in self.weights, f"{where}: weight {name!r} ({role}) does not exist"
            weights = {role: self.weights[name] for role, name in node.weights.items()}
            try:
                outputs = ops[node.op].infer(node, tuple(specs[n] for n in node.inputs), weights)
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            assert len(outputs) == len(node.outputs), f"{where}: {len(outputs)} outputs inferred"
            specs.update(zip(node.outputs, outputs, strict=True))
        for name in self.outputs:
            assert name in specs, f"graph output {name!r} is never defined"
        return specs

    def verify(self, ops: Mapping[str, ShapeRule]) -> None:
        """Checks SSA form, shapes, and that weights are exactly those in use and well-formed.

        Raises:
            AssertionError: what is now false, and where.
        """
        self.infer(ops)
        used = {name for node in self.nodes for name in node.weights.values()}
        unused = sorted(set(self.weights) - used)
        assert not unused, f"weights never used: {unused[:3]}"
        for name, weight in self.weights.items():
            assert sum(weight.part_rows) == weight.shape[0], f"weight {name!r}: parts do not add up"
            assert len(weight.parts) == len(weight.part_rows), f"weight {name!r}: part without rows"

    def with_nodes(
        self, nodes: tuple[Node, ...], weights: Mapping[str, WeightSpec] | None = None
    ) -> "Graph":
        """This graph with other nodes, and with the weights that they use."""
        table = {**self.weights, **(weights or {})}
        used = {name for node in nodes for name in node.weights.values()}
        return replace(self, nodes=nodes, weights={n: w for n, w in table.items() if n in used})

    def to_json(self) -> str:
        """Canonical JSON: equal graphs give equal text."""
        return json.dumps(_plain(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Graph":
        """The graph that `to_json` wrote."""
        raw = json.loads(text)
        return Graph(
            inputs={n: _tensor_spec(s) for n, s in raw["inputs"].items()},
            nodes=tuple(
                Node(
                    op=n["op"],
                    inputs=tuple(n["inputs"]),
                    outputs=tuple(n["outputs"]),
                    weights=n["weights"],
                    attrs={k: _attr(v) for k, v in n["attrs"].items()},
                )
                for n in raw["nodes"]
            ),
            outputs=tuple(raw["outputs"]),
            weights={
                n: WeightSpec(**{k: _attr(v) for k, v in w.items()})
                for n, w in raw["weights"].items()
            },
            config={k: _attr(v) for k, v in raw["config"].items()},
        )

    def to_text(self) -> str:
        """One line a node, for people."""
        lines = [f"in  {n}: {_spec_text(s)}" for n, s in self.inputs.items()]
        for node in self.nodes:
            attrs = ", ".join(f"{k}={v}" for k, v in node.attrs.items())
            weights = ", ".join(f"{r}={n}" for r, n in node.weights.items())
            tail = "".join(
                f" {o}{t}{c}" for o, t, c in (("{", attrs, "}"), ("[", weights, "]")) if t
            )
            lines.append(f"{', '.join(node.outputs)} = {node.op}({', '.join(node.inputs)}){tail}")
        lines.append(f"out {', '.join(self.outputs)}")
        return "\n".join(lines)


def _spec_text(spec: TensorSpec) -> str:
    return f"{spec.dtype}[{', '.join(map(str, spec.dims))}]"


def _plain(graph: Graph) -> dict[str, Any]:
    return {
        "inputs": {n: {"dims": s.dims, "dtype": s.dtype} for n, s in graph.inputs.items()},
        "nodes": [
            {
                "op": n.op,
                "inputs": n.inputs,
                "outputs": n.outputs,
                "weights": dict(n.weights),
                "attrs": dict(n.attrs),
            }
            for n in graph.nodes
        ],
        "outputs": graph.outputs,
        "weights": {
            n: {f: getattr(w, f) for f in WeightSpec.__slots__} for n, w in graph.weights.items()
        },
        "config": dict(graph.config),
    }


def _attr(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tensor_spec(raw: dict[str, Any]) -> TensorSpec:
    return TensorSpec(tuple(raw["dims"]), raw["dtype"])
