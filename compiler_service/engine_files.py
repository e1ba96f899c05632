"""What an engine carries beside its arithmetic: tokenizer, chat template, generation defaults."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from compiler_service.checkpoints.checkpoint import Checkpoint
from shared.errors import InvalidModel

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def engine_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's files, completed so that a runtime need look in one place for each thing.

    The chat template is always in chat_template.jinja, the stop tokens in generation_config.json,
    all tokens in tokenizer.json.

    Raises:
        InvalidModel: there is no tokenizer.json, or a file is not what its name says.
    """
    files = dict(checkpoint.files)
    if "tokenizer.json" not in files:
        raise InvalidModel(problem="tokenizer.json is missing; convert the tokenizer and add it")
    tokenizer_config = _object(files, "tokenizer_config.json")
    added = tokenizer_config.get("added_tokens_decoder") or {}
    added_json = json.dumps(added, sort_keys=True)
    files["tokenizer.json"] = _complete_tokenizer(files["tokenizer.json"], added_json)
    template = _default_template(tokenizer_config.get("chat_template"))
    if template is not None:
        files.setdefault("chat_template.jinja", template.encode())
    _require_text(files, "chat_template.jinja")
    _complete_generation_config(files, checkpoint.config)
    return dict(sorted(files.items()))


# A plan is made for each arch of a request, and again by the build: large ones take a second.
@functools.lru_cache(maxsize=2)
def _complete_tokenizer(content: bytes, added_json: str) -> bytes:
    """tokenizer.json, with the tokens that tokenizer_config.json alone knows.

    Source: transformers, PreTrainedTokenizerFast.__init__, which adds them in order of their ids.
    """
    added = json.loads(added_json)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise InvalidModel(problem=f"tokenizer.json is not a tokenizer ({error})") from error
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [(i, t) for i, t in _tokens_by_id(added) if t.content not in known]
    if not missing:
        return content
    tokenizer.add_tokens([token for _, token in missing])
    for token_id, token in missing:
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            problem = f"tokenizer_config.json gives {token.content!r} the id {token_id}"
            raise InvalidModel(problem=f"{problem} and tokenizer.json {found}")
    return str(tokenizer.to_str()).encode()


def _tokens_by_id(added: object) -> list[tuple[int, AddedToken]]:
    tokens = {}
    for token_id, raw in added.items() if isinstance(added, dict) else [("", None)]:
        token = raw if isinstance(raw, dict) else {}
        if not token_id.isdecimal() or not isinstance(token.get("content"), str):
            problem = "tokenizer_config.json's added_tokens_decoder is not ids and tokens"
            raise InvalidModel(problem=problem)
        flags = {flag: bool(token[flag]) for flag in _TOKEN_FLAGS if flag in token}
        tokens[int(token_id)] = AddedToken(token["content"], **flags)
    return sorted(tokens.items(), key=lambda item: item[0])


def _default_template(raw: object) -> str | None:
    """The chat template, or that called `default` where there are several."""
    if isinstance(raw, list):
        named = {t.get("name"): t.get("template") for t in raw if isinstance(t, dict)}
        if len(named) != len(raw):
            raise InvalidModel(problem="tokenizer_config.json's chat_template has no names")
        raw = named.get("default")
    if raw is not None and not isinstance(raw, str):
        raise InvalidModel(problem=f"tokenizer_config.json's chat_template is {raw!r}, no text")
    return raw


def _complete_generation_config(files: dict[str, bytes], config: Mapping[str, Any]) -> None:
    """Token ids that generation_config.json leaves out are those of config.json."""
    given = _object(files, "generation_config.json")
    missing = {
        name: config[name]
        for name in _TOKEN_IDS
        if given.get(name) is None and config.get(name) is not None
    }
    ends = {**given, **missing}.get("eos_token_id")
    if ends is not None and not _are_token_ids(ends):
        raise InvalidModel(problem=f"eos_token_id is {ends!r}, no token id or list of them")
    if missing or "generation_config.json" not in files:
        complete = json.dumps({**given, **missing}, sort_keys=True)
        files["generation_config.json"] = complete.encode()


def _are_token_ids(value: object) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)


def _require_text(files: Mapping[str, bytes], name: str) -> None:
    try:
        files.get(name, b"").decode()
    except UnicodeDecodeError as error:
        raise InvalidModel(problem=f"{name} is not UTF-8 ({error})") from error


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise InvalidModel(problem=f"{name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidModel(problem=f"{name} holds no JSON object")
    return value
