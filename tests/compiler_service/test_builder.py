"""Builds: what they make, that they make it again byte for byte, and how they fail."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiler_service import builder
from compiler_service.builder import (
    STAGES,
    BuildCancelled,
    BuildRequest,
    build,
)
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.planning import plan
from compiler_service.progress import BuildProgress
from compiler_service.resolve import resolve, resolve_cached
from compiler_service.weight_table import pack_weight, read_parts
from kernels.linear.layouts import LAYOUTS
from kernels.reference import dense, prompt_batch, run
from shared.engine import EngineManifest, EngineSelector, QuantConfig
from shared.errors import (
    DiskFull,
    InvalidField,
    InvalidModel,
    MillraceError,
    ModelChanged,
    UnsupportedArch,
    UnsupportedQuant,
)
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightReader
from tests.checkpoints import write_checkpoint
from tests.compiler_service.gguf_files import write_gguf
from tests.compiler_service.quantized_cases import UNSET_QUANT

# Tiny random models suffer more than any limit that a real one should have.
INT4 = QuantConfig("int4", max_kl=9.0, max_perplexity_increase=9.0)
QUANTS = [QuantConfig(n) for n in ("bf16", "fp32", "int8")] + [INT4, replace(INT4, group_size=32)]

MOST_ERROR = {"fp32": 0.0, "bf16": 0.003, "int8": 0.012, "int4-rtn": 0.11}

INT8 = QuantConfig("int8")
AWQ = replace(INT4, scheme="int4-awq")


def _request(
    folder: Path, cache: Path, quant: QuantConfig = INT8, arch: str = "cpu"
) -> BuildRequest:
    resolved = resolve(str(folder), [arch], quant, "", cache)
    return BuildRequest(str(folder), resolved.keys[arch], resolved.model, cache)


def _silent(progress: BuildProgress) -> None:
    pass


def _graph(store: LocalStore, engine: EngineManifest, title: str = "graph.json") -> Graph:
    return Graph.from_json(store.read_all(engine.layer(title).digest).decode())


def _logits(store: LocalStore, engine: EngineManifest, tokens: torch.Tensor) -> torch.Tensor:
    graph = _graph(store, engine)
    with WeightReader(store, engine) as reader:
        weights = dense(graph, {name: reader.roles(name) for name in graph.weights})
    return run(graph, weights, tokens.int(), prompt_batch(graph, [len(tokens)]))["logits"]


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_engine_holds_what_the_checkpoint_said(quant: QuantConfig, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "qwen2", num_shards=2, tie_word_embeddings=True)
    request, store = _request(folder, tmp_path, quant), LocalStore(tmp_path / "store")
    engine = build(request, store, _silent)
    assert [blob.title for blob in engine.layers] == [
        "graph.json",
        "graph.source.json",
        "weights.json",
        "weights/00000",
        *(["quality.json"] if quant.scheme not in ("bf16", "fp32") else []),
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    graph, checkpoint = _graph(store, engine), open_checkpoint(str(folder))
    with WeightReader(store, engine) as reader:
        reader.verify()
        assert set(reader.index.tensors) == set(graph.weights)
        for name, weight in graph.weights.items():
            original = torch.cat([checkpoint.read(part) for part in weight.parts])
            stored = LAYOUTS[weight.layout].unpack(reader.roles(name))
            assert stored.shape == weight.shape == original.shape
            error = float((stored - original).norm() / original.norm())
            assert error <= MOST_ERROR[quant.scheme]


def test_graph_layers_are_the_graph_before_and_after_passes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    store = LocalStore(tmp_path / "store")
    engine = build(_request(folder, tmp_path), store, _silent)
    source, graph = _graph(store, engine, "graph.source.json"), _graph(store, engine)
    assert "qkv_rope_write" not in {node.op for node in source.nodes}
    assert "qkv_rope_write" in {node.op for node in graph.nodes}
    assert graph.weights["layers.0.qkv"].layout == "int8_channel"
    assert graph.weights["norm"].layout == "plain"
    assert graph.config["dtype"] == "bfloat16"


def test_fp32_engine_computes_what_the_checkpoint_does(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "qwen3")
    store = LocalStore(tmp_path / "store")
    engine = build(_request(folder, tmp_path, QuantConfig("fp32")), store, _silent)
    checkpoint = open_checkpoint(str(folder))
    source = _graph(store, engine, "graph.source.json")
    weights = {
        name: pack_weight(w, read_parts(checkpoint, w))["weight"]
        for name, w in source.weights.items()
    }
    tokens = torch.tensor([5, 9, 200, 31, 7])
    expected = run(source, weights, tokens.int(), prompt_batch(source, [5]))["logits"]
    assert torch.allclose(_logits(store, engine, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("quant", [QuantConfig("int8"), INT4], ids=str)
def test_quantized_engine_computes_nearly_what_the_checkpoint_does(
    quant: QuantConfig, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    store, tokens = LocalStore(tmp_path / "store"), torch.arange(3, 40)
    exact = _logits(
        store, build(_request(folder, tmp_path, QuantConfig("fp32")), store, _silent), tokens
    )
    near = _logits(store, build(_request(folder, tmp_path, quant), store, _silent), tokens)
    error = float((near.float() - exact).norm() / exact.norm())
    assert error <= {"int8": 0.15, "int4-rtn": 0.6}[quant.scheme]


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_same_key_gives_the_same_bytes_in_another_folder(
    quant: QuantConfig, tmp_path: Path
) -> None:
    engines: list[EngineManifest] = []
    for place in ("a", "b"):
        folder = write_checkpoint(tmp_path / place / "tiny", "llama")
        request = _request(folder, tmp_path / place / "cache", quant)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 + len(engines))
        engines.append(build(request, LocalStore(tmp_path / place / "store"), _silent))
        torch.set_num_threads(threads)
    first, second = engines
    assert first.key == second.key
    # What was measured depends on the CPU and its threads in the last bits: first publish wins.
    made, again = (
        [blob for blob in engine.layers if blob.title != "quality.json"] for engine in engines
    )
    assert made == again


def test_key_changes_with_one_weight_byte(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    before = _request(folder, tmp_path).key
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    after = _request(folder, tmp_path).key
    assert after.model_digest != before.model_digest
    assert (after.arch, after.quant, after.builder) == (before.arch, before.quant, before.builder)


@pytest.mark.parametrize("quant", [QuantConfig("int8"), INT4], ids=str)
def test_engine_of_another_arch_shares_weights_and_reads_none(
    quant: QuantConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second arch adds machine code alone; what the machine code is, is tested elsewhere."""
    folder = write_checkpoint(tmp_path / "tiny")
    store = LocalStore(tmp_path / "store")
    cpu = build(_request(folder, tmp_path, quant), store, _silent)
    blobs = set((tmp_path / "store" / "blobs" / "sha256").iterdir())
    monkeypatch.setattr(builder, "machine_code", lambda *arguments: [("kernels/x", b"code")])
    progress: list[BuildProgress] = []
    gpu = build(_request(folder, tmp_path, quant, arch="sm_90"), store, progress.append)
    assert gpu.layers[:-1] == cpu.layers
    assert gpu.layers[-1].title == "kernels/x"
    assert "quantize" not in {p.stage for p in progress}
    added = set((tmp_path / "store" / "blobs" / "sha256").iterdir()) - blobs
    assert sum(path.stat().st_size for path in added) < 20_000
    request = _request(folder, tmp_path, quant, arch="sm_90")
    alone = build(request, LocalStore(tmp_path / "b"), _silent)
    assert alone.manifest == gpu.manifest


def test_layers_are_made_anew_when_a_shared_blob_is_corrupt(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    store = LocalStore(tmp_path / "store")
    engine = build(_request(folder, tmp_path), store, _silent)
    weights = engine.layer("weights/00000")
    store.delete(engine.name)
    path = store.blob_path(weights.digest)
    path.write_bytes(b"\0" * weights.size_bytes)
    again = build(_request(folder, tmp_path), LocalStore(tmp_path / "store"), _silent)
    assert again.layer("weights/00000") == weights
    LocalStore(tmp_path / "store").verify(again)


def test_build_is_a_no_op_when_the_engine_is_published(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    request, store = _request(folder, tmp_path), LocalStore(tmp_path / "store")
    engine = build(request, store, _silent)
    shutil.rmtree(folder)
    assert build(request, store, lambda progress: pytest.fail("it works")) == engine


def test_second_name_of_a_model_finds_the_engine(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    request, store = _request(folder, tmp_path), LocalStore(tmp_path / "store")
    engine = build(request, store, _silent)
    build(BuildRequest(request.model_uri, request.key, "nickname", tmp_path), store, _silent)
    for name in ("tiny", "nickname", request.key.model_digest):
        assert store.find(EngineSelector(name, "cpu", QuantConfig("int8"))) == engine


@pytest.mark.parametrize("quant", [INT8, AWQ], ids=str)
def test_progress_names_every_stage_in_order_and_only_grows(
    quant: QuantConfig, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    seen: list[BuildProgress] = []
    build(_request(folder, tmp_path, quant), LocalStore(tmp_path / "store"), seen.append)
    skipped = () if quant is AWQ else ("calibrate",)
    assert list(dict.fromkeys(p.stage for p in seen)) == [s for s in STAGES if s not in skipped]
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert 0.0 <= fractions[0] <= fractions[-1] <= 1.0
    if quant is AWQ:
        assert len({p.done_bytes for p in seen if p.stage == "calibrate"}) > 10, "it seems to stand"
    last = [p for p in seen if p.stage == "quantize"][-1]
    assert last.done_bytes == last.total_bytes > 0


def test_progress_goes_on_while_kernels_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are most of a GPU's build of a small model."""
    folder = write_checkpoint(tmp_path / "tiny")
    seen: list[BuildProgress] = []

    def machine_code(
        graph: Graph, arch: str, on_share: Callable[[float], None]
    ) -> list[tuple[str, bytes]]:
        for share in (0.25, 0.5, 1.0):
            on_share(share)
        return []

    monkeypatch.setattr(builder, "machine_code", machine_code)
    request = _request(folder, tmp_path, QuantConfig("bf16"), arch="sm_90")
    build(request, LocalStore(tmp_path / "store"), seen.append)
    begun, *compiled = [p.fraction for p in seen if p.stage == "kernels"]
    (published,) = [p.fraction for p in seen if p.stage == "publish"]
    assert compiled == pytest.approx([begun + s * (published - begun) for s in (0.25, 0.5, 1.0)])
    assert published - begun > 0.2


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_build_leaves_nothing_visible(stage: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    request, store = _request(folder, tmp_path, AWQ), LocalStore(tmp_path / "store")
    stages: list[str] = []
    with pytest.raises(BuildCancelled):
        build(request, store, lambda p: stages.append(p.stage), lambda: stages[-1:] == [stage])
    assert store.list() == ()
    assert list((tmp_path / "store" / "partial").iterdir()) == []
    assert list((tmp_path / "store" / "pins").iterdir()) == []
    assert build(request, store, _silent).key == request.key


def test_build_is_refused_when_the_model_changed_before_it_began(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    request = _request(folder, tmp_path)
    write_checkpoint(folder, seed=1)
    with pytest.raises(ModelChanged):
        build(request, LocalStore(tmp_path / "store"), _silent)


def test_build_is_refused_when_the_model_changes_under_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    request, store = _request(folder, tmp_path), LocalStore(tmp_path / "store")
    path = folder / "model.safetensors"

    def change(progress: BuildProgress) -> None:
        if progress.stage == "quantize" and progress.done_bytes == 0:
            with path.open("r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"\1\2\3\4")

    with pytest.raises(ModelChanged, match=r"model\.safetensors changed"):
        build(request, store, change)
    assert store.list() == ()


def test_build_fails_as_disk_full_and_nothing_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    request, store = _request(folder, tmp_path), LocalStore(tmp_path / "store")
    synced = os.fsync

    def full(fd: int) -> None:
        if os.fstat(fd).st_size > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        build(request, store, _silent)
    monkeypatch.undo()
    assert store.list() == ()
    assert build(request, store, _silent).key == request.key


@pytest.mark.parametrize("quant", [QuantConfig("bf16"), QuantConfig("int4")], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_build_is_refused_when_a_weight_is_not_finite(
    quant: QuantConfig, bad: float, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = bad
    save_file(tensors, folder / "model.safetensors")
    store = LocalStore(tmp_path / "store")
    with pytest.raises(InvalidModel, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        build(_request(folder, tmp_path, quant), store, _silent)
    assert store.list() == ()


def test_gguf_and_folder_of_one_model_give_the_same_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    path = write_gguf(tmp_path / "tiny.gguf", folder)
    store = LocalStore(tmp_path / "store")
    from_folder = build(_request(folder, tmp_path), store, _silent)
    from_gguf = build(_request(path, tmp_path), store, _silent)
    assert from_gguf.key != from_folder.key
    assert from_gguf.layer("weights/00000") == from_folder.layer("weights/00000")
    assert from_gguf.layer("graph.json") == from_folder.layer("graph.json")


# What is asked for, made exact.


def test_unset_quant_is_the_float_format_of_the_checkpoint(tmp_path: Path) -> None:
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        folder = write_checkpoint(tmp_path / name, dtype=dtype)
        assert resolve(str(folder), ["cpu"], UNSET_QUANT, "", tmp_path).quant == QuantConfig(name)


def test_default_group_and_its_value_are_one_key(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    keys = {_request(folder, tmp_path, QuantConfig("int4", g)).key.digest for g in (0, 64)}
    assert len(keys) == 1
    assert _request(folder, tmp_path, QuantConfig("int4", 32)).key.digest not in keys


def test_resolve_cached_answers_only_when_nothing_need_be_hashed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    asked = (str(folder), ["sm_90", "cpu", "cpu"], QuantConfig("int8"), "named", tmp_path)
    assert resolve_cached(*asked) is None
    resolved = resolve(*asked)
    assert resolve_cached(*asked) == resolved
    assert resolved.model == "named"
    assert list(resolved.keys) == ["sm_90", "cpu"]
    cpu, gpu = resolved.keys["cpu"], resolved.keys["sm_90"]
    assert gpu.builder.startswith(f"{cpu.builder}-")
    (folder / "config.json").touch()
    assert resolve_cached(*asked) is None


REFUSED: dict[str, tuple[list[str], QuantConfig, type[MillraceError], str]] = {
    "no arch": ([], QuantConfig("int8"), InvalidField, "archs"),
    "unknown arch": (["cpu", "sm_13"], QuantConfig("int8"), UnsupportedArch, "sm_13"),
    "unknown scheme": (["cpu"], QuantConfig("int3"), UnsupportedQuant, "int8"),
    "fp8 on cpu": (["sm_90", "cpu"], QuantConfig("fp8"), UnsupportedQuant, "sm_89, sm_90"),
    "fp8 on sm_80": (["sm_80"], QuantConfig("fp8"), UnsupportedQuant, "sm_80 cannot"),
    "fp32 on a GPU": (["sm_90"], QuantConfig("fp32"), UnsupportedQuant, "cpu can"),
    "groups of 48": (["cpu"], QuantConfig("int4", 48), UnsupportedQuant, "32, 64, 128"),
    "groups of int8": (["cpu"], QuantConfig("int8", 64), UnsupportedQuant, "no groups"),
    "groups that do not divide": (
        ["cpu"],
        QuantConfig("int4", 128),
        UnsupportedQuant,
        "64 columns, which groups of 128 do not divide; groups of 32 or 64 do",
    ),
    "groups of nothing": (["cpu"], QuantConfig("", 64), UnsupportedQuant, "no groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_request_is_refused_with_one_clear_line(case: str, tmp_path: Path) -> None:
    archs, quant, error, what = REFUSED[case]
    folder = write_checkpoint(tmp_path / "tiny")
    with pytest.raises(error) as refused:
        resolve(str(folder), archs, quant, "", tmp_path)
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "QuantConfig(" not in str(refused.value)


def test_contradictory_checkpoint_is_found_when_it_is_resolved(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 321}))
    with pytest.raises(InvalidModel, match="321"):
        resolve(str(folder), ["cpu"], QuantConfig("int8"), "", tmp_path)


def test_plan_says_what_will_be_done(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    request = _request(folder, tmp_path, INT4)
    made = plan(open_checkpoint(str(folder)), request.key, request.model)
    assert made.to_text().splitlines()[1:5] == [
        "model    tiny (llama)",
        "target   cpu, int4-rtn-g64",
        "graph    38 nodes -> 22",
        "weights  2 int8_channel, 5 plain, 8 int4_group",
    ]
    assert made.read_bytes == sum(
        t.num_bytes for t in open_checkpoint(str(folder)).tensors.values()
    )
    store = LocalStore(tmp_path / "store")
    engine = build(request, store, _silent)
    with WeightReader(store, engine) as reader:
        stored = sum(
            tensor.nbytes
            for name, roles in reader.index.tensors.items()
            for tensor in (reader.tensor(name, role) for role in roles)
        )
    assert made.stored_bytes == stored
