"""What an engine carries for tokenizing and chatting is complete, wherever the checkpoint kept it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.engine_files import engine_files
from shared.errors import InvalidModel
from tests.checkpoints import write_checkpoint


def _files(folder: Path, name: str = "", **fields: Any) -> dict[str, bytes]:
    """The engine's files after fields of one of the checkpoint's were replaced; None removes."""
    if name:
        path = folder / name
        content = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return engine_files(open_checkpoint(str(folder)))


def test_chat_template_is_found_in_either_place_and_its_own_file_wins(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    files = _files(folder, "tokenizer_config.json", chat_template="one")
    assert files["chat_template.jinja"] == b"one"
    (folder / "chat_template.jinja").write_text("two")
    assert _files(folder)["chat_template.jinja"] == b"two"


def test_default_of_several_chat_templates_is_the_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    files = _files(folder, "tokenizer_config.json", chat_template=named)
    assert files["chat_template.jinja"] == b"d"
    files = _files(folder, "tokenizer_config.json", chat_template=named[:1])
    assert "chat_template.jinja" not in files
    with pytest.raises(InvalidModel, match="chat_template has no names"):
        _files(folder, "tokenizer_config.json", chat_template=["t"])


def test_ids_that_generation_config_leaves_out_are_those_of_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, eos_token_id=[2, 7], pad_token_id=0)
    given = {"eos_token_id": None, "bos_token_id": 5, "temperature": 0.6}
    files = _files(folder, "generation_config.json", **given)
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 5,
        "eos_token_id": [2, 7],
        "pad_token_id": 0,
        "temperature": 0.6,
    }
    (folder / "generation_config.json").unlink()
    files = _files(folder)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 7]


def test_files_that_are_complete_stay_as_they_are(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    files = _files(folder)
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        assert files[name] == (folder / name).read_bytes()


def test_tokens_that_only_tokenizer_config_knows_are_added_as_transformers_does(
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(tmp_path)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    added = {
        "0": {"content": "<|endoftext|>", "normalized": False, "special": True, **flags},
        str(size): {"content": "<tool>", "normalized": False, "special": True, **flags},
        str(size + 1): {"content": "<note>", "normalized": True, "special": False, **flags},
    }
    files = _files(folder, "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    text = "the <tool> hello<note>!"
    ids = tokenizer.encode(text).ids
    assert {size, size + 1} <= set(ids)
    assert tokenizer.decode(ids) == "the  hello<note>!"
    reference: Any = AutoTokenizer.from_pretrained(folder)
    assert reference(text)["input_ids"] == ids


def test_token_whose_id_is_taken_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    added = {"7": {"content": "<tool>", "special": True}}
    with pytest.raises(InvalidModel, match=r"gives '<tool>' the id 7 and tokenizer\.json"):
        _files(folder, "tokenizer_config.json", added_tokens_decoder=added)
