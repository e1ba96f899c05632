"""What an engine is called and what it is made of.

An engine is a value: its key says everything that went into it, its manifest lists its blobs. This
file knows names and JSON; where blobs are kept is `shared/store/`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

FORMAT_VERSION = 1
READABLE_FORMATS = (1,)

ARTIFACT_TYPE = "application/vnd.millrace.engine.v1"
GRAPH_TYPE = "application/vnd.millrace.engine.graph.v1+json"
WEIGHT_INDEX_TYPE = "application/vnd.millrace.engine.weight-index.v1+json"
WEIGHTS_TYPE = "application/vnd.millrace.engine.weights.v1"
FILE_TYPE = "application/vnd.millrace.engine.file.v1"
QUALITY_TYPE = "application/vnd.millrace.engine.quality.v1+json"
KERNELS_TYPE = "application/vnd.millrace.engine.kernels.v1"
TUNING_TYPE = "application/vnd.millrace.tuning.v1+json"

MAX_WEIGHT_BLOB_BYTES = 256 << 20
WEIGHT_ALIGNMENT_BYTES = 256

# What a group size of 0 stands for in schemes that have groups; part of the wire contract.
DEFAULT_GROUP_SIZES = {"int4-rtn": 64, "int4-awq": 64, "int4-gptq": 64}
# Names that stand for a scheme's own.
SCHEME_ALIASES = {"int4": "int4-rtn"}

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Claims that `text` is `sha256:` and 64 lowercase hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def canonical_json(value: object) -> bytes:
    """`value` as JSON with one possible spelling: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True, order=True)
class QuantConfig:
    """How weights are stored, and what that may cost: the whole recipe, as a key holds it.

    Scheme, group size and KV cache are what a selector finds an engine by; the rest only tells builds apart.

    Args:
        scheme: its name; an alias becomes the name that it stands for.
        group_size: values per scale; 0 = the scheme's default.
        keep: patterns of weights that stay in bf16; kept sorted, so that order does not matter.
        calibration_digest: SHA-256 of the text that the build calibrates and measures with.
        calibration_tokens: how many of it a scheme looks at; 0 = it looks at none, or the default.
        max_kl: the mean KL divergence, in nats a token, that a build may cost; 0 = the default.
        max_perplexity_increase: as a share of the unquantized perplexity; 0 = the default.
        auto_keep: beyond these the build keeps more weights in bf16 instead of failing.
        skip_quality: nothing is measured, so nothing is promised.
        kv_cache: how keys and values are kept: "fp8" or "int8"; "" = as activations are.
        probe_tokens: of the longest context that facts are hidden in and asked for; 0 = the default.
        no_act_order: GPTQ rounds columns as they are stored, not the most active first.
    """

    scheme: str
    group_size: int = 0
    keep: tuple[str, ...] = ()
    calibration_digest: str = ""
    calibration_tokens: int = 0
    max_kl: float = 0.0
    max_perplexity_increase: float = 0.0
    auto_keep: bool = False
    skip_quality: bool = False
    kv_cache: str = ""
    probe_tokens: int = 0
    no_act_order: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", SCHEME_ALIASES.get(self.scheme, self.scheme))
        object.__setattr__(self, "keep", tuple(sorted(set(self.keep))))

    def __str__(self) -> str:
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"{self.scheme}{group}-kv-{self.kv_cache}" if self.kv_cache else self.scheme + group

    @property
    def resolved(self) -> "QuantConfig":
        """This quantization with its default group size spelled out."""
        size = self.group_size or DEFAULT_GROUP_SIZES.get(self.scheme, 0)
        return replace(self, group_size=size)

    def to_dict(self) -> dict[str, object]:
        """As JSON knows it. Fields that say nothing are left out: keys from before them stay."""
        always = {"scheme": self.scheme, "group_size": self.group_size}
        return always | {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in always and getattr(self, item.name) != item.default
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "QuantConfig":
        """The recipe that `to_dict` wrote."""
        return QuantConfig(**{**raw, "keep": tuple(raw.get("keep", ()))})


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
            "quant": self.quant.to_dict(),
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
            QuantConfig.from_dict(quant),
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
        layers: graph, weight index, weight blobs, quality report, files (tokenizer, ...), kernels;
            in this order.
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
        layers: graph, weight index, weight blobs, quality report, files (tokenizer, ...), kernels;
            in this order.
        manifest: descriptor of the OCI manifest itself.
        created_s: Unix time of publication: from the store's index, never from a hashed blob.
        signatures: by whom, whoever that is; nobody has verified them.
        tunings: what was measured of it (`shared/tuning.py`), a blob for each GPU, titled by the GPU's name.
    """

    key: EngineKey
    model: str
    format_version: int
    layers: tuple[Blob, ...]
    manifest: Blob
    created_s: float
    signatures: tuple[Signature, ...] = ()
    tunings: tuple[Blob, ...] = ()

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
