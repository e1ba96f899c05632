"""What of a graph a GPU's linear kernels do on the side, in steps of one size; `lowering.py` emits the launches.

In steps of few tokens norms, residual adds, RoPE, KV writes and silu ride on the linears around them, and cost no
launch. In steps of many the library multiplies, and row kernels leave what it reads: rows in 8 bits.
"""

from kernels.kv_cache import kv_format
from kernels.linear.launch import MOST_FEW_TOKENS
from kernels.linear.op import activations as rounding
from shared.ir import Graph, Node

# Columns of a residual that the library's product adds faster than a norm does; measured on one H100 up to here.
WIDEST_ADDED = 4096


class Riding:
    """Answers about the nodes of one graph.

    Args:
        max_tokens: of a step; 0 is any number.
    """

    def __init__(self, graph: Graph, max_tokens: int) -> None:
        self._graph = graph
        self._max_tokens = max_tokens
        self._is_scaled = kv_format(graph).is_scaled
        self._most_few = min(MOST_FEW_TOKENS[weight.layout] for weight in graph.weights.values())
        self.producer = {name: node for node in graph.nodes for name in node.outputs}
        self.users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)

    @property
    def is_few(self) -> bool:
        """Claims that our own kernels multiply, not the library's."""
        return 0 < self._max_tokens <= self._most_few

    def is_absorbed(self, node: Node) -> bool:
        """Claims that a linear's kernel, or the embedding's, does this node's work."""
        if not self.is_few:
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
            and not (node.op == "qkv_rope_write" and self._is_scaled)
        )

    def _has_one_use(self, value: str) -> bool:
        return len(self.users.get(value, [])) == 1 and value not in self._graph.outputs

    def follower(self, node: Node) -> Node | None:
        """The node that rides on this linear, if any."""
        users = self.users.get(node.outputs[0], [])
        if len(users) != 1 or not self.is_absorbed(users[0]):
            return None
        follower = users[0]
        adds = len(follower.inputs) == 2 and follower.inputs[0] == node.outputs[0]
        if follower.op in ("silu_mul", "qkv_rope_write") or (follower.op == "rms_norm" and adds):
            return follower
        return None

    def riding_norm(self, node: Node) -> Node | None:
        """The norm whose gain rides on this embedding, if any."""
        for user in self.users.get(node.outputs[0], []):
            if user.op == "rms_norm" and len(user.inputs) == 1 and self.is_absorbed(user):
                return user
        return None

    def adding_norm(self, node: Node) -> Node | None:
        """The norm whose residual the library's product of this linear adds in place: nothing reads it afterwards."""
        users = self.users.get(node.outputs[0], [])
        weight = self._graph.weights[node.weights["weight"]]
        if self.is_few or weight.layout != "plain" or "bias" in node.weights:
            return None
        if weight.shape[0] > WIDEST_ADDED:
            return None
        if [user.op for user in users] != ["rms_norm"] or len(users[0].inputs) != 2:
            return None
        norm = users[0]
        product, residual = norm.inputs
        is_last = self.users[residual][-1] is norm and residual not in self._graph.outputs
        return norm if is_last and product == node.outputs[0] else None

    def is_added(self, norm: Node) -> bool:
        """Claims that the product before this norm adds its residual."""
        source = self.producer.get(norm.inputs[0])
        return source is not None and source.op == "linear" and self.adding_norm(source) is norm

    def leaves_e4m3(self, node: Node) -> bool:
        """Claims that every reader of the node's first output is a linear of e4m3 rows with a scale each: then its
        kernel quantizes what it has in registers, and no pass over it is needed."""
        if self.is_absorbed(node) or node.op not in ("rms_norm", "silu_mul"):
            return False
        users = self.users.get(node.outputs[0], [])
        return bool(users) and all(
            user.op == "linear"
            and self.activations(user) == "float8_e4m3fn"
            and "input_scale" not in user.attrs
            for user in users
        )

    def activations(self, node: Node) -> str:
        """torch's dtype of 8 bits that a linear's input is rounded to; empty where it is not.

        One token waits for the weight alone, and keeps its input as it is.
        """
        if self._max_tokens == 1:
            return ""
        layout = self._graph.weights[node.weights["weight"]].layout
        if layout == "fp8_channel":
            return "float8_e4m3fn"
        return "int8" if layout == "int8_channel" and rounding(node) == "int8" else ""

    def source(self, node: Node) -> str:
        """The value that a linear multiplies, before its rows are selected where that rides on it."""
        source = self.producer.get(node.inputs[0])
        if source is not None and source.op == "select_rows" and self.is_absorbed(source):
            return source.inputs[0]
        return node.inputs[0]
