"""Packed tensors survive the store, and corrupt ones are found while they load."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.engine import WEIGHT_ALIGNMENT_BYTES, Blob, EngineDraft, EngineManifest
from shared.errors import DigestMismatch
from shared.store import LocalStore
from shared.store.weight_files import num_verify_threads
from shared.store.weights import WeightReader, WeightWriter
from tests.shared.engines import engine_key

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)

Weights = dict[str, dict[str, torch.Tensor]]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits, so NaNs and denormals too; bools are bools."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=dtype)
    size = (torch.Size(shape).numel() * dtype.itemsize,)
    bits = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(*bits)


def write(store: LocalStore, weights: Weights, max_blob_bytes: int) -> tuple[Blob, ...]:
    with WeightWriter(store, max_blob_bytes) as writer:
        for name, roles in weights.items():
            writer.add(name, roles)
        return writer.finish()


def engine_of(store: LocalStore, layers: tuple[Blob, ...]) -> EngineManifest:
    return store.publish(EngineDraft(engine_key(), "tiny", layers))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives(store: LocalStore, dtype: torch.dtype) -> None:
    weights = {
        "matrix": {"weight": tensor_of(dtype, (7, 5))},
        "empty": {"weight": tensor_of(dtype, (0, 3))},
        "scalar": {"weight": tensor_of(dtype, ())},
        "strided": {"weight": tensor_of(dtype, (6, 4)).t()[1:, ::2]},
    }
    engine = engine_of(store, write(store, weights, 1 << 20))
    with WeightReader(store, engine) as reader:
        reader.verify()
        for name, roles in weights.items():
            assert same_bits(reader.tensor(name), roles["weight"]), name


shapes = st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    specs=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=12),
    max_blob_bytes=st.sampled_from([1, 256, 1000, 4096, 1 << 20]),
)
def test_tensors_are_aligned_and_blobs_bounded(
    tmp_path_factory: pytest.TempPathFactory,
    specs: list[tuple[torch.dtype, tuple[int, ...]]],
    max_blob_bytes: int,
) -> None:
    store = LocalStore(tmp_path_factory.mktemp("store"))
    weights = {
        f"w{i}": {"weight": tensor_of(dtype, shape, seed=i)}
        for i, (dtype, shape) in enumerate(specs)
    }
    layers = write(store, weights, max_blob_bytes)
    largest = max(roles["weight"].nbytes for roles in weights.values())
    assert all(blob.size_bytes <= max(max_blob_bytes, largest) for blob in layers[1:])
    with WeightReader(store, engine_of(store, layers)) as reader:
        for name, roles in weights.items():
            assert reader.index.tensors[name]["weight"].offset % WEIGHT_ALIGNMENT_BYTES == 0
            assert same_bits(reader.tensor(name), roles["weight"])
        assert reader.num_bytes == sum(blob.size_bytes for blob in layers[1:])


def test_same_tensors_give_the_same_blobs(tmp_path: Path) -> None:
    """Law 3: same key, same bytes."""
    weights = {
        "a": {"weight": tensor_of(torch.int8, (100, 7)), "scale": tensor_of(torch.float32, (100,))},
        "b": {"weight": tensor_of(torch.bfloat16, (33, 5))},
    }
    first = write(LocalStore(tmp_path / "one"), weights, 1000)
    assert len(first) == 3
    assert [blob.title for blob in first] == ["weights.json", "weights/00000", "weights/00001"]
    assert write(LocalStore(tmp_path / "two"), weights, 1000) == first


def test_weight_bytes_never_change(store: LocalStore) -> None:
    """Law 3: same key, same bytes, next year too: other values need a new FORMAT_VERSION."""
    weights = {
        "a": {"weight": torch.arange(7, dtype=torch.int8), "scale": torch.ones(3)},
        "b": {"weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)},
    }
    assert [blob.digest for blob in write(store, weights, 300)] == [
        "sha256:7ab1068ab2b8835f3b74fd783c1073e205b29cf8ba4bc927eb7ef004704648f9",
        "sha256:f067598024efcd7b21d9ee70deaafd7a01d5a26af468c4e08c5878babb26f6ae",
        "sha256:a8c3c50be91f116761c95b3137575dd8e77e91794f6ff74fb18fe40875bb640c",
    ]


def test_changed_tensor_changes_only_its_blob(store: LocalStore) -> None:
    weights = {f"w{i}": {"weight": tensor_of(torch.int8, (300,), seed=i)} for i in range(4)}
    before = write(store, weights, 600)
    weights["w2"]["weight"][0] += 1
    after = write(store, weights, 600)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False, True]


def test_writing_to_a_tensor_leaves_the_store_alone(store: LocalStore) -> None:
    engine = engine_of(store, write(store, {"w": {"weight": torch.ones(8)}}, 1000))
    with WeightReader(store, engine) as reader:
        tensor = reader.tensor("w")
        tensor.zero_()
    assert torch.equal(tensor, torch.zeros(8))  # valid after close
    with WeightReader(LocalStore(store.root), engine) as reader:
        reader.verify()
        assert torch.equal(reader.tensor("w"), torch.ones(8))


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_corrupt_weights_are_found_while_loading(store: LocalStore, damage: str) -> None:
    """Law 7: nothing is served from a corrupt blob."""
    weights = {f"w{i}": {"weight": tensor_of(torch.int8, (300,), seed=i)} for i in range(3)}
    engine = engine_of(store, write(store, weights, 300))
    path = store.blob_path(engine.layer("weights/00001").digest)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-1])
    with WeightReader(store, engine) as reader:
        assert same_bits(reader.tensor("w0"), weights["w0"]["weight"])
        with pytest.raises(DigestMismatch):
            reader.verify()


def test_reader_opens_what_it_hashes(store: LocalStore) -> None:
    """A blob that is repaired between mapping and hashing must not hide the corrupt one in use."""
    good = tensor_of(torch.int8, (300,))
    engine = engine_of(store, write(store, {"w": {"weight": good}}, 300))
    path = store.blob_path(engine.layer("weights/00000").digest)
    content = path.read_bytes()
    path.write_bytes(b"\0" * len(content))
    with WeightReader(store, engine) as reader:
        assert not same_bits(reader.tensor("w"), good)
        store.write_blob([content], "repaired by somebody")
        with pytest.raises(DigestMismatch):
            reader.verify()
    with WeightReader(store, engine) as reader:
        reader.verify()
        assert same_bits(reader.tensor("w"), good)


def test_unfinished_weights_leave_nothing(store: LocalStore) -> None:
    def write_half(error: Exception | None) -> None:
        with WeightWriter(store) as writer:
            writer.add("w", {"weight": torch.ones(100)})
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        write_half(ZeroDivisionError())
    with pytest.raises(AssertionError, match="never finished"):
        write_half(None)
    assert not list((store.root / "partial").iterdir())
    assert not list((store.root / "blobs" / "sha256").iterdir())


def test_missing_weight_is_a_key_error(store: LocalStore) -> None:
    engine = engine_of(store, write(store, {"w": {"weight": torch.ones(1)}}, 1000))
    with WeightReader(store, engine) as reader:
        with pytest.raises(KeyError):
            reader.tensor("w", "scale")
        with pytest.raises(KeyError):
            reader.roles("v")
        assert set(reader.roles("w")) == {"weight"}
    with pytest.raises(KeyError):
        WeightReader(store, replace(engine, layers=()))


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (3, 1), (16, 8), (128, 16)])
def test_hashing_leaves_half_of_the_cores(num_cores: int, num_threads: int) -> None:
    assert num_verify_threads(num_cores) == num_threads
