"""Domain values survive the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from millrace.engine.v1 import engine_pb2

from shared import wire
from shared.engine import Blob, EngineKey, EngineManifest, EngineSelector, QuantConfig
from shared.errors import InvalidField

words = st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable())
quants = st.builds(QuantConfig, words, st.integers(0, 2**31 - 1))
keys = st.builds(EngineKey, words, words, quants, words)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: f"sha256:{raw.hex()}")
blobs = st.builds(Blob, words, digests, st.integers(0, 2**63 - 1), words)
engines = st.builds(
    EngineManifest,
    keys,
    words,
    st.integers(0, 100),
    st.lists(blobs, max_size=4).map(tuple),
    blobs,
    st.integers(0, 4_000_000_000_000).map(lambda ms: ms / 1000),
)


@given(engines)
def test_engine_survives_the_wire(engine: EngineManifest) -> None:
    raw = wire.engine_to_proto(engine).SerializeToString()
    back = wire.engine_from_proto(engine_pb2.Engine.FromString(raw))
    assert back == engine
    assert back.name == engine.name == wire.engine_to_proto(engine).name


@given(st.builds(EngineSelector, words, words, quants))
def test_selector_survives_the_wire(selector: EngineSelector) -> None:
    assert wire.selector_from_proto(wire.selector_to_proto(selector)) == selector


@pytest.mark.parametrize("digest", ["", "sha256:ab", "md5:" + "0" * 64, "sha256:" + "G" * 64])
def test_malformed_digest_is_refused(digest: str) -> None:
    with pytest.raises(InvalidField, match="digest"):
        wire.blob_from_proto(engine_pb2.Blob(digest=digest))


def test_negative_group_size_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"quant\.group_size"):
        wire.quant_from_proto(engine_pb2.QuantConfig(scheme="int4", group_size=-1))


def test_selector_without_a_model_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"selector\.model"):
        wire.selector_from_proto(engine_pb2.EngineSelector(arch="cpu"))
