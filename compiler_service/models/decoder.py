"""The decoder that the families share: pre-norm attention and gated MLP, lowered to unfused ops.

A family file says what is particular to it with a `DecoderTraits`; sizes come from the config.
Nothing here is fused or quantized: passes and schemes do that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compiler_service.models.fields import flag, fraction, num_layers_of, positive
from compiler_service.models.rope import Rope, rope_of
from shared.errors import InvalidModel, UnsupportedModel
from shared.ir import Attr, Graph, Node, TensorSpec, WeightSpec

# Two names of one function.
_ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class DecoderTraits:
    """What one family's decoder does that another's does not.

    Args:
        family: its name in FAMILIES.
        qkv_bias: the q, k and v projections add a bias.
        o_bias: the attention's output projection adds a bias.
        mlp_bias: the MLP's projections add a bias.
        qk_norm: q and k are normalized per head before RoPE.
        windows: sliding window of each layer in tokens, 0 = none; empty = none anywhere.
        default_head_dim: where config.json has none; 0 = the hidden size shared by the heads.
        default_num_kv_heads: where config.json has none; 0 = as many as heads.
    """

    family: str
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    default_head_dim: int = 0
    default_num_kv_heads: int = 0


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """The sizes in a config.json, checked."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    eps: float
    is_tied: bool

    @staticmethod
    def from_config(config: Mapping[str, Any], traits: DecoderTraits) -> "DecoderSizes":
        """The sizes of `config`, and where it has none those of the family.

        Raises:
            InvalidModel: a field is missing, no positive number, or contradicts another.
            UnsupportedModel: the activation is not SiLU.
        """
        activation = config.get("hidden_act") or "silu"
        if activation not in _ACTIVATIONS:
            raise UnsupportedModel(architecture=f"hidden_act {activation}", known="silu")
        num_heads = positive(config, "num_attention_heads")
        hidden_size = positive(config, "hidden_size")
        sizes = DecoderSizes(
            num_layers=num_layers_of(config),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, num_heads, traits),
            head_dim=_head_dim(config, hidden_size, num_heads, traits),
            hidden_size=hidden_size,
            intermediate_size=positive(config, "intermediate_size"),
            vocab_size=positive(config, "vocab_size"),
            max_positions=positive(config, "max_position_embeddings"),
            eps=fraction(config, "rms_norm_eps", 1e-6),
            is_tied=flag(config, "tie_word_embeddings"),
        )
        if sizes.num_heads % sizes.num_kv_heads:
            problem = f"{sizes.num_heads} heads do not share {sizes.num_kv_heads} key-value heads"
            raise InvalidModel(problem=problem)
        if sizes.head_dim % 2:
            raise InvalidModel(problem=f"head_dim {sizes.head_dim} is odd, RoPE turns pairs")
        return sizes


def lower_decoder(config: Mapping[str, Any], dtype: str, traits: DecoderTraits) -> Graph:
    """The unfused graph of a decoder; activations and logical weights have `dtype`."""
    sizes = DecoderSizes.from_config(config, traits)
    rope = rope_of(config, sizes.head_dim)
    lowering = _Lowering(sizes, rope, dtype, traits)
    nodes, weights = lowering.run()
    graph_config: dict[str, Attr] = {
        "family": traits.family,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_size": sizes.hidden_size,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": max(sizes.max_positions, rope.max_positions),
        "dtype": dtype,
    }
    return Graph(
        inputs={"token_ids": TensorSpec(("T",), "int32")},
        nodes=nodes,
        outputs=("logits",),
        weights=weights,
        config=graph_config,
    )


@dataclass(slots=True)
class _Lowering:
    """Appends nodes in order; weights are named by their place, values by what they are."""

    sizes: DecoderSizes
    rope: Rope
    dtype: str
    traits: DecoderTraits
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, WeightSpec] = field(default_factory=dict)

    def run(self) -> tuple[tuple[Node, ...], dict[str, WeightSpec]]:
        sizes = self.sizes
        embed = self.weight("embed", (sizes.vocab_size, sizes.hidden_size), "model.embed_tokens")
        self.emit("embedding", ("token_ids",), "x", {"weight": embed}, dtype=self.dtype)
        x = "x"
        for layer in range(sizes.num_layers):
            x = self.attention(layer, x)
            x = self.mlp(layer, x)
        y = self.norm(x, "norm", "model.norm", sizes.hidden_size)
        rows = self.emit("select_rows", (y,), "last")
        if not sizes.is_tied:
            shape = (sizes.vocab_size, sizes.hidden_size)
            embed = self.weight("lm_head", shape, "lm_head", shard_dim=0)
        self.emit("linear", (rows,), "logits", {"weight": embed})
        return tuple(self.nodes), self.weights

    def attention(self, layer: int, x: str) -> str:
        sizes, traits = self.sizes, self.traits
        at, source = f"layers.{layer}.", f"model.layers.{layer}.self_attn."
        heads: dict[str, Attr] = {
            "layer": layer,
            "num_kv_heads": sizes.num_kv_heads,
            "head_dim": sizes.head_dim,
        }
        y = self.norm(
            x, f"{at}attn_norm", f"model.layers.{layer}.input_layernorm", sizes.hidden_size
        )
        projected = {}
        for role in ("q", "k", "v"):
            rows = (sizes.num_heads if role == "q" else sizes.num_kv_heads) * sizes.head_dim
            projected[role] = self.linear(
                y, at + role, f"{source}{role}_proj", rows, sizes.hidden_size,
                has_bias=traits.qkv_bias, shard_dim=0,
            )  # fmt: skip
        for role in ("q", "k"):
            if traits.qk_norm:
                projected[role] = self.norm(
                    projected[role], f"{at}{role}_norm", f"{source}{role}_norm",
                    sizes.head_dim, head_dim=sizes.head_dim,
                )  # fmt: skip
            projected[role] = self.emit(
                "rope", (projected[role],), f"{at}{role}_rope",
                head_dim=sizes.head_dim, inv_freq=self.rope.inv_freq,
                attention_scaling=self.rope.attention_scaling,
            )  # fmt: skip
        kv = self.emit("kv_write", (projected["k"], projected["v"]), f"{at}kv", **heads)
        attended = self.emit(
            "attention", (projected["q"], kv), f"{at}attended", num_heads=sizes.num_heads,
            scale=sizes.head_dim**-0.5, window=traits.windows[layer] if traits.windows else 0,
            soft_cap=0.0, **heads,
        )  # fmt: skip
        out = self.linear(
            attended, f"{at}o", f"{source}o_proj", sizes.hidden_size,
            sizes.num_heads * sizes.head_dim, has_bias=traits.o_bias, shard_dim=1,
        )  # fmt: skip
        return self.emit("add", (x, out), f"{at}after_attn")

    def mlp(self, layer: int, x: str) -> str:
        sizes, has_bias = self.sizes, self.traits.mlp_bias
        hidden, ffn = sizes.hidden_size, sizes.intermediate_size
        at, source = f"layers.{layer}.", f"model.layers.{layer}.mlp."
        y = self.norm(x, f"{at}mlp_norm", f"model.layers.{layer}.post_attention_layernorm", hidden)
        gate, up = (
            self.linear(
                y, at + role, f"{source}{role}_proj", ffn, hidden, has_bias=has_bias, shard_dim=0
            )
            for role in ("gate", "up")
        )
        silu = self.emit("silu", (gate,), f"{at}silu")
        product = self.emit("mul", (silu, up), f"{at}gated")
        down = self.linear(
            product, f"{at}down", f"{source}down_proj", hidden, ffn, has_bias=has_bias, shard_dim=1
        )
        return self.emit("add", (x, down), f"{at}after_mlp")

    def norm(self, x: str, name: str, part: str, size: int, head_dim: int = 0) -> str:
        weight = self.weight(name, (size,), part)
        return self.emit(
            "rms_norm", (x,), f"{name}ed", {"weight": weight},
            eps=self.sizes.eps, residual=False, head_dim=head_dim,
        )  # fmt: skip

    def linear(
        self, x: str, name: str, part: str, rows: int, columns: int, *, has_bias: bool,
        shard_dim: int,
    ) -> str:  # fmt: skip
        weights = {"weight": self.weight(name, (rows, columns), part, shard_dim=shard_dim)}
        if has_bias:
            # The bias of a linear split along K is added once, so every rank keeps it whole.
            bias_shard = 0 if shard_dim == 0 else None
            bias = self.weight(f"{name}.bias", (rows,), part, shard_dim=bias_shard, kind="bias")
            weights["bias"] = bias
        return self.emit("linear", (x,), f"{name}_out", weights)

    def weight(
        self, name: str, shape: tuple[int, ...], part: str, *, shard_dim: int | None = None,
        kind: str = "weight",
    ) -> str:  # fmt: skip
        self.weights[name] = WeightSpec(
            shape, (f"{part}.{kind}",), (shape[0],), self.dtype, shard_dim=shard_dim
        )
        return name

    def emit(
        self, op: str, inputs: tuple[str, ...], output: str,
        weights: Mapping[str, str] | None = None, /, **attrs: Attr,
    ) -> str:  # fmt: skip
        self.nodes.append(Node(op, inputs, (output,), weights or {}, attrs))
        return output


def _num_kv_heads(config: Mapping[str, Any], num_heads: int, traits: DecoderTraits) -> int:
    # Null is no default: transformers takes it for as many as there are heads.
    is_null = "num_key_value_heads" in config
    default = num_heads if is_null else traits.default_num_kv_heads or num_heads
    return positive(config, "num_key_value_heads", default)


def _head_dim(
    config: Mapping[str, Any], hidden_size: int, num_heads: int, traits: DecoderTraits
) -> int:
    is_shared = config.get("head_dim") is None and not traits.default_head_dim
    if is_shared and hidden_size % num_heads:
        problem = f"{hidden_size} values do not divide among {num_heads} heads, and there is no"
        raise InvalidModel(problem=f"{problem} head_dim")
    return positive(config, "head_dim", traits.default_head_dim or hidden_size // num_heads)
