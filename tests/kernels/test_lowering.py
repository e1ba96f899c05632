"""Every family and GPU scheme lowers to launches that agree with their kernels, at every size of step."""

from dataclasses import replace

import pytest

from bench.gpu_models import MODELS, llama_graph
from compiler_service.models import lower_model
from compiler_service.passes import run_passes
from compiler_service.quantization import SCHEMES
from kernels.launch import KvCache, Launch, MatMul, Sizes, Temporary, Value
from kernels.lowering import lower, variants
from kernels.ops import OPS
from kernels.regimes import DECODE_REGIMES, REGIMES, Regime
from kernels.variant import KernelVariant
from shared.arch import ARCHES, Arch
from shared.engine import QuantConfig
from shared.ir import Graph
from tests.checkpoints import tiny_config

GPU_ARCHES = [arch for arch in ARCHES.values() if arch.is_gpu]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def _graph(family: str, scheme: str, **sizes: object) -> Graph:
    fused = run_passes(lower_model(tiny_config(family, **sizes), "bfloat16"), OPS)
    group = 32 if SCHEMES[scheme].group_sizes else 0
    return SCHEMES[scheme].apply(fused, QuantConfig(scheme, group))


def test_layers_of_equal_shapes_share_their_variants() -> None:
    """A model is lowered when its engine starts: what a layer costs there is counted in layers."""
    num_variants = set()
    for num_layers in (2, 8):
        graph = llama_graph(MODELS["tiny"], "plain", num_layers)
        steps = lower(graph, ARCHES["sm_90"], REGIMES[0])
        linears = [s.variant for s in steps if isinstance(s, Launch) and s.variant.op == "linear"]
        assert len(linears) == 4 * num_layers + 1
        num_variants.add(len({id(variant) for variant in linears}))
    assert len(num_variants) == 1


def _names(variant: KernelVariant) -> set[str]:
    return {argument.name for argument in variant.arguments}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arch", GPU_ARCHES, ids=lambda arch: arch.name)
def test_every_scheme_of_an_arch_lowers(arch: Arch, family: str) -> None:
    """Each value is written before it is read, and each launch passes what its kernel takes."""
    for name, scheme in SCHEMES.items():
        if not scheme.runs_on(arch):
            continue
        graph = _graph(family, name, tie_word_embeddings=name == "int8")
        for regime in REGIMES:
            written: set[str] = set()
            for step in lower(graph, arch, regime):
                if isinstance(step, MatMul):
                    assert step.x.name in written
                    written.add(step.out.name)
                    continue
                assert len(step.operands) == len(step.variant.arguments)
                outputs = {a.name for a in step.variant.arguments if "out" in a.name}
                for argument, operand in zip(step.variant.arguments, step.operands, strict=True):
                    if isinstance(operand, Value | Temporary) and argument.name in (
                        "x", "q", "residual", "qkv", "squares", "gate_up",
                    ):  # fmt: skip
                        assert operand.name in written, (
                            f"{operand.name} is read before it is written"
                        )
                    elif isinstance(operand, Value | Temporary):
                        written.add(operand.name)
                assert outputs, f"{step.variant.key} writes nothing"
                grids = step.grid(Sizes(3, 3, 3)), step.grid(Sizes(8192, 3, 8192))
                assert any(all(n > 0 for n in grid) for grid in grids)
            assert set(graph.outputs) <= written


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_begins_with_the_kernel_that_waits_first(family: str) -> None:
    """The others read lengths, slots and older keys before they wait: the embedding does not let them start earlier."""
    for regime in REGIMES:
        first = lower(_graph(family, "bf16"), ARCHES["sm_90"], regime)[0]
        assert isinstance(first, Launch)
        assert first.variant.kernel == "embedding"


def test_few_tokens_launch_five_kernels_a_layer() -> None:
    """Norms, residual adds, RoPE, KV writes and silu ride on the linears."""
    graph = llama_graph(MODELS["tiny"], "plain", num_layers=3)
    for regime in DECODE_REGIMES[:-1]:
        steps = lower(graph, ARCHES["sm_90"], regime)
        assert len(steps) == 5 * 3 + 2, "an embedding, five a layer, the LM head"


def test_arch_without_pdl_uses_none() -> None:
    graph = llama_graph(MODELS["tiny"], "int8_channel", num_layers=1)
    old, new = (variants(graph, ARCHES[name]) for name in ("sm_80", "sm_90"))
    assert not any(v.has_pdl for v in old)
    # Kernels around the forward pass wait for all that was launched before them.
    around = {"step_inputs", "sampling", "logits", "truncation"}
    assert all(v.has_pdl == (v.op not in around) for v in new)


def test_fp8_steps_of_any_number_of_tokens_use_torch_products() -> None:
    graph = llama_graph(MODELS["tiny"], "fp8_channel", num_layers=1)
    for regime in REGIMES:
        steps = lower(graph, ARCHES["sm_90"], regime)
        assert any(isinstance(s, MatMul) for s in steps) == (regime.max_tokens == 0)


@pytest.mark.parametrize("scheme", ["fp8", "w8a8-int8"])
def test_steps_of_one_token_alone_round_no_activations(scheme: str) -> None:
    """One token waits for the weights, whatever it is multiplied in."""
    graph = _graph("llama", scheme)
    linears = sum(node.op == "linear" for node in graph.nodes)
    for regime in REGIMES:
        steps = lower(graph, ARCHES["sm_90"], regime)
        launched = [s.variant for s in steps if isinstance(s, Launch)]
        rounding = [v for v in launched if v.kernel == "quantize_rows" or "scale_out" in _names(v)]
        # The head of w8a8-int8 multiplies what it is given.
        expected = 0 if regime.max_tokens == 1 else linears - (scheme == "w8a8-int8")
        assert len(rounding) == expected


def test_librarys_products_add_the_residual_in_place() -> None:
    """A norm then reads the sum alone; a product of e4m3 cannot add, and leaves it to the norm."""
    for layout, products in (("plain", 4), ("fp8_channel", 0)):
        graph = llama_graph(MODELS["tiny"], layout, num_layers=2)
        steps = lower(graph, ARCHES["sm_90"], Regime(0, 0))
        adding = [s for s in steps if isinstance(s, MatMul) and s.adds]
        assert [s.weight for s in adding] == ["0.o", "0.down", "1.o", "1.down"][:products]
        norms = [s for s in steps if isinstance(s, Launch) and s.variant.op == "rms_norm"]
        reading = [s for s in norms if "residual" in _names(s.variant)]
        assert len(reading) == 4 - products
        for product in adding:
            assert any(product.out in norm.operands for norm in norms)


def test_int8_weights_are_widened_once_for_many_rows() -> None:
    """The library then multiplies; by the head's own kernel, whose rows are few, and by all kernels of fewer rows."""
    graph = llama_graph(MODELS["tiny"], "int8_channel", num_layers=1)
    head = replace(graph.weights["head"], layout="int8_channel")
    graph = replace(graph, weights={**graph.weights, "head": head})
    steps = lower(graph, ARCHES["sm_90"], Regime(0, 0))
    products = {s.weight: s for s in steps if isinstance(s, MatMul)}
    assert set(products) == {"0.qkv", "0.o", "0.gate_up", "0.down"}
    for rows in (1, 128, 129, 512):
        sizes = Sizes(rows, rows, rows)
        launched = [
            s.variant.kernel for s in steps if isinstance(s, Launch) and s.grid(sizes)[0] > 0
        ]
        widened = 4 if rows > 128 else 0
        assert launched.count("dense_int8") == widened
        assert launched.count("linear_few") == 5 - widened
        assert sum(rows >= s.least_rows for s in products.values()) == widened
        if widened:
            assert launched.index("dense_int8") < launched.index("qkv_rope_write")
    for product in products.values():
        assert product.dense is not None
    # Tuning times a site's launches in one step, in which these need not run.
    chosen = [s.site for s in steps if isinstance(s, Launch) and s.site]
    assert [site.n for site in chosen if site.op == "linear"] == [head.shape[0]]


def test_norms_and_silu_leave_e4m3_where_only_fp8_products_read_them() -> None:
    """The passes that are left quantize what attention leaves; a reader that is kept in bf16 wants the row itself."""
    graph = llama_graph(MODELS["tiny"], "fp8_channel", num_layers=2)
    many = Regime(0, 0)

    def quantized(graph: Graph) -> list[str]:
        return [
            step.operands[0].name
            for step in lower(graph, ARCHES["sm_90"], many)
            if isinstance(step, Launch)
            and step.variant.kernel == "quantize_rows"
            and isinstance(step.operands[0], Value)
        ]

    assert quantized(graph) == ["0.a", "1.a.rows"]
    kept = replace(graph.weights["1.gate_up"], layout="plain")
    mixed = replace(graph, weights={**graph.weights, "1.gate_up": kept})
    products = {s.weight: s for s in lower(mixed, ARCHES["sm_90"], many) if isinstance(s, MatMul)}
    assert products["1.gate_up"].x == Value("1.h2")
    assert products["1.gate_up"].x_scale is None
    assert quantized(mixed) == ["0.a", "1.a.rows"]


def test_layers_share_their_variants() -> None:
    """The second layer's first norm rides on a linear, not on the embedding; later layers add nothing."""
    arch = ARCHES["sm_90"]
    few, many = (variants(llama_graph(MODELS["tiny"], "plain", n), arch) for n in (2, 5))
    assert few == many


def test_unfused_graph_is_refused_by_op_name() -> None:
    graph = lower_model(tiny_config("llama"), "bfloat16")
    with pytest.raises(AssertionError, match="has no GPU form; run the fusing passes"):
        lower(graph, ARCHES["sm_90"], Regime(1, 1))


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_eight_bit_cache_is_written_by_a_kernel_that_sees_whole_heads(kv_cache: str) -> None:
    """A linear's program holds a part of a head, which has one scale: it cannot write the cache."""
    graph = llama_graph(MODELS["tiny"], "plain", 1)
    graph = replace(graph, config={**graph.config, "kv_cache": kv_cache})
    steps = lower(graph, ARCHES["sm_90"], Regime(1, 1))
    launches = [s for s in steps if isinstance(s, Launch)]
    assert [s.variant.kernel for s in launches][1:4] == [
        "linear_one",
        "qkv_rope_write",
        "attention",
    ]
    for launch in launches[2:4]:
        parts = [o.part for o in launch.operands if isinstance(o, KvCache)]
        assert parts == [0, 1, 2, 3]
        assert len(launch.operands) == len(launch.variant.arguments)


@pytest.mark.parametrize("kv_cache", ["", "fp8", "int8"])
def test_large_steps_over_codes_attend_in_two_launches(kv_cache: str) -> None:
    """One takes sequences with one query, the other those with several, whose new keys and values come as values from
    the kernel that writes the codes: no sequence is left out, none is computed twice."""
    graph = llama_graph(MODELS["tiny"], "plain", 1, kv_cache=kv_cache)
    steps = lower(graph, ARCHES["sm_90"], Regime(0, 0))
    launches = [s for s in steps if isinstance(s, Launch) and s.variant.op == "attention"]
    taken = [dict(s.variant.constants)["TAKES"] for s in launches]
    assert taken == (["one", "several"] if kv_cache else ["all"])
    (writer,) = (s for s in steps if isinstance(s, Launch) and s.variant.op == "qkv_rope_write")
    new = [
        {
            argument.name: operand
            for argument, operand in zip(s.variant.arguments, s.operands, strict=True)
            if argument.name in ("k_new", "v_new")
        }
        for s in (writer, launches[-1])
    ]
    assert new[0] == new[1]
    assert len(new[0]) == (2 if kv_cache else 0)
    outputs = {operand for s in launches for operand in s.operands if isinstance(operand, Value)}
    assert outputs == {Value("0.q"), Value("0.a")}


def test_launches_carry_their_variant() -> None:
    steps = lower(llama_graph(MODELS["tiny"], "plain", 1), ARCHES["sm_90"], Regime(1, 1))
    assert [s.variant.kernel for s in steps if isinstance(s, Launch)] == [
        "embedding", "linear_one", "attention", "linear_one", "linear_one", "linear_one", "linear_one",
    ]  # fmt: skip
