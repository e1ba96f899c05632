"""Every way to name a model, and one clear line for everything that can be wrong with one."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from compiler_service.builder import BuildRequest, build
from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer
from compiler_service.checkpoints.checkpoint import FILE_NAMES
from compiler_service.checkpoints.digest import (
    FileHashes,
    known_model_digest,
    model_digest,
    verify_unchanged,
)
from compiler_service.checkpoints.hub import FETCHED, NOT_FETCHED, failure_of
from compiler_service.checkpoints.sample import SAMPLES
from compiler_service.checkpoints.sources import SOURCES, open_checkpoint
from compiler_service.models import parameter_shapes
from compiler_service.planning import plan
from compiler_service.resolve import resolve
from compiler_service.weight_table import require_tied_head
from shared.engine import EngineKey, QuantConfig
from shared.errors import (
    InvalidField,
    InvalidModel,
    MillraceError,
    ModelChanged,
    ModelNotFound,
    UnsupportedModel,
)
from shared.store.local import LocalStore
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


def _edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


DOWN = "model.layers.1.mlp.down_proj.weight"
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
        lambda f: _edit_tensors(f, lambda t: t.update({DOWN: t[DOWN].double()})),
        1,
        InvalidModel,
        f"{DOWN} has dtype F64",
    ),
    "head missing where it is not tied": (
        lambda f: _edit_tensors(f, lambda t: t.pop("lm_head.weight")),
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
        lambda f: _edit_tensors(f, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
        1,
        InvalidModel,
        f"{DOWN} has dtype I8",
    ),
    "tensor missing": (
        lambda f: _edit_tensors(f, lambda t: t.pop(DOWN)),
        1,
        InvalidModel,
        f"tensor {DOWN} is missing",
    ),
    "tensor left over": (
        lambda f: _edit_tensors(f, lambda t: t.update({"extra": torch.ones(2)})),
        1,
        InvalidModel,
        "tensor extra is left over",
    ),
    "config says another size": (
        lambda f: _edit_config(f, intermediate_size=130),
        1,
        InvalidModel,
        "has shape [128, 64] and config.json implies [130, 64]",
    ),
    "config says more layers": (
        lambda f: _edit_config(f, num_hidden_layers=3),
        1,
        InvalidModel,
        "9 tensors, such as model.layers.2.",
    ),
    "architecture": (
        lambda f: _edit_config(f, architectures=["Gemma9ForCausalLM"]),
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
    _edit_tensors(
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

    _edit_tensors(folder, add_head)
    resolved = resolve(str(folder), ["cpu"], QuantConfig("bf16"), "tiny", tmp_path / "cache")
    request = BuildRequest(str(folder), resolved.keys["cpu"], "tiny", tmp_path / "cache")
    store = LocalStore(tmp_path / "store")
    with pytest.raises(InvalidModel, match=r"lm_head.weight differs .* tie_word_embeddings to fal"):
        build(request, store, lambda progress: None)
    assert not list(store.list())


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


# Law 3, the half that concerns models: digests are honest.


def _digest(folder: Path, cache: Path) -> str:
    return model_digest(open_checkpoint(str(folder)).digest_inputs, FileHashes(cache))


def test_model_digest_stays_when_the_folder_moves(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", num_shards=2)
    before = _digest(folder, tmp_path / "cache")
    shutil.move(folder, tmp_path / "b")
    assert _digest(tmp_path / "b", tmp_path / "other-cache") == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", *FILE_NAMES])
def test_model_digest_changes_with_one_byte(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    before = _digest(folder, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-2 if name.endswith("safetensors") else content.index(b" ")] ^= 3
    if name.endswith(".json"):
        content = bytearray((folder / name).read_bytes() + b" ")
    (folder / name).write_bytes(content)
    assert _digest(folder, tmp_path) != before


def test_folder_of_links_is_the_model_that_they_lead_to(tmp_path: Path) -> None:
    """As the hub's own cache keeps snapshots."""
    folder = write_checkpoint(tmp_path / "blobs", num_shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert _digest(tmp_path / "snapshot", tmp_path) == _digest(folder, tmp_path / "other-cache")
    checkpoint = open_checkpoint(str(tmp_path / "snapshot"))
    assert torch.equal(checkpoint.read(DOWN), open_checkpoint(str(folder)).read(DOWN))


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", num_shards=2)
    inputs = open_checkpoint(str(folder)).digest_inputs
    read: list[int] = []
    assert known_model_digest(inputs, FileHashes(tmp_path)) is None
    digest = model_digest(inputs, FileHashes(tmp_path), read.append)
    assert sum(read) == sum(path.stat().st_size for path in folder.iterdir())
    assert known_model_digest(inputs, FileHashes(tmp_path)) == digest
    assert model_digest(inputs, FileHashes(tmp_path), lambda n: pytest.fail("read")) == digest


@pytest.mark.parametrize(
    "content", ['{"cut', "[" * 100_000, "[1]", '{"FILE": 3}'], ids=["cut", "deep", "list", "number"]
)
def test_corrupt_hash_cache_costs_time_and_nothing_else(content: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    before = _digest(folder, tmp_path)
    content = content.replace("FILE", str((folder / "config.json").resolve()))
    (tmp_path / "file_hashes.json").write_text(content)
    assert _digest(folder, tmp_path) == before


def test_change_is_found_although_size_and_time_stay(tmp_path: Path) -> None:
    """The second hashing reads bytes; a clock that was set back deceives only the cache."""
    folder = write_checkpoint(tmp_path / "m")
    inputs, hashes = open_checkpoint(str(folder)).digest_inputs, FileHashes(tmp_path)
    digest = model_digest(inputs, hashes)
    verify_unchanged(inputs, hashes, digest)
    path = folder / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ModelChanged, match=r"model\.safetensors changed"):
        verify_unchanged(inputs, hashes, digest)


def test_hashes_that_are_remembered_side_by_side_are_all_kept(tmp_path: Path) -> None:
    """Each request has a cache object of its own, and all of them one file."""
    files = [tmp_path / f"{number}.bin" for number in range(24)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 100)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: FileHashes(tmp_path / "cache").sha256(file), files))
    known = [FileHashes(tmp_path / "cache").known(file) for file in files]
    assert known == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


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
