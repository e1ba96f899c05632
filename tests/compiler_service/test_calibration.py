"""Calibration: which tokens are looked at, and what is said of a text that cannot be used."""

import hashlib
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compiler_service.builder import BuildRequest, build
from compiler_service.calibration.text import read_calibration_text
from compiler_service.calibration.windows import TextTokenizer, cut_windows
from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer_files
from compiler_service.quantization import SCHEMES
from compiler_service.resolve import resolve
from shared.engine import EngineManifest, QuantConfig
from shared.errors import InvalidField, InvalidModel, ModelChanged, UnsupportedQuant
from shared.store.local import LocalStore
from tests.checkpoints import write_checkpoint
from tests.compiler_service.quantized_engines import (
    LOOSE,
    build_quantized,
    report_of,
    write_uneven_checkpoint,
)

TOKENIZER = TextTokenizer(byte_tokenizer_files(), 320)
TEXT = "".join(f"line {number}: the quick brown fox\n" for number in range(400))


def test_no_window_is_both_measured_and_calibrated_with() -> None:
    windows = cut_windows([TEXT], TOKENIZER, 4096, 2048)
    measured = {tuple(w.token_ids.tolist()) for w in windows.measured}
    calibration = {tuple(w.token_ids.tolist()) for w in windows.calibration}
    assert (len(measured), len(calibration)) == (2, 8)
    assert not measured & calibration
    for window in windows.measured:
        assert window.token_ids[1:].tolist() == window.following[:-1].tolist()


@pytest.mark.parametrize("num_tokens", [513, 514, 768, 1000])
@pytest.mark.parametrize("max_positions", [64, 300])
def test_a_text_that_is_just_long_enough_serves_both(num_tokens: int, max_positions: int) -> None:
    text = "x y " * 400
    while len(TOKENIZER.ids(text)) > num_tokens:
        text = text[:-1]
    assert len(TOKENIZER.ids(text)) == num_tokens
    windows = cut_windows([text], TOKENIZER, max_positions, 100)
    assert windows.measured
    assert windows.calibration
    with pytest.raises(InvalidField, match="at least 513"):
        cut_windows([text[: len(text) // 2]], TOKENIZER, max_positions, 100)


def test_short_contexts_have_short_windows() -> None:
    windows = cut_windows([TEXT], TOKENIZER, 64, 0)
    assert {len(w.token_ids) for w in windows.measured} == {64}
    assert windows.calibration == ()


TOO_SHORT = {
    "empty": ("text.txt", b"", "has 0 tokens"),
    "too short": ("text.txt", b"Hello, world.", "tokens, and at least 256"),
    "no text": ("text.txt", b"\xff\xfe\x00", "not UTF-8"),
    "no json": ("text.jsonl", b'{"text": "a"}\nhello\n', "line 2 of text.jsonl is not JSON"),
    "brackets without end": ("text.jsonl", b"[" * 100_000, "line 1 of text.jsonl is not JSON"),
    "half a character": (
        "text.jsonl",
        b'\n{"text": "a\\ud800"}\n',
        "line 2 of text.jsonl holds half",
    ),
    "a line without end": (
        "text.jsonl",
        b'"' + b"a" * (5 << 20) + b'"',
        "line 1 of text.jsonl is longer",
    ),
    "no string": ("text.jsonl", b'{"text": null}\n', "line 1 of text.jsonl has no string"),
    "binary": ("text.txt", b"ab\0" * 400, "text.txt is no text: character 2 is NUL"),
    "lines in capitals": ("TEXT.JSONL", b"hello\n", "line 1 of TEXT.JSONL is not JSON"),
    "blank lines": ("text.jsonl", b"  \n\n\t\n", "has 0 tokens"),
    "no field": ("text.jsonl", b'{"body": "a"}\n', "line 1 of text.jsonl has no string"),
}


@pytest.mark.parametrize("case", TOO_SHORT)
def test_text_that_cannot_be_used_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, content, what = TOO_SHORT[case]
    folder = write_checkpoint(tmp_path / "tiny")
    (tmp_path / name).write_bytes(content)
    store = LocalStore(tmp_path / "store")
    with pytest.raises(InvalidField) as refused:
        build_quantized(folder, QuantConfig("int8"), tmp_path, store, str(tmp_path / name))
    assert str(refused.value).startswith("calibration_uri: ")
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)
    assert store.list() == ()


def test_model_that_cannot_read_a_text_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", vocab_size=100)
    with pytest.raises(InvalidModel, match=r"makes token \d+ of a text, and .*vocab_size is 100"):
        build_quantized(folder, QuantConfig("int8"), tmp_path)
    tokenizer = TextTokenizer(byte_tokenizer_files(), 320)
    tokenizer.start = [1]
    with pytest.raises(InvalidModel, match="max_position_embeddings is 1, which leaves"):
        cut_windows([TEXT], tokenizer, 1, 0)


def test_missing_text_is_refused_before_anything_is_queued(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    for uri in ("/nowhere", "~nobody-is-called-so/text.txt"):
        with pytest.raises(InvalidField, match=f"no file {uri}"):
            resolve(str(folder), ["cpu"], QuantConfig("int8"), "", tmp_path, calibration_uri=uri)


def test_text_that_the_disk_does_not_give_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, uri = write_checkpoint(tmp_path / "tiny"), "/proc/self/mem"
    problem = r"^calibration_uri: /proc/self/mem cannot be read on the compile daemon \(.+\)\.$"
    with pytest.raises(InvalidField, match=problem):
        resolve(str(folder), ["cpu"], QuantConfig("int8"), "", tmp_path, calibration_uri=uri)
    with pytest.raises(InvalidField, match=problem):
        read_calibration_text(uri, "0" * 64)


def test_text_is_part_of_the_key_by_its_bytes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    keys = {}
    for name, content in (("a.txt", TEXT), ("b.txt", TEXT), ("c.txt", TEXT + "!")):
        (tmp_path / name).write_text(content)
        uri = str(tmp_path / name)
        keys[name] = resolve(
            str(folder), ["cpu"], QuantConfig("int8"), "", tmp_path, calibration_uri=uri
        ).keys["cpu"]
    assert keys["a.txt"] == keys["b.txt"] != keys["c.txt"]


def test_text_that_changes_before_the_build_fails_it(tmp_path: Path) -> None:
    folder, text = write_checkpoint(tmp_path / "tiny"), tmp_path / "mine.txt"
    text.write_text(TEXT)
    resolved = resolve(
        str(folder), ["cpu"], QuantConfig("int8"), "", tmp_path, calibration_uri=str(text)
    )
    text.write_text(TEXT + "more")
    request = BuildRequest(str(folder), resolved.keys["cpu"], "tiny", tmp_path, str(text))
    with pytest.raises(ModelChanged, match=r"mine\.txt changed"):
        build(request, LocalStore(tmp_path / "store"), lambda progress: None)


def test_json_lines_are_documents(tmp_path: Path) -> None:
    folder, text = write_checkpoint(tmp_path / "tiny"), tmp_path / "mine.jsonl"
    text.write_text("\n".join(json.dumps({"text": TEXT[:300]}) for _ in range(3)))
    store, engine = build_quantized(
        folder, QuantConfig("int4", **LOOSE), tmp_path, calibration_uri=str(text)
    )
    assert report_of(store, engine)["measured_tokens"] == 256


def test_large_text_is_not_read_into_memory_as_a_whole(tmp_path: Path) -> None:
    """Its beginning is used, which may end inside a character; the digest is of all of it."""
    text, size = tmp_path / "mine.txt", 256 << 20
    with text.open("wb") as file:
        file.write(("a" + "é" * (9 << 20)).encode())
        file.truncate(size)
    with text.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tracemalloc.start()
    (document,) = read_calibration_text(str(text), digest)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert document == "a" + "é" * ((4 << 20) - 1)
    assert peak_bytes < size // 4


@pytest.mark.parametrize("character", ["\u2028", "\x85"])
def test_json_line_ends_where_json_says(character: str, tmp_path: Path) -> None:
    """Text from the web holds characters that are ends of lines elsewhere."""
    text = tmp_path / "mine.jsonl"
    document = f"one{character}two"
    text.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert read_calibration_text(str(text), digest) == [document]


@pytest.mark.parametrize("scheme", ["int4-awq", "int4-gptq"])
def test_calibration_is_deterministic(scheme: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    quant = QuantConfig(scheme, calibration_tokens=512, **LOOSE)
    engines = [
        build_quantized(folder, quant, tmp_path, LocalStore(tmp_path / place))[1]
        for place in ("a", "b")
    ]
    assert engines[0].manifest == engines[1].manifest


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4-rtn", "int4-awq", "w8a8-int8"])
def test_number_of_threads_is_not_in_the_key_and_rounding_does_not_see_it(
    scheme: str, tmp_path: Path
) -> None:
    """What is rounded to nearest is the same bytes; what calibration chose may differ in last bits."""
    folder = write_checkpoint(tmp_path / "tiny")
    engines, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            store = LocalStore(tmp_path / str(threads))
            quant = QuantConfig(scheme, **({} if scheme == "bf16" else LOOSE))
            engines[threads] = build_quantized(folder, quant, tmp_path, store)[1]
    finally:
        torch.set_num_threads(before)
    assert engines[1].key == engines[2].key
    if not SCHEMES[scheme].calibrates:
        assert _weight_layers(engines[1]) == _weight_layers(engines[2])


def test_order_of_columns_is_in_the_key_and_changes_what_gptq_stores(tmp_path: Path) -> None:
    folder = write_uneven_checkpoint(tmp_path / "tiny")
    active, stored = (
        build_quantized(folder, QuantConfig("int4-gptq", no_act_order=no, **LOOSE), tmp_path)[1]
        for no in (False, True)
    )
    assert active.key != stored.key
    assert "no_act_order" not in active.key.quant.to_dict()
    assert _weight_layers(active) != _weight_layers(stored)


def _weight_layers(engine: EngineManifest) -> list[str]:
    digests = [blob.digest for blob in engine.layers if blob.title.startswith("weights/")]
    assert digests
    return digests


REFUSED = {
    "tokens that nobody reads": (QuantConfig("int8", calibration_tokens=9), "looks at no tokens"),
    "nothing to keep": (QuantConfig("bf16", keep=("lm_head",)), "quantizes nothing"),
    "limits unmeasured": (QuantConfig("int8", max_kl=1.0, skip_quality=True), "skip_quality"),
    "a probe unmeasured": (QuantConfig("bf16", probe_tokens=512), "nothing is measured"),
    "an order of none": (
        QuantConfig("int4-awq", no_act_order=True),
        "no_act_order is for int4-gptq",
    ),
    "a probe too short": (QuantConfig("int8", probe_tokens=255), "256 to 131072, not 255"),
    "a probe too long": (QuantConfig("int8", probe_tokens=131073), "256 to 131072, not 131073"),
    "a pattern of nothing": (QuantConfig("int8", keep=("layers.9.*",)), "'layers.9.*' matches no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipe_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    quant, what = REFUSED[case]
    folder = write_checkpoint(tmp_path / "tiny")
    with pytest.raises(UnsupportedQuant) as refused:
        resolve(str(folder), ["cpu"], quant, "", tmp_path)
    assert what in str(refused.value)


@pytest.mark.parametrize("scheme", ["int4-gptq", "w8a8-int8"])
def test_more_tokens_than_memory_is_for_are_refused(scheme: str, tmp_path: Path) -> None:
    """All go through the model at once: of 8 GiB a model has as many as its widest linear allows."""
    folder = write_checkpoint(tmp_path / "tiny")
    most = (8 << 30) // (4 * (2 * 128 + 64 + 64))
    quant = QuantConfig(scheme, calibration_tokens=most)
    assert resolve(str(folder), ["cpu"], quant, "", tmp_path).quant.calibration_tokens == most
    quant = replace(quant, calibration_tokens=most + 1)
    with pytest.raises(UnsupportedQuant, match=f"at most {most} for this model.*, not {most + 1}"):
        resolve(str(folder), ["cpu"], quant, "", tmp_path)


def test_report_says_how_many_tokens_the_text_had_to_calibrate_with(tmp_path: Path) -> None:
    """Whatever was asked for: a short text has fewer."""
    folder, text = write_checkpoint(tmp_path / "tiny"), tmp_path / "mine.txt"
    text.write_text(TEXT[:3000])
    quant = QuantConfig("int4-awq", calibration_tokens=100_000, **LOOSE)
    store, engine = build_quantized(folder, quant, tmp_path, calibration_uri=str(text))
    report = report_of(store, engine)
    assert engine.key.quant.calibration_tokens == 100_000
    num_tokens = len(TOKENIZER.ids(TEXT[:3000]))
    assert 256 < report["calibration_tokens"] <= num_tokens - report["measured_tokens"]


def test_text_for_a_build_that_reads_none_is_refused(tmp_path: Path) -> None:
    folder, text = write_checkpoint(tmp_path / "tiny"), tmp_path / "mine.txt"
    text.write_text(TEXT)
    with pytest.raises(InvalidField, match="looks at no text"):
        resolve(str(folder), ["cpu"], QuantConfig("bf16"), "", tmp_path, calibration_uri=str(text))
