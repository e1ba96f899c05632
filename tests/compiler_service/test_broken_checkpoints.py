"""One clear line for everything that can be wrong with a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compiler_service.builder import BuildRequest, build
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.planning import plan
from compiler_service.resolve import resolve
from compiler_service.weight_table import require_tied_head
from shared.arch import ARCHES
from shared.engine import EngineKey, QuantConfig
from shared.errors import InvalidModel, MillraceError, ModelNotFound, UnsupportedModel
from shared.store.local import LocalStore
from tests.checkpoints import DOWN, edit_config, edit_tensors, write_checkpoint

KEY = EngineKey("0" * 64, "cpu", QuantConfig("bf16"), "1-test")


def _truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"

# What is done to a good checkpoint, in how many shards, the error, and what its line says.
BROKEN: dict[str, tuple[Callable[[Path], object], int, type[MillraceError], str]] = {
    "shard missing": (lambda f: (f / SHARD).unlink(), 3, InvalidModel, f"shard {SHARD} is missing"),
    "shard truncated": (lambda f: _truncate(f / SHARD, 100), 3, InvalidModel, f"{SHARD} is trunc"),
    "shard empty": (lambda f: (f / SHARD).write_bytes(b""), 3, InvalidModel, f"{SHARD} is trunc"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 1, ModelNotFound, "neither"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), 3, InvalidModel, "not JSON"),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), 3, InvalidModel, "no weight_map"),
    "index leaves the folder": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"x": "../x"}}'),
        3,
        InvalidModel,
        "'../x' outside the folder",
    ),
    "tensor not where the index says": (
        lambda f: (f / INDEX).write_text(
            (f / INDEX).read_text().replace(f'"{DOWN}"', f'"{DOWN}x"')
        ),
        3,
        InvalidModel,
        f"places {DOWN}x in",
    ),
    "index names no file": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"x": 5}}'),
        3,
        InvalidModel,
        "names 5 outside the folder",
    ),
    "tensor in two shards": (
        lambda f: (f / SHARD).write_bytes((f / SHARD.replace("2-of", "1-of")).read_bytes()),
        3,
        InvalidModel,
        "is in both model-00001-of-00003.safetensors and model-00002",
    ),
    "shard is a dead link": (
        lambda f: ((f / SHARD).unlink(), (f / SHARD).symlink_to(f / "gone")),
        3,
        InvalidModel,
        f"shard {SHARD} is missing",
    ),
    "doubles": (
        lambda f: edit_tensors(f, lambda t: t.update({DOWN: t[DOWN].double()})),
        1,
        InvalidModel,
        f"{DOWN} has dtype F64",
    ),
    "head missing where it is not tied": (
        lambda f: edit_tensors(f, lambda t: t.pop("lm_head.weight")),
        1,
        InvalidModel,
        "tensor lm_head.weight is missing",
    ),
    "tokenizer of nothing": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        1,
        InvalidModel,
        "tokenizer.json is not a tokenizer",
    ),
    "chat template not text": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        1,
        InvalidModel,
        "chat_template.jinja is not UTF-8",
    ),
    "end of text no id": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        1,
        InvalidModel,
        "eos_token_id is '</s>', no token id",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), 1, ModelNotFound, "config.json"),
    "config not JSON": (
        lambda f: (f / "config.json").write_text("nope"),
        1,
        InvalidModel,
        "not JSON",
    ),
    "config nested too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        1,
        InvalidModel,
        "config.json is not JSON",
    ),
    "generation_config nested too deep": (
        lambda f: (f / "generation_config.json").write_text("[" * 100_000),
        1,
        InvalidModel,
        "generation_config.json is not JSON",
    ),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), 1, InvalidModel, "object"),
    "dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
        1,
        InvalidModel,
        f"{DOWN} has dtype I8",
    ),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(DOWN)),
        1,
        InvalidModel,
        f"tensor {DOWN} is missing",
    ),
    "tensor left over": (
        lambda f: edit_tensors(f, lambda t: t.update({"extra": torch.ones(2)})),
        1,
        InvalidModel,
        "tensor extra is left over",
    ),
    "config says another size": (
        lambda f: edit_config(f, intermediate_size=130),
        1,
        InvalidModel,
        "has shape [128, 64] and config.json implies [130, 64]",
    ),
    "config says more layers": (
        lambda f: edit_config(f, num_hidden_layers=3),
        1,
        InvalidModel,
        "9 tensors, such as model.layers.2.",
    ),
    "architecture": (
        lambda f: edit_config(f, architectures=["Gemma9ForCausalLM"]),
        1,
        UnsupportedModel,
        "Gemma9ForCausalLM",
    ),
    "tokenizer missing": (
        lambda f: (f / "tokenizer.json").unlink(),
        1,
        InvalidModel,
        "tokenizer.json is missing",
    ),
    "tokenizer_config not JSON": (
        lambda f: (f / "tokenizer_config.json").write_text("{{"),
        1,
        InvalidModel,
        "tokenizer_config.json is not JSON",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused_with_one_clear_line(case: str, tmp_path: Path) -> None:
    break_it, num_shards, error, what = BROKEN[case]
    folder = write_checkpoint(tmp_path / "tiny", num_shards=num_shards)
    plan(open_checkpoint(str(folder)), KEY, "tiny")
    break_it(folder)
    with pytest.raises(error) as refused:
        plan(open_checkpoint(str(folder)), KEY, "tiny")
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


def test_tied_head_that_is_stored_again_is_accepted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_tensors(
        folder,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    checkpoint = open_checkpoint(str(folder))
    graph = plan(checkpoint, KEY, "tiny").graph
    assert "lm_head" not in graph.weights
    require_tied_head(graph, checkpoint)


@pytest.mark.parametrize("row", [0, 319])
def test_tied_head_that_is_stored_with_other_values_is_refused(row: int, tmp_path: Path) -> None:
    """Leaving it out, as the config says, would be another model; transformers unties it."""
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=True)

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][row, 0] += 1

    edit_tensors(folder, add_head)
    resolved = resolve(str(folder), ["cpu"], QuantConfig("bf16"), "tiny", tmp_path / "cache")
    request = BuildRequest(str(folder), resolved.keys["cpu"], "tiny", tmp_path / "cache")
    store = LocalStore(tmp_path / "store")
    with pytest.raises(InvalidModel, match=r"lm_head.weight differs .* tie_word_embeddings to fal"):
        build(request, store, lambda progress: None)
    assert not list(store.list())


@pytest.mark.parametrize("arch", [arch.name for arch in ARCHES.values() if arch.is_gpu])
def test_heads_wider_than_a_gpus_attention_takes_are_refused_there_alone(
    arch: str, tmp_path: Path
) -> None:
    key = replace(KEY, arch=arch)
    plan(open_checkpoint(str(write_checkpoint(tmp_path / "wide", head_dim=256))), key, "wide")
    wider = open_checkpoint(str(write_checkpoint(tmp_path / "wider", head_dim=258)))
    with pytest.raises(UnsupportedModel) as refused:
        plan(wider, key, "wider")
    assert f"head_dim 258 on {arch}" in str(refused.value)
    assert "at most 256 on a GPU, any on cpu" in str(refused.value)
    plan(wider, KEY, "wider")
