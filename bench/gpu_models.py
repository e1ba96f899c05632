"""Llama-shaped models from sizes alone: the fused graph, and random weights on the GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from kernels.linear.gpu import arranged, is_arranged
from kernels.linear.layouts import DEFAULT_INT4_GROUP, LAYOUTS
from shared.ir import Graph, Node, TensorSpec, WeightSpec


@dataclass(frozen=True, slots=True)
class LlamaSizes:
    """A Llama's sizes; vocabulary and all."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int


MODELS = {
    "llama-3.1-8b": LlamaSizes(4096, 32, 32, 8, 128, 14336, 128256),
    "llama-3.2-1b": LlamaSizes(2048, 16, 32, 8, 64, 8192, 128256),
    # Its sizes alone: the bias of its qkv is left out.
    "qwen2.5-1.5b": LlamaSizes(1536, 28, 12, 2, 128, 8960, 151936),
    "tiny": LlamaSizes(256, 2, 8, 2, 32, 352, 1000),
}


def inv_freq(sizes: LlamaSizes) -> tuple[float, ...]:
    """Plain RoPE with theta 500,000."""
    half = sizes.head_dim // 2
    return tuple(500_000.0 ** (-i / half) for i in range(half))


def llama_graph(
    sizes: LlamaSizes,
    layout: str,
    num_layers: int | None = None,
    *,
    like_qwen: bool = False,
    rounding: Mapping[str, Any] = MappingProxyType({}),
    kv_cache: str = "",
) -> Graph:
    """The fused graph; every linear but the LM head, which stays plain, is stored as `layout`.

    `like_qwen` adds what Qwen has and Llama has not: q and k norms, and a bias of qkv. `rounding` are attributes of
    those linears: how their inputs are rounded.
    """
    nodes: list[Node] = []
    weights: dict[str, WeightSpec] = {}

    def weight(name: str, *shape: int, stored: str = "plain") -> str:
        group = 0
        if stored == "int4_group":
            group = 32 if shape[1] % DEFAULT_INT4_GROUP else DEFAULT_INT4_GROUP
        weights[name] = WeightSpec(shape, (name,), (shape[0],), "bfloat16", stored, group)
        return name

    def add(
        op: str, inputs: list[str], outputs: list[str], w: dict[str, str], **attrs: Any
    ) -> None:
        if op == "rms_norm":
            attrs |= {"residual": len(inputs) == 2, "head_dim": 0}
        if op == "embedding":
            attrs |= {"dtype": "bfloat16"}
        nodes.append(Node(op, tuple(inputs), tuple(outputs), w, attrs))

    s = sizes
    rope = {
        "num_heads": s.heads, "num_kv_heads": s.kv_heads, "head_dim": s.head_dim,
        "inv_freq": inv_freq(s), "attention_scaling": 1.0, "eps": 1e-5,
    }  # fmt: skip
    add("embedding", ["token_ids"], ["x"], {"weight": weight("embed", s.vocab, s.hidden)})
    add("rms_norm", ["x"], ["0.h"], {"weight": weight("0.norm", s.hidden)}, eps=1e-5)
    residual = "x"
    layers = s.layers if num_layers is None else num_layers
    for i in range(layers):
        qkv = weight(f"{i}.qkv", (s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden, stored=layout)
        bias = {"bias": weight(f"{i}.qkv_bias", weights[qkv].shape[0])} if like_qwen else {}
        add("linear", [f"{i}.h"], [f"{i}.qkv"], {"weight": qkv, **bias}, **rounding)
        head_norms = ("q_norm", "k_norm") if like_qwen else ()
        norms = {role: weight(f"{i}.{role}", s.head_dim) for role in head_norms}
        add("qkv_rope_write", [f"{i}.qkv"], [f"{i}.q", f"{i}.kv"], norms, layer=i, **rope)
        add("attention", [f"{i}.q", f"{i}.kv"], [f"{i}.a"], {}, layer=i, num_heads=s.heads,
            num_kv_heads=s.kv_heads, head_dim=s.head_dim, scale=s.head_dim**-0.5, window=0,
            soft_cap=0.0)  # fmt: skip
        out = weight(f"{i}.o", s.hidden, s.heads * s.head_dim, stored=layout)
        add("linear", [f"{i}.a"], [f"{i}.o"], {"weight": out}, **rounding)
        norm = weight(f"{i}.norm2", s.hidden)
        add("rms_norm", [f"{i}.o", residual], [f"{i}.h2", f"{i}.r"], {"weight": norm}, eps=1e-5)
        gate_up = weight(f"{i}.gate_up", 2 * s.ffn, s.hidden, stored=layout)
        add("linear", [f"{i}.h2"], [f"{i}.gu"], {"weight": gate_up}, **rounding)
        add("silu_mul", [f"{i}.gu"], [f"{i}.s"], {})
        down = weight(f"{i}.down", s.hidden, s.ffn, stored=layout)
        add("linear", [f"{i}.s"], [f"{i}.d"], {"weight": down}, **rounding)
        norm = weight(f"{i + 1}.norm", s.hidden)
        residual_out = f"{i}.r2"
        add("rms_norm", [f"{i}.d", f"{i}.r"], [f"{i + 1}.h", residual_out], {"weight": norm},
            eps=1e-5)  # fmt: skip
        residual = residual_out
    add("select_rows", [f"{layers}.h"], ["selected"], {})
    head = weight("head", s.vocab, s.hidden)
    add("linear", ["selected"], ["logits"], {"weight": head})
    return Graph(
        inputs={"token_ids": TensorSpec(("T",), "int32")},
        nodes=tuple(nodes),
        outputs=("logits",),
        weights=weights,
        config={
            "dtype": "bfloat16",
            "hidden_size": s.hidden,
            "num_layers": layers,
            "num_heads": s.heads,
            "num_kv_heads": s.kv_heads,
            "head_dim": s.head_dim,
            "vocab_size": s.vocab,
            "max_position_embeddings": 131_072,
            **({"kv_cache": kv_cache} if kv_cache else {}),
        },
    )


# Layout of the linears and what rounds their inputs, by scheme.
QUANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("plain", {}),
    "fp8": ("fp8_channel", {}),
    "fp8-static": ("fp8_channel", {"activations": "fp8", "input_scale": 0.02}),
    "int8": ("int8_channel", {}),
    "w8a8-int8": ("int8_channel", {"activations": "int8"}),
    "int4": ("int4_group", {}),
}


def quantized_graph(
    sizes: LlamaSizes, quant: str, num_layers: int | None = None, *, kv_cache: str = ""
) -> Graph:
    """The fused graph of one of QUANTS; `kv_cache` as the graph's config names it."""
    layout, rounding = QUANTS[quant]
    return llama_graph(sizes, layout, num_layers, rounding=rounding, kv_cache=kv_cache)


def random_weights(graph: Graph, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Packed tensors on the GPU, as an engine stores them, drawn so that activations keep a steady size."""
    generator = torch.Generator("cuda").manual_seed(seed)
    packed = {}
    for name, spec in graph.weights.items():
        if spec.layout == "int4_group":
            packed[name] = _random_int4(spec, generator)
            continue
        values = torch.randn(spec.shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        if len(spec.shape) == 1:
            packed[name] = {"weight": 1 + 0.1 * values}
        elif spec.layout == "plain":
            packed[name] = {"weight": values * spec.shape[1] ** -0.5}
        else:
            stored, most = {
                "fp8_channel": (torch.float8_e4m3fn, 448),
                "int8_channel": (torch.int8, 127),
            }[spec.layout]
            values *= spec.shape[1] ** -0.5
            scale = values.abs().amax(1).float() / most
            quantized = (values.float() / scale[:, None]).round(decimals=0 if most == 127 else 6)
            packed[name] = {"weight": quantized.to(stored), "scale": scale}
        del values
    return packed


def _random_int4(spec: WeightSpec, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Even nibbles, whose deviation is 4.6 levels."""
    num_rows, num_columns = spec.shape
    groups = (num_rows, num_columns // spec.group_size)
    step = num_columns**-0.5 / 4.6
    nibbles = (num_rows, num_columns // 2)
    draw = {"generator": generator, "device": "cuda"}
    return {
        "weight": torch.randint(256, nibbles, dtype=torch.uint8, **draw),  # type: ignore[call-overload]
        "scale": (step * (0.5 + torch.rand(groups, **draw))).bfloat16().float(),  # type: ignore[call-overload]
        "zero": (step * torch.rand(groups, **draw)).bfloat16().float(),  # type: ignore[call-overload]
    }


def as_read(
    graph: Graph, packed: dict[str, dict[str, torch.Tensor]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Packed tensors as kernels read them, on their device."""
    return {name: arranged(spec, packed[name]) for name, spec in graph.weights.items()}


def dense(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fp32 values that a packed weight stands for."""
    if "zero" in packed:
        return LAYOUTS["int4_group"].unpack(packed)
    weight = packed["weight"].float()
    return weight * packed["scale"][:, None] if "scale" in packed else weight


def read_bytes(spec: WeightSpec, packed: dict[str, torch.Tensor]) -> int:
    """Bytes of a weight as kernels read it: of int4 a group's scale and zero are bf16 there, and fp32 where stored."""
    if is_arranged(spec):
        return packed["weight"].nbytes + 4 * packed["scale"].numel()
    return sum(tensor.nbytes for tensor in packed.values())


def weight_bytes(graph: Graph, packed: dict[str, dict[str, torch.Tensor]]) -> int:
    """Bytes that one decode step must read: all but the embedding table."""
    return sum(
        read_bytes(graph.weights[name], roles) for name, roles in packed.items() if name != "embed"
    )


def reference_logits(
    graph: Graph, packed: dict[str, dict[str, torch.Tensor]], token_ids: torch.Tensor,
    sizes: LlamaSizes,
) -> torch.Tensor:  # fmt: skip
    """Logits of one sequence's last position, fp32 arithmetic from the same stored weights."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * dense(packed[name])

    length, s = token_ids.shape[0], sizes
    angles = torch.outer(
        torch.arange(length, dtype=torch.float64), torch.tensor(inv_freq(s)).double()
    )
    cos, sin = angles.cos().float().cuda()[:, None], angles.sin().float().cuda()[:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = dense(packed["embed"])[token_ids.long()]
    for i in range(int(str(graph.config["num_layers"]))):
        qkv = norm(x, f"{i}.norm") @ dense(packed[f"{i}.qkv"]).t()
        qkv = qkv.view(length, -1, s.head_dim)
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
        attended = torch.nn.functional.scaled_dot_product_attention(
            turn(q).transpose(0, 1), turn(k).transpose(0, 1), v.transpose(0, 1),
            is_causal=True, enable_gqa=True,
        )  # fmt: skip
        x = x + attended.transpose(0, 1).reshape(length, -1) @ dense(packed[f"{i}.o"]).t()
        h = norm(x, f"{i}.norm2") @ dense(packed[f"{i}.gate_up"]).t()
        gate, up = h.chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ dense(packed[f"{i}.down"]).t()
    return norm(x[-1], f"{graph.config['num_layers']}.norm") @ dense(packed["head"]).t()
