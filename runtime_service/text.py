"""A model's text side, from the files in its engine: tokenizer, chat template, end tokens."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from runtime_service.chat_template import SPECIAL_TOKENS, ChatTemplate
from runtime_service.detokenizer import Detokenizer, TokenBytes
from shared.engine import FILE_TYPE, EngineManifest
from shared.errors import InvalidField, InvalidModel
from shared.store import ArtifactStore


class ModelText:
    """Text to tokens and back, for one model. `encode` and `encode_chat` may run in any thread.

    Args:
        files: name to content; `tokenizer.json` is needed, the others are used where present.
    Raises:
        InvalidModel: a file is missing or broken.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if "tokenizer.json" not in files:
            raise InvalidModel(problem="the engine holds no tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        except ValueError as error:
            raise InvalidModel(problem=f"tokenizer.json is broken: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._token_bytes = TokenBytes(self._tokenizer)
        config = _json(files, "tokenizer_config.json")
        self._special_tokens = {
            name: text for name in SPECIAL_TOKENS if (text := _token_text(config.get(name)))
        }
        template = _template_source(files, config)
        self._template = ChatTemplate(template, self._special_tokens) if template else None
        self.end_token_ids = self._end_tokens(files)

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens added as the tokenizer does."""
        return self._tokenizer.encode(text).ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]
    ) -> list[int]:
        """Token ids of the conversation, up to where the model's turn begins.

        Args:
            arguments: as `ChatTemplate.render` takes them.
        Raises:
            InvalidField: the model has no chat template, or it refuses these messages or arguments.
        """
        if self._template is None:
            problem = "the engine's model has no chat template; send text or token ids"
            raise InvalidField(field="start.chat", problem=problem)
        text = self._template.render(messages, arguments)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def detokenizer(self) -> Detokenizer:
        """A fresh stream of text."""
        return Detokenizer(self._token_bytes)

    def _end_tokens(self, files: Mapping[str, bytes]) -> tuple[int, ...]:
        ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            found = _json(files, name).get("eos_token_id")
            named_ids = found if isinstance(found, list) else [] if found is None else [found]
            if not all(isinstance(token_id, int) for token_id in named_ids):
                raise InvalidModel(problem=f"{name} says that eos_token_id is {found!r}")
            ids.update(named_ids)
        named = self._tokenizer.token_to_id(self._special_tokens.get("eos_token", ""))
        if named is not None:
            ids.add(named)
        return tuple(sorted(ids))


def read_model_files(store: ArtifactStore, engine: EngineManifest) -> dict[str, bytes]:
    """The checkpoint's small files that an engine carries, by file name. Blocks."""
    return {
        blob.title.rpartition("/")[2]: b"".join(store.read(blob.digest))
        for blob in engine.layers
        if blob.media_type == FILE_TYPE
    }


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise InvalidModel(problem=f"{name} is broken: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(problem=f"{name} is not a JSON object")
    return value


def _token_text(raw: object) -> str:
    """A special token of tokenizer_config.json, which writes it as text or as an object."""
    return str(raw.get("content", "")) if isinstance(raw, dict) else str(raw or "")


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    found = config.get("chat_template") or _json(files, "chat_template.json").get("chat_template")
    if isinstance(found, list):
        return {row["name"]: str(row["template"]) for row in found}.get("default")
    return None if found is None else str(found)
