"""A tokenizer.json out of a GGUF file's vocabulary, for the `tokenizers` library.

GGUF keeps tokens, merges and the *name* of a pre-tokenizer; what the name means is a row here. A
name without a row is refused: a tokenizer that splits differently would serve silent nonsense.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from shared.errors import InvalidModel, UnsupportedModel

# GGUF token types.
_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How text is split before merging.

    Args:
        split: makes the splitter.
        is_nfc: text is brought to Unicode's composed form first.
        ignores_merges: a piece that is a token as a whole is taken whole.
    """

    split: Callable[[], pre_tokenizers.PreTokenizer]
    is_nfc: bool = False
    ignores_merges: bool = False


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level(use_regex=True)])


PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "gpt-2": _PreTokenizer(lambda: _byte_level(use_regex=True)),
    "smollm": _PreTokenizer(_digits_then_bytes),
    "llama-bpe": _PreTokenizer(lambda: _split_by(_LLAMA3_SPLIT), ignores_merges=True),
    "qwen2": _PreTokenizer(lambda: _split_by(_QWEN2_SPLIT), is_nfc=True),
}


def gguf_tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a GGUF file.

    Raises:
        UnsupportedModel: the vocabulary is of a kind without a row here.
        InvalidModel: tokens, types or merges contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind != "gpt2":
        raise UnsupportedModel(architecture=f"GGUF tokenizer {kind}", known="gpt2 (byte-level BPE)")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise InvalidModel(problem=f"{len(tokens)} tokens and {len(types)} token types")
    special = _special_tokens(metadata, tokens)
    tokenizer = _tokenizer(metadata, tokens, types)
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        tokenizer.post_processor = _begin_with(special["bos_token"], tokenizer)
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template := metadata.get("tokenizer.chat_template"):
        tokenizer_config["chat_template"] = template
    generation_config = {
        f"{role}_token_id": metadata[f"tokenizer.ggml.{role}_token_id"]
        for role in ("bos", "eos")
        if f"{role}_token" in special
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": _json(tokenizer_config),
        "generation_config.json": _json(generation_config),
    }


def _tokenizer(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    row = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if row is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedModel(architecture=f"GGUF pre-tokenizer {name}", known=known)
    merges = [tuple(m.split(" ", 1)) for m in _list(metadata, "tokenizer.ggml.merges", str)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise InvalidModel(problem=f"{len(tokens) - len(vocab)} tokens occur twice")
    for merge in merges:
        if len(merge) != 2 or not all(p in vocab for p in (*merge, "".join(merge))):
            raise InvalidModel(problem=f"the merge {' '.join(merge)!r} is not made of tokens")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=row.ignores_merges))
    if row.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = row.split()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise InvalidModel(problem=f"{key}_token_id {token_id} is not among the tokens")
        special[f"{role}_token"] = tokens[token_id]
    return special


def _begin_with(bos_token: str, tokenizer: Tokenizer) -> TemplateProcessing:
    bos_id = tokenizer.token_to_id(bos_token)
    return TemplateProcessing(
        single=f"{bos_token} $A",
        pair=f"{bos_token} $A {bos_token} $B",
        special_tokens=[(bos_token, bos_id)],
    )


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise InvalidModel(problem=f"the GGUF file has no list {key} of {kind.__name__}")
    return value


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
