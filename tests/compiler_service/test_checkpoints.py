"""Every way to name a model, and what is found there."""

import errno
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer
from compiler_service.checkpoints.digest import FileHashes, model_digest
from compiler_service.checkpoints.hub import FETCHED, NOT_FETCHED, failure_of
from compiler_service.checkpoints.sample import SAMPLES
from compiler_service.checkpoints.sources import SOURCES, open_checkpoint
from compiler_service.models import parameter_shapes
from compiler_service.planning import plan
from shared.engine import EngineKey, QuantConfig
from shared.errors import InvalidField, InvalidModel, ModelNotFound
from tests.checkpoints import tiny_config, write_checkpoint

KEY = EngineKey("0" * 64, "cpu", QuantConfig("bf16"), "1-test")


@pytest.mark.parametrize("num_shards", [1, 3])
def test_folder_gives_its_tensors_config_and_files(num_shards: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "qwen3", num_shards=num_shards)
    checkpoint = open_checkpoint(str(folder))
    written: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        written |= load_file(path)
    assert set(checkpoint.tensors) == set(written) == set(parameter_shapes(checkpoint.config))
    for name, tensor in written.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    assert checkpoint.name == "tiny"
    assert checkpoint.config == tiny_config("qwen3")
    assert checkpoint.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "float_format"),
    [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "bf16")],
)
def test_float_format_follows_the_weights(
    dtype: torch.dtype, float_format: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, dtype=dtype)
    assert open_checkpoint(str(folder)).float_format == float_format


def test_file_uri_is_the_path_it_names(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "with space")
    uri = folder.as_uri()
    assert "%20" in uri
    assert open_checkpoint(uri).name == "with space"


NOT_FOUND = {
    "": (InvalidField, "model_uri: it is empty"),
    "/nowhere/at/all": (ModelNotFound, "no such file or folder"),
    "file:///nowhere": (ModelNotFound, "no such file or folder"),
    "org/model": (ModelNotFound, "a model of the Hugging Face hub is hf:org/model"),
    "x" * 300: (ModelNotFound, "no path here"),
    "~nobody-at-all/model": (ModelNotFound, "no such file or folder"),
    "random:~nobody-at-all/model": (ModelNotFound, "no file"),
    "file://[": (InvalidField, "no URI"),
    "ftp://host/model": (InvalidField, "ftp: is no known scheme"),
    "random:/nowhere/config.json?seed=1": (ModelNotFound, "no file /nowhere/config.json"),
    "random:/nowhere/config.json?seed=x": (InvalidField, "'seed=x' should be seed=<number>"),
    "sample:gpt-5": (ModelNotFound, "samples are smollm2-135m"),
    "hf:no-organization@": (ModelNotFound, "hf:no-organization@"),
}


@pytest.mark.parametrize("uri", NOT_FOUND)
def test_model_uri_is_refused_with_one_clear_line(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error, what = NOT_FOUND[uri]
    with pytest.raises(error) as refused:
        open_checkpoint(uri)
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


def test_hub_snapshot_in_the_local_cache_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fetched once needs no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    write_checkpoint(repository / "snapshots" / commit, "mistral")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("hf:org/tiny@v1")
    assert checkpoint.name == "tiny"
    assert checkpoint.config["model_type"] == "mistral"
    with pytest.raises(ModelNotFound, match="hf:org/tiny@v2"):
        open_checkpoint("hf:org/tiny@v2")


def test_weights_are_fetched_from_the_hub_once() -> None:
    """Mistral's repositories hold them twice, Llama's in a folder too; `*` takes slashes there."""
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    wanted = ["config.json", "model.safetensors.index.json", "tokenizer.json", *weights]
    others = ["consolidated.safetensors", "original/consolidated.00.safetensors", "README.md"]
    found = filter_repo_objects(
        [*wanted, *others], allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED
    )
    assert list(found) == wanted


def test_folder_of_neither_kind_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
        open_checkpoint(str(tmp_path))


def test_every_source_and_sample_is_listed() -> None:
    assert set(SOURCES) == {"file", "hf", "sample", "random"}
    assert set(SAMPLES) == {"smollm2-135m"}


def test_random_model_is_the_same_each_time_and_another_with_another_seed(tmp_path: Path) -> None:
    path = tmp_path / "big" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(tiny_config("qwen2")))
    first, again, other = (open_checkpoint(f"random:{path}?seed={n}") for n in (7, 7, 8))
    assert set(first.tensors) == set(parameter_shapes(first.config))
    for name, info in first.tensors.items():
        tensor = first.read(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, torch.bfloat16)
        assert torch.equal(tensor, again.read(name))
        assert not torch.equal(tensor, other.read(name))
        assert bool(tensor.isfinite().all())
    hashes = FileHashes(tmp_path)
    digests = [model_digest(c.digest_inputs, hashes) for c in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]
    assert first.name == "big-random7"
    assert plan(first, KEY, first.name).read_bytes > 0


def test_random_model_has_rows_of_unit_scale(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama", hidden_size=256)))
    weight = open_checkpoint(f"random:{tmp_path}").read("model.layers.0.mlp.up_proj.weight")
    assert float(weight.float().std()) == pytest.approx(1 / 16, rel=0.05)


def test_random_model_is_refused_when_its_vocabulary_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama", vocab_size=100)))
    with pytest.raises(InvalidModel, match="vocab_size 100 has no room"):
        open_checkpoint(f"random:{tmp_path}?seed=1")


def test_byte_tokenizer_gives_back_any_text() -> None:
    text = "<|im_start|>the hello 你好\x00\n\n 🙂 the<|im_end|>"
    tokenizer = byte_tokenizer()
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert encoded.ids[0] == 1
    assert "Ġhello" not in encoded.tokens


@pytest.mark.parametrize(
    ("error", "reason", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "DISK_FULL", "No room left"),
        (OSError(errno.EROFS, "Read-only file system"), "MODEL_NOT_FOUND", "Read-only file system"),
        (OSError("no connection"), "MODEL_NOT_FOUND", "cannot be reached"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "MODEL_NOT_FOUND", "be reached"),
    ],
    ids=["full disk", "read-only disk", "hub's own", "network"],
)
def test_only_the_network_is_told_as_the_hub_not_being_reached(
    error: OSError, reason: str, said: str
) -> None:
    failure = failure_of("org/model", error)
    assert failure.reason == reason
    assert said in str(failure)
