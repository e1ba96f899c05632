"""Law 3, the half that concerns code: another builder is another key, and only then."""

from compiler_service.fingerprints import (
    _KERNEL_MODULES,
    _WEIGHT_MODULES,
    builder_for,
    weights_part,
)
from shared.arch import ARCHES
from shared.engine import FORMAT_VERSION
from shared.fingerprint import import_closure


def test_arches_share_the_part_of_the_builder_that_makes_weights() -> None:
    builders = {name: builder_for(name) for name in ARCHES}
    assert {weights_part(builder) for builder in builders.values()} == {builders["cpu"]}
    assert len({builder for name, builder in builders.items() if name != "cpu"}) == 1
    assert builders["sm_90"].startswith(f"{builders['cpu']}-")
    assert builders["cpu"].startswith(f"{FORMAT_VERSION}-")


def test_everything_that_makes_weights_counts_and_nothing_that_makes_machine_code() -> None:
    closure = set(import_closure(_WEIGHT_MODULES))
    assert {
        "compiler_service.checkpoints.gguf_file",
        "compiler_service.checkpoints.gguf_tokenizer",
        "compiler_service.checkpoints.quantized_folder",
        "compiler_service.checkpoints.random_model",
        "compiler_service.checkpoints.safetensors_folder",
        "compiler_service.engine_graph",
        "compiler_service.models.decoder",
        "compiler_service.models.rope",
        "compiler_service.passes.join_linears",
        "compiler_service.quantization.scheme",
        "kernels.linear.layouts",
        "shared.ir",
        "shared.weight_layout",
    } <= closure
    assert not {name for name in closure if name.endswith(".triton")}
    assert not {"kernels.aot", "kernels.lowering", "kernels.variant"} & closure


def test_everything_that_makes_machine_code_counts() -> None:
    assert {"kernels.aot", "kernels.lowering", "kernels.variant"} <= set(
        import_closure(_KERNEL_MODULES)
    )
