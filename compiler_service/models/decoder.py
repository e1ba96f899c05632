"""The decoder that the families share: pre-norm attention and gated MLP, lowered to unfused ops.

A family file says what is particular to it with a `DecoderTraits`; sizes come from the config.
Nothing here is fused or quantized: passes and schemes do that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compiler_service.models.rope import Rope, rope_of
from shared.errors import InvalidModel, UnsupportedModel
from shared.ir import Attr, Graph, Node, TensorSpec, WeightSpec

# Beyond these a config is corrupt, and lowering it would take forever.
_MOST, _MOST_LAYERS = (1 << 31) - 1, 4096
# What transformers' MistralConfig, Qwen2Config and Qwen3Config say where config.json does not.
_DEFAULT_WINDOW, _DEFAULT_WINDOW_LAYERS = 4096, 28
_LAYER_TYPES = ("full_attention", "sliding_attention")


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
    """

    family: str
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()


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
    def from_config(config: Mapping[str, Any]) -> "DecoderSizes":
        """The sizes of `config`.

        Raises:
            InvalidModel: a field is missing, no positive number, or contradicts another.
            UnsupportedModel: the activation is not SiLU.
        """
        activation = config.get("hidden_act") or "silu"
        if activation != "silu":
            raise UnsupportedModel(architecture=f"hidden_act {activation}", known="silu")
        num_heads = _positive(config, "num_attention_heads")
        hidden_size = _positive(config, "hidden_size")
        if config.get("head_dim") is None and hidden_size % num_heads:
            problem = f"{hidden_size} values do not divide among {num_heads} heads, and there is no"
            raise InvalidModel(problem=f"{problem} head_dim")
        sizes = DecoderSizes(
            num_layers=_positive(config, "num_hidden_layers", most=_MOST_LAYERS),
            num_heads=num_heads,
            num_kv_heads=_positive(config, "num_key_value_heads", num_heads),
            head_dim=_positive(config, "head_dim", hidden_size // num_heads),
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size"),
            vocab_size=_positive(config, "vocab_size"),
            max_positions=_positive(config, "max_position_embeddings"),
            eps=_eps(config),
            is_tied=bool(config.get("tie_word_embeddings", False)),
        )
        if sizes.num_heads % sizes.num_kv_heads:
            problem = f"{sizes.num_heads} heads do not share {sizes.num_kv_heads} key-value heads"
            raise InvalidModel(problem=problem)
        if sizes.head_dim % 2:
            raise InvalidModel(problem=f"head_dim {sizes.head_dim} is odd, RoPE turns pairs")
        return sizes


def lower_decoder(config: Mapping[str, Any], dtype: str, traits: DecoderTraits) -> Graph:
    """The unfused graph of a decoder; activations and logical weights have `dtype`."""
    sizes = DecoderSizes.from_config(config)
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


def _positive(
    config: Mapping[str, Any], name: str, default: int | None = None, most: int = _MOST
) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        found = "is missing" if value is None else f"is {value!r}"
        wanted = f"a whole number from 1 to {most}"
        raise InvalidModel(problem=f"config.json's {name} {found}; it must be {wanted}")
    return value


def _eps(config: Mapping[str, Any]) -> float:
    value = config.get("rms_norm_eps")
    value = 1e-6 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        problem = f"config.json's rms_norm_eps is {value!r}; it must be between 0 and 1"
        raise InvalidModel(problem=problem)
    return float(value)


def uniform_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Each layer's window where a config's window holds for all of them; null turns it off."""
    window = _window(config)
    num_layers = _positive(config, "num_hidden_layers", most=_MOST_LAYERS)
    return (window,) * num_layers if window else ()


def sliding_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Each layer's window where a config turns windows on by `use_sliding_window`.

    `layer_types` says which layers; where it is missing, those from `max_window_layers` on.
    """
    num_layers = _positive(config, "num_hidden_layers", most=_MOST_LAYERS)
    if not config.get("use_sliding_window", False) or not (window := _window(config)):
        return ()
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", _DEFAULT_WINDOW_LAYERS)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise InvalidModel(problem=f"config.json's max_window_layers is {first!r}")
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        found = len(layer_types) if isinstance(layer_types, list) else f"{layer_types!r} as"
        raise InvalidModel(problem=f"{found} layer_types for {num_layers} layers")
    for kind in layer_types:
        if kind not in _LAYER_TYPES:
            known = ", ".join(_LAYER_TYPES)
            raise UnsupportedModel(architecture=f"layer type {kind}", known=known)
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


def _window(config: Mapping[str, Any]) -> int:
    """0 where it is null; a config that says nothing means the default of its family."""
    value = config.get("sliding_window", _DEFAULT_WINDOW)
    if value is None:
        return 0
    return _positive(config, "sliding_window", _DEFAULT_WINDOW)
