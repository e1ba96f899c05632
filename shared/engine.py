"""What an engine is called and what it is made of.

An engine is a value: its key says everything that went into it, its manifest lists its blobs. This
file knows names and JSON; where blobs are kept is `shared/store/`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT_VERSION = 1
READABLE_FORMATS = (1,)

ARTIFACT_TYPE = "application/vnd.millrace.engine.v1"
GRAPH_TYPE = "application/vnd.millrace.engine.graph.v1+json"
WEIGHT_INDEX_TYPE = "application/vnd.millrace.engine.weight-index.v1+json"
WEIGHTS_TYPE = "application/vnd.millrace.engine.weights.v1"
FILE_TYPE = "application/vnd.millrace.engine.file.v1"
KERNELS_TYPE = "application/vnd.millrace.engine.kernels.v1"

MAX_WEIGHT_BLOB_BYTES = 256 << 20
WEIGHT_ALIGNMENT_BYTES = 256

# What a group size of 0 stands for in schemes that have groups; part of the wire contract.
DEFAULT_GROUP_SIZES = {"int4": 64}

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Claims that `text` is `sha256:` and 64 lowercase hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def canonical_json(value: object) -> bytes:
    """`value` as JSON with one possible spelling: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True, order=True)
class QuantConfig:
    """How weights are stored: a scheme's name, and values per scale (0 = the scheme's default)."""

    scheme: str
    group_size: int = 0

    def __str__(self) -> str:
        return f"{self.scheme}-g{self.group_size}" if self.group_size else self.scheme

    @property
    def resolved(self) -> "QuantConfig":
        """This quantization with its default group size spelled out."""
        size = self.group_size or DEFAULT_GROUP_SIZES.get(self.scheme, 0)
        return QuantConfig(self.scheme, size)


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that can change an engine's bytes. `model_digest` is bare hexadecimal."""

    model_digest: str
    arch: str
    quant: QuantConfig
    builder: str

    def to_dict(self) -> dict[str, object]:
        """As JSON knows it."""
        return {
            "model_digest": self.model_digest,
            "arch": self.arch,
            "quant": {"scheme": self.quant.scheme, "group_size": self.quant.group_size},
            "builder": self.builder,
        }

    @staticmethod
    def from_dict(raw: dict[str, object]) -> "EngineKey":
        """The key that `to_dict` wrote."""
        quant = raw["quant"]
        assert isinstance(quant, dict)
        return EngineKey(
            str(raw["model_digest"]),
            str(raw["arch"]),
            QuantConfig(str(quant["scheme"]), int(quant["group_size"])),
            str(raw["builder"]),
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, bare hexadecimal: the engine's name."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()


@dataclass(frozen=True, slots=True)
class EngineSelector:
    """What a runtime asks by. `model` is a name or a model digest."""

    model: str
    arch: str
    quant: QuantConfig

    def __str__(self) -> str:
        return f"{self.model}/{self.arch}/{self.quant}"


@dataclass(frozen=True, slots=True)
class Blob:
    """An OCI content descriptor: `digest` is `sha256:<hex>`, `title` its path inside the engine."""

    media_type: str
    digest: str
    size_bytes: int
    title: str = ""


@dataclass(frozen=True, slots=True)
class EngineDraft:
    """An engine whose blobs are in a store and that has no name yet.

    Args:
        layers: graph, weight index, weight blobs, files (tokenizer, ...), kernels; in this order.
        labels: more about it, for people and tools; part of its bytes, so no times and no hosts.
    """

    key: EngineKey
    model: str
    layers: tuple[Blob, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True, order=True)
class Signature:
    """An Ed25519 signature of an engine's manifest, and the signer's public key; raw bytes."""

    public_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """A finished engine as the store gives it.

    Args:
        model: human name, by which a selector finds it.
        layers: graph, weight index, weight blobs, files (tokenizer, ...), kernels; in this order.
        manifest: descriptor of the OCI manifest itself.
        created_s: Unix time of publication: from the store's index, never from a hashed blob.
        signatures: by whom, whoever that is; nobody has verified them.
    """

    key: EngineKey
    model: str
    format_version: int
    layers: tuple[Blob, ...]
    manifest: Blob
    created_s: float
    signatures: tuple[Signature, ...] = ()

    @property
    def name(self) -> str:
        """Resource name, `engines/{key digest}`."""
        return f"engines/{self.key.digest}"

    def layer(self, title: str) -> Blob:
        """The layer titled `title`; KeyError where there is none."""
        for blob in self.layers:
            if blob.title == title:
                return blob
        raise KeyError(title)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One packed tensor: where it lies and how to view it.

    Args:
        blob: index into the engine's weight blobs (layer titled `weights/{blob:05}`).
        offset: bytes from the blob's start, a multiple of WEIGHT_ALIGNMENT_BYTES.
        dtype: torch's name without the prefix.
    """

    blob: int
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """The layer titled `weights.json`: packed tensors by weight name and role.

    `tensors["layers.0.qkv"] = {"weight": ..., "scale": ...}`; the roles are the layout's.
    """

    tensors: dict[str, dict[str, StoredTensor]]

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(
            {
                name: {
                    role: {"blob": t.blob, "offset": t.offset, "shape": t.shape, "dtype": t.dtype}
                    for role, t in roles.items()
                }
                for name, roles in self.tensors.items()
            }
        )

    @staticmethod
    def from_json(text: bytes) -> "WeightIndex":
        """The index that `to_json` wrote."""
        return WeightIndex(
            {
                name: {
                    role: StoredTensor(t["blob"], t["offset"], tuple(t["shape"]), t["dtype"])
                    for role, t in roles.items()
                }
                for name, roles in json.loads(text).items()
            }
        )
