"""Engines for benchmarks of serving, written straight into a store, with a tokenizer of real size."""

import hashlib
import json
import random
import time
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shared.engine import (
    FILE_TYPE,
    GRAPH_TYPE,
    Blob,
    EngineDraft,
    EngineKey,
    EngineManifest,
    QuantConfig,
)
from shared.store import LocalStore


def publish_textual(
    store: LocalStore,
    model: str,
    arch: str,
    quant: str,
    vocab_size: int,
    graph: bytes = b"",
    layers: Iterable[Blob] = (),
) -> EngineManifest:
    """An engine of these `layers`, with a tokenizer of `vocab_size` and what else the front reads.

    Args:
        graph: by default one that says no more than the vocabulary's size.
    """
    graph = graph or json.dumps({"config": {"vocab_size": vocab_size}}).encode()
    digest = hashlib.sha256(f"{model} {time.time_ns()}".encode()).hexdigest()
    key = EngineKey(digest, arch, QuantConfig(quant, skip_quality=True), "bench")
    draft = EngineDraft(
        key,
        model,
        (
            store.write_blob([graph], GRAPH_TYPE, "graph.json"),
            *layers,
            store.write_blob([tokenizer_json(vocab_size)], FILE_TYPE, "tokenizer.json"),
        ),
    )
    return store.publish(draft)


def tokenizer_json(vocab_size: int) -> bytes:
    """A byte-level BPE tokenizer of random merges: as large, and as slow to read, as a real one."""
    draw = random.Random(0)
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens, merges = list(vocab), []
    while len(tokens) < vocab_size:
        left, right = (
            tokens[draw.randrange(len(tokens))],
            tokens[draw.randrange(min(len(tokens), 4096))],
        )
        if len(left + right) <= 12 and left + right not in vocab:
            vocab[left + right] = len(tokens)
            tokens.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()
