"""A GGUF file gives the model that it was made from, or one clear line."""

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tokenizers import Tokenizer

from compiler_service.checkpoints.gguf_file import GgufFile
from compiler_service.checkpoints.gguf_header import read_gguf_header
from compiler_service.checkpoints.gguf_tokenizer import PRE_TOKENIZERS
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.models import parameter_shapes
from compiler_service.models.rope import rope_of
from compiler_service.planning import plan
from shared.engine import EngineKey, QuantConfig
from shared.errors import InvalidModel, MillraceError, UnsupportedModel
from tests.checkpoints import LLAMA3_ROPE, write_checkpoint
from tests.compiler_service.gguf_files import gguf_name, write_gguf

FAMILIES = ("llama", "qwen2", "qwen3")


def _pair(tmp_path: Path, family: str, kind: str = "F32") -> tuple[Path, Path]:
    folder = write_checkpoint(tmp_path / "hf", family, seed=3)
    return folder, write_gguf(tmp_path / "model.gguf", folder, kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_float_gguf_is_the_checkpoint_it_was_made_from(family: str, tmp_path: Path) -> None:
    folder, path = _pair(tmp_path, family)
    original, read = open_checkpoint(str(folder)), open_checkpoint(str(path))
    assert dict(read.tensors) == dict(original.tensors)
    for name in original.tensors:
        assert torch.equal(read.read(name), original.read(name)), name
    kept = {"architectures", "head_dim", "rms_norm_eps", "num_key_value_heads", "vocab_size"}
    kept |= {"tie_word_embeddings", "max_position_embeddings", "intermediate_size"}
    assert {k: read.config[k] for k in kept} == {k: original.config[k] for k in kept}
    assert read.config["rope_parameters"]["rope_theta"] == original.config["rope_theta"]
    assert read.float_format == "fp32"


@pytest.mark.parametrize(
    ("kind", "max_error"),
    [("BF16", 0.004), ("F16", 0.0005), ("Q8_0", 0.01), ("Q4_0", 0.12), ("Q4_1", 0.1)],
)
def test_quantized_gguf_is_near_its_checkpoint(kind: str, max_error: float, tmp_path: Path) -> None:
    folder, path = _pair(tmp_path, "llama", kind)
    original, read = open_checkpoint(str(folder)), open_checkpoint(str(path))
    for name in original.tensors:
        expected, found = original.read(name), read.read(name)
        assert found.dtype == read.tensors[name].dtype
        assert float((found.float() - expected).norm() / expected.norm()) <= max_error, name
    assert read.float_format == "bf16"


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "Q5_0", "Q5_1"])
def test_block_type_is_dequantized(kind: str, tmp_path: Path) -> None:
    """Blocks of every kind that is accepted come out as the library that defines them says."""
    kind_id = gguf.GGMLQuantizationType[kind]
    values, block_bytes = gguf.GGML_QUANT_SIZES[kind_id]
    random = np.random.default_rng(4)
    # Bytes below 0x3c: as fp16 scales they are small and finite.
    blocks = random.integers(0, 0x3C, (8, 512 // values * block_bytes), dtype=np.uint8)
    folder = write_checkpoint(tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", folder)
    header = read_gguf_header(path)
    checkpoint = GgufFile(path)
    place = type(next(iter(header.tensors.values())))((8, 512), kind_id, 0, blocks.nbytes)
    checkpoint._data, checkpoint._places = blocks.reshape(-1), {"blocks": place}  # type: ignore[assignment]
    expected = torch.from_numpy(dequantize(blocks, kind_id))
    assert torch.equal(checkpoint.read("blocks"), expected)
    assert expected.shape == (8, 512)


def test_tied_gguf_has_no_head_of_its_own(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", tie_word_embeddings=True)
    read = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", folder)))
    assert read.config["tie_word_embeddings"] is True
    assert set(read.tensors) == set(parameter_shapes(read.config))


def test_tokenizer_of_a_gguf_encodes_as_the_original(tmp_path: Path) -> None:
    folder, path = _pair(tmp_path, "llama")
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = open_checkpoint(str(path)).files
    read = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in ("hello there, the  héllo 你 🙂\n\n x", "<|im_start|>user\nhell<|im_end|>", ""):
        ids = original.encode(text).ids
        assert read.encode(text).ids == ids
        assert read.decode(ids, skip_special_tokens=False) == text
    assert b'"eos_token_id": 2' in files["generation_config.json"]
    assert b"chat_template" in files["tokenizer_config.json"]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizer_splits_without_losing_text(name: str) -> None:
    text = "It's 12345 o'clock,  isn't it?\r\n\tfoo_bar(7) — naïve 你好 👍🏽  "
    pieces = PRE_TOKENIZERS[name].split().pre_tokenize_str(text)
    assert pieces[0][1][0] == 0
    assert all(left[1][1] == right[1][0] for left, right in pairwise(pieces))
    digits = [piece for piece, _ in pieces if any(c.isdigit() for c in piece)]
    longest = {"gpt-2": 6, "llama-bpe": 3, "smollm": 1, "qwen2": 1}[name]
    assert max(map(len, digits)) == longest


def test_heads_may_have_a_length_that_the_hidden_size_does_not_give(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", hidden_size=66, head_dim=16)
    length = {"llama__attention__key_length": 16, "llama__attention__value_length": 16}
    read = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", folder, **length)))
    plan(read, EngineKey("0" * 64, "cpu", QuantConfig("bf16"), "1-test"), "tiny")
    assert read.config["head_dim"] == 16
    bare = {**dict.fromkeys(length), "llama__rope__dimension_count": None}
    with pytest.raises(
        InvalidModel, match="66 values do not divide among 4 heads, and there is no"
    ):
        open_checkpoint(str(write_gguf(tmp_path / "n.gguf", folder, **bare)))


BAD_METADATA: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "family": ({"general__architecture": "mamba"}, UnsupportedModel, "mamba"),
    "vocabulary kind": ({"tokenizer__ggml__model": "llama"}, UnsupportedModel, "tokenizer llama"),
    "pre-tokenizer": ({"tokenizer__ggml__pre": "martian"}, UnsupportedModel, "martian"),
    "missing size": ({"llama__block_count": None}, InvalidModel, "lacks llama.block_count"),
    "text for a size": ({"llama__block_count": "two"}, InvalidModel, "is 'two', no number"),
    "layers that differ": (
        {"llama__attention__head_count_kv": [2, 4]},
        InvalidModel,
        "differs between layers",
    ),
    "merge of no tokens": (
        {"tokenizer__ggml__merges": ["zz yy"]},
        InvalidModel,
        "'zz yy' is not made of tokens",
    ),
    "eos": ({"tokenizer__ggml__eos_token_id": 9999}, InvalidModel, "9999"),
    "vocabulary no list": (
        {"tokenizer__ggml__tokens": 7},
        InvalidModel,
        "no list tokenizer.ggml.tokens",
    ),
    "family no text": ({"general__architecture": [1]}, UnsupportedModel, "GGUF [1]"),
    "one of several files": (
        {"split__count": 3},
        UnsupportedModel,
        "GGUF in 3 files' is not supported; supported: one file; join them",
    ),
    "half of a head turned": (
        {"llama__rope__dimension_count": 8},
        UnsupportedModel,
        "llama.rope.dimension_count 8",
    ),
    "values of another size": (
        {"llama__attention__value_length": 32},
        UnsupportedModel,
        "llama.attention.value_length 32",
    ),
    "no vocabulary": ({"tokenizer__ggml__tokens": None}, InvalidModel, "tokens"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_gguf_metadata_is_refused_with_one_clear_line(case: str, tmp_path: Path) -> None:
    fields, error, what = BAD_METADATA[case]
    folder = write_checkpoint(tmp_path / "hf")
    with pytest.raises(error) as refused:
        open_checkpoint(str(write_gguf(tmp_path / "m.gguf", folder, **fields)))
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


def test_gguf_is_refused_when_cut_anywhere(tmp_path: Path) -> None:
    _, path = _pair(tmp_path, "llama")
    content = path.read_bytes()
    for length in [0, 3, 10, 23, *range(24, len(content), 9973), len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(InvalidModel) as refused:
            open_checkpoint(str(path))
        assert "\n" not in str(refused.value)


def test_gguf_is_refused_cleanly_when_its_head_is_corrupt(tmp_path: Path) -> None:
    """Any byte of the head overwritten: a clear refusal, or a file that is still well-formed."""
    _, path = _pair(tmp_path, "llama")
    content = path.read_bytes()
    refusals = 0
    for position in range(0, 4000, 37):
        path.write_bytes(content[:position] + b"\xff" * 4 + content[position + 4 :])
        try:
            plan(
                open_checkpoint(str(path)), EngineKey("0" * 64, "cpu", QuantConfig("bf16"), "x"), ""
            )
        except MillraceError:
            refusals += 1
    assert refusals > 30


def _header(*entries: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


def _entry(key: str, type_id: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", type_id) + value


def test_gguf_is_refused_when_arrays_are_nested_or_keys_repeated(tmp_path: Path) -> None:
    """Nested deep enough, they would overflow the stack."""
    path = tmp_path / "m.gguf"
    path.write_bytes(_header(_entry("deep", 9, struct.pack("<IQ", 9, 1) * 5000)))
    with pytest.raises(InvalidModel, match="array of arrays"):
        open_checkpoint(str(path))
    path.write_bytes(_header(*[_entry("same", 4, struct.pack("<I", n)) for n in (1, 2)]))
    with pytest.raises(InvalidModel, match="same occurs twice"):
        open_checkpoint(str(path))


def test_gguf_is_refused_when_a_tensor_is_of_no_known_role(tmp_path: Path) -> None:
    _, path = _pair(tmp_path, "llama")
    name = gguf_name("model.layers.0.mlp.up_proj.weight").encode()
    content = path.read_bytes().replace(
        struct.pack("<Q", len(name)) + name, struct.pack("<Q", len(name)) + b"blk.0.ffn_xx.weight"
    )
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"no known role, blk\.0\.ffn_xx\.weight"):
        open_checkpoint(str(path))


def test_scaling_factors_in_a_gguf_give_llama3_frequencies(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", rope_scaling=LLAMA3_ROPE)
    config = open_checkpoint(str(folder)).config
    scaled, plain = (rope_of(c, 16).inv_freq for c in (config, {**config, "rope_scaling": None}))
    factors = [p / s for p, s in zip(plain, scaled, strict=True)]
    assert max(factors) == 8.0
    path = write_gguf(tmp_path / "m.gguf", folder, rope_factors=factors)
    found = rope_of(open_checkpoint(str(path)).config, 16).inv_freq
    assert found == pytest.approx(scaled, rel=1e-6)


def test_tokenizer_begins_with_bos_when_the_gguf_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", folder, tokenizer__ggml__add_bos_token=True)
    files = open_checkpoint(str(path)).files
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("hello").tokens == ["<|endoftext|>", "hello"]
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]
