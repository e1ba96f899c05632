"""Law 3 for keys: equal keys have one name, any difference makes another."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine import (
    EngineKey,
    QuantConfig,
    StoredTensor,
    WeightIndex,
    canonical_json,
    is_digest,
)

KEY = EngineKey("0" * 64, "sm_90", QuantConfig("int4-rtn", 64), "builder")

words = st.text(max_size=10)
limits = st.floats(0, allow_nan=False, allow_infinity=False)
quants = st.builds(
    QuantConfig,
    scheme=words,
    group_size=st.integers(0),
    keep=st.lists(words).map(tuple),
    calibration_digest=words,
    calibration_tokens=st.integers(0),
    max_kl=limits,
    max_perplexity_increase=limits,
    auto_keep=st.booleans(),
    skip_quality=st.booleans(),
    kv_cache=words,
    probe_tokens=st.integers(0),
    no_act_order=st.booleans(),
)
keys = st.builds(EngineKey, words, words, quants, words)


@given(keys)
def test_key_survives_json(key: EngineKey) -> None:
    assert EngineKey.from_dict(json.loads(canonical_json(key.to_dict()))) == key


@given(keys, keys)
def test_keys_share_a_name_only_if_equal(one: EngineKey, two: EngineKey) -> None:
    assert (one.digest == two.digest) == (one == two)


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, model_digest="1" + "0" * 63),
        replace(KEY, arch="sm_100"),
        replace(KEY, quant=QuantConfig("int4", 32)),
        replace(KEY, quant=QuantConfig("int8", 64)),
        replace(KEY, quant=QuantConfig("int4", 64, keep=("lm_head",))),
        replace(KEY, quant=QuantConfig("int4", 64, calibration_digest="a")),
        replace(KEY, quant=QuantConfig("int4", 64, calibration_tokens=1)),
        replace(KEY, quant=QuantConfig("int4", 64, max_kl=0.5)),
        replace(KEY, quant=QuantConfig("int4", 64, max_perplexity_increase=0.5)),
        replace(KEY, quant=QuantConfig("int4", 64, auto_keep=True)),
        replace(KEY, quant=QuantConfig("int4", 64, skip_quality=True)),
        replace(KEY, quant=QuantConfig("int4", 64, kv_cache="fp8")),
        replace(KEY, quant=QuantConfig("int4", 64, probe_tokens=2048)),
        replace(KEY, quant=QuantConfig("int4", 64, no_act_order=True)),
        replace(KEY, builder="builder2"),
    ],
)
def test_every_part_of_a_key_is_in_its_name(other: EngineKey) -> None:
    assert other.digest != KEY.digest


def test_name_of_a_key_never_changes() -> None:
    """Stored engines are found by it: a new value here orphans all of them."""
    assert KEY.digest == "d0cce864c0b3b19176e77e2dbb14d99e30c43f1083783a7c8caee1108590a191"


def test_an_alias_and_the_order_of_patterns_make_no_difference() -> None:
    assert QuantConfig("int4", 64) == QuantConfig("int4-rtn", 64)
    assert QuantConfig("int8", keep=("b", "a", "b")) == QuantConfig("int8", keep=("a", "b"))


def test_default_group_size_is_spelled_out() -> None:
    assert QuantConfig("int4").resolved == QuantConfig("int4", 64).resolved
    assert QuantConfig("int4", 32).resolved == QuantConfig("int4", 32)
    assert QuantConfig("int8").resolved == QuantConfig("int8")


def test_digests_are_told_from_other_text() -> None:
    assert is_digest("sha256:" + "a0" * 32)
    for text in ("a0" * 32, "sha256:" + "A0" * 32, "sha256:" + "a0" * 31, "sha256:" + "a0" * 33):
        assert not is_digest(text)
    assert not is_digest("sha256:" + "a0" * 32 + "\n")


def test_weight_index_survives_json() -> None:
    index = WeightIndex(
        {
            "b": {"weight": StoredTensor(0, 256, (2, 3), "int8")},
            "a": {"x": StoredTensor(1, 0, (), "bool")},
        }
    )
    assert WeightIndex.from_json(index.to_json()) == index


def test_engine_names_do_not_need_torch() -> None:
    script = "import sys, shared.engine, shared.store, shared.wire; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
