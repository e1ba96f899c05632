"""What an engine carries beside its arithmetic: tokenizer, chat template, generation defaults."""

import json
from typing import Any

from compiler_service.checkpoints.checkpoint import Checkpoint
from shared.errors import InvalidModel


def engine_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's files, completed so that a runtime need look in one place for each thing.

    The chat template is always in chat_template.jinja, the stop tokens in generation_config.json.

    Raises:
        InvalidModel: there is no tokenizer.json, or a file is not JSON.
    """
    files = dict(checkpoint.files)
    if "tokenizer.json" not in files:
        raise InvalidModel(problem="tokenizer.json is missing; convert the tokenizer and add it")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if name in files:
            _object(name, files[name])
    template = _object("tokenizer_config.json", files.get("tokenizer_config.json", b"{}")).get(
        "chat_template"
    )
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template}
        template = named.get("default")
    if isinstance(template, str):
        files.setdefault("chat_template.jinja", template.encode())
    if "generation_config.json" not in files:
        tokens = {
            name: checkpoint.config[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if checkpoint.config.get(name) is not None
        }
        files["generation_config.json"] = json.dumps(tokens, sort_keys=True).encode()
    return dict(sorted(files.items()))


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise InvalidModel(problem=f"{name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidModel(problem=f"{name} holds no JSON object")
    return value
