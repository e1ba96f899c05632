"""Between the qkv projection and attention one op remains: norm, rotate, write to the cache."""

from dataclasses import dataclass

from compiler_service.passes.uses import Uses
from shared.ir import Attr, Graph, Node


@dataclass(frozen=True, slots=True)
class _Match:
    """The nodes of one layer that become one; norms are None where the family has none."""

    split: Node
    q_norm: Node | None
    k_norm: Node | None
    q_rope: Node
    k_rope: Node
    kv_write: Node

    @property
    def absorbed(self) -> tuple[Node, ...]:
        nodes = (self.split, self.q_norm, self.k_norm, self.q_rope, self.k_rope)
        return tuple(node for node in nodes if node is not None)


def fuse_qkv_rope_write(graph: Graph) -> Graph:
    """`q, k, v = split(qkv)`, q/k norm, rope, kv_write -> `q, kv = qkv_rope_write(qkv)`."""
    uses = Uses.of(graph)
    fused: dict[str, Node] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        match = _match(uses, node) if node.op == "kv_write" else None
        if match is not None:
            fused[node.outputs[0]] = _fuse(match)
            gone |= {name for n in match.absorbed for name in n.outputs}
    nodes = []
    for node in graph.nodes:
        if node.outputs[0] in fused:
            nodes.append(fused[node.outputs[0]])
        elif not gone.intersection(node.outputs):
            nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _match(uses: Uses, kv_write: Node) -> _Match | None:
    k_rope = uses.made_by(kv_write.inputs[0], "rope")
    split = uses.made_by(kv_write.inputs[1], "split")
    if k_rope is None or split is None or len(split.outputs) != 3:
        return None
    q, k, v = split.outputs
    q_chain, k_chain = _chain(uses, q), _chain(uses, k)
    if q_chain is None or k_chain is None or v != kv_write.inputs[1]:
        return None
    (q_norm, q_rope), (k_norm, k_rope_of_split) = q_chain, k_chain
    same_rope = dict(q_rope.attrs) == dict(k_rope.attrs)
    same_norm = (q_norm is None) == (k_norm is None) and (
        q_norm is None or k_norm is None or dict(q_norm.attrs) == dict(k_norm.attrs)
    )
    alone = all(uses.only_reader(value, "kv_write") is not None for value in (v, k_rope.outputs[0]))
    if k_rope_of_split is not k_rope or not (same_rope and same_norm and alone):
        return None
    return _Match(split, q_norm, k_norm, q_rope, k_rope, kv_write)


def _chain(uses: Uses, value: str) -> tuple[Node | None, Node] | None:
    """The optional per-head norm and the rope that alone read `value` one after the other."""
    norm = uses.only_reader(value, "rms_norm")
    if norm is not None and (norm.attrs["residual"] or not norm.attrs["head_dim"]):
        return None
    rope = uses.only_reader(value if norm is None else norm.outputs[0], "rope")
    return None if rope is None else (norm, rope)


def _fuse(match: _Match) -> Node:
    head_dim = match.q_rope.attrs["head_dim"]
    sizes = match.split.attrs["sizes"]
    assert isinstance(head_dim, int), "rope lacks head_dim"
    assert isinstance(sizes, tuple), "split lacks sizes"
    weights = {}
    if match.q_norm is not None and match.k_norm is not None:
        weights = {
            "q_norm": match.q_norm.weights["weight"],
            "k_norm": match.k_norm.weights["weight"],
        }
    attrs: dict[str, Attr] = {
        **match.kv_write.attrs,
        "num_heads": int(sizes[0]) // head_dim,
        "inv_freq": match.q_rope.attrs["inv_freq"],
        "attention_scaling": match.q_rope.attrs["attention_scaling"],
        "eps": 0.0 if match.q_norm is None else match.q_norm.attrs["eps"],
    }
    outputs = (match.q_rope.outputs[0], match.kv_write.outputs[0])
    return Node("qkv_rope_write", match.split.inputs, outputs, weights, attrs)
