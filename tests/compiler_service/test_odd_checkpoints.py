"""Any field of a checkpoint's files may be nonsense: a clear refusal or a good plan, never a crash."""

import json
from pathlib import Path
from typing import Any

import pytest

from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.planning import plan
from shared.engine import EngineKey, QuantConfig
from shared.errors import MillraceError
from tests.checkpoints import ARCHITECTURES, LLAMA3_ROPE, tiny_config, write_checkpoint
from tests.compiler_service.gguf_files import write_gguf
from tests.compiler_service.quantized_folders import awq, compressed_packed, gptq, write_quantized

KEY = EngineKey("0" * 64, "cpu", QuantConfig("int8"), "1-test")
ODD: list[Any] = [
    None, True, -1, 0, 1, 7, 10**30, 0.5, float("nan"), float("inf"), "", "text", [], [1, "a"],
    [[1]], {}, {"a": 1}, {"": [None]},
]  # fmt: skip
FIELDS = {
    "llama": ["rope_scaling", "rope_parameters", "partial_rotary_factor", "mlp_bias"],
    "mistral": ["sliding_window"],
    "qwen2": ["layer_types", "max_window_layers"],
    "qwen3": ["layer_types"],
}


def _is_refused(uri: Path | str) -> bool:
    """Claims that the checkpoint is refused, in one line."""
    try:
        plan(open_checkpoint(str(uri)), KEY, "odd")
    except MillraceError as error:
        return len(str(error).splitlines()) == 1
    return False


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_config_field_may_be_anything(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", family)
    config = tiny_config(family)
    refused = set()
    for field in (*config, *FIELDS[family]):
        for value in ODD:
            (folder / "config.json").write_text(json.dumps({**config, field: value}))
            if _is_refused(folder):
                refused.add(field)
    assert {"architectures", "vocab_size", "hidden_size", "rms_norm_eps", "rope_theta"} <= refused


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "linear", "dynamic"])
def test_rope_parameter_may_be_anything(rope_type: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    config = tiny_config("llama")
    good = {**LLAMA3_ROPE, "rope_type": rope_type}
    more = ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "rope_theta"]
    for field in (*good, *more):
        for value in ODD:
            scaling = {**good, field: value}
            (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
            _is_refused(folder)
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": good}))
    assert not _is_refused(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_field_of_a_side_file_may_be_anything(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    good = json.loads((folder / name).read_text())
    for field in (*good, "added_tokens_decoder"):
        for value in ODD:
            (folder / name).write_text(json.dumps({**good, field: value}))
            _is_refused(folder)
    (folder / name).write_text(json.dumps(good))
    assert not _is_refused(folder)


@pytest.mark.parametrize("kind", [awq, gptq, compressed_packed], ids=lambda kind: kind.__name__)
def test_field_of_a_quantization_config_may_be_anything(kind: Any, tmp_path: Path) -> None:
    settings, quantize_one = kind()
    write_quantized(tmp_path / "m", settings, quantize_one)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    more = ["checkpoint_format", "version", "sparsity_config", "dynamic", "is_marlin_format"]
    for field in (*settings, *more):
        for value in ODD:
            odd = {**config, "quantization_config": {**settings, field: value}}
            path.write_text(json.dumps(odd))
            _is_refused(tmp_path / "m")
    path.write_text(json.dumps(config))
    assert not _is_refused(tmp_path / "m")


def test_metadata_of_a_gguf_may_be_anything(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    keys = [
        "general.architecture", "general.alignment", "llama.block_count", "llama.context_length",
        "llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count",
        "llama.attention.head_count_kv", "llama.attention.key_length", "llama.vocab_size",
        "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
        "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.dimension_count",
        "llama.rope.scaling.original_context_length", "tokenizer.ggml.model",
        "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.add_bos_token", "tokenizer.chat_template", "split.count",
    ]  # fmt: skip
    values = [None, True, 0, 1, 7, 2**31, 0.5, float("nan"), "", "yarn", "text", [1, 2], ["a", "b"]]
    for key in keys:
        for value in values:
            field = {key.replace(".", "__"): value}
            _is_refused(write_gguf(tmp_path / "m.gguf", folder, **field))
    assert not _is_refused(write_gguf(tmp_path / "m.gguf", folder))
