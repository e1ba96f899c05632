"""Builds one engine: from a checkpoint to a published manifest. It knows no queue and no wire.

    import     open the checkpoint, check that it is the model that the key names
    passes     lower, fuse, choose layouts: the plan
    calibrate  look at a text through the model, where the scheme has to
    quantize   stream weights tensor by tensor into blobs, while the files are hashed once more,
               and run both graphs along over held-out text
    quality    hold the difference against the limits
    kernels    machine code, for arches that have any
    publish    name the engine

Only kernels differ between arches: where another arch of the same model, scheme and builder is in
the store, its other layers are adopted and no weight is read.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from compiler_service.build_plan import BuildPlan
from compiler_service.checkpoints.checkpoint import Checkpoint
from compiler_service.checkpoints.digest import FileHashes, model_digest, verify_unchanged
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.fingerprints import share_weights
from compiler_service.planning import plan
from compiler_service.progress import BuildProgress
from compiler_service.quantization import scheme_named
from compiler_service.quantization.as_is import AS_IS, notes_of
from compiler_service.quantized_weights import QuantizedWeights, quantize_weights
from compiler_service.weight_table import require_tied_head
from shared.arch import arch_named
from shared.engine import (
    FILE_TYPE,
    GRAPH_TYPE,
    KERNELS_TYPE,
    Blob,
    EngineDraft,
    EngineKey,
    EngineManifest,
)
from shared.errors import EngineNotFound, ModelChanged
from shared.ir import Graph
from shared.store.local import LocalStore

log = structlog.get_logger()

GRAPH_TITLE = "graph.json"

# All stages in order, and how long each takes, in no unit: for progress. A build enters those that
# it needs.
STAGES = {
    "import": 4,
    "passes": 2,
    "calibrate": 80,
    "quantize": 80,
    "quality": 4,
    "kernels": 40,
    "publish": 2,
}


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What is built, from where. `cache_dir` keeps file hashes between builds."""

    model_uri: str
    key: EngineKey
    model: str
    cache_dir: Path
    calibration_uri: str = ""


class BuildCancelled(Exception):
    """Somebody asked the build to stop; nothing of it is visible."""


Report = Callable[[BuildProgress], None]
IsCancelled = Callable[[], bool]


def build(
    request: BuildRequest,
    store: LocalStore,
    report: Report,
    is_cancelled: IsCancelled = lambda: False,
) -> EngineManifest:
    """The engine of `request.key`: built and published, or the one that is there already.

    Args:
        report: called at every stage and after every weight.
        is_cancelled: asked as often.

    Raises:
        BuildCancelled: `is_cancelled` said so.
        MillraceError: the checkpoint, the key or the disk is at fault.
    """
    steps = _Steps(report, is_cancelled, _skipped_stages(request.key))
    with store.pin():
        engine = _published(store, request.key)
        if engine is None:
            engine = store.publish(_draft(request, store, steps))
    if engine.model != request.model:
        store.add_model_name(engine, request.model)
    return engine


def _draft(request: BuildRequest, store: LocalStore, steps: "_Steps") -> EngineDraft:
    steps.enter("import")
    checkpoint = open_checkpoint(request.model_uri)
    hashes = FileHashes(request.cache_dir)
    total = sum(p.stat().st_size for p in checkpoint.digest_inputs.values() if isinstance(p, Path))
    if model_digest(checkpoint.digest_inputs, hashes, steps.reading(total)) != (
        request.key.model_digest
    ):
        raise ModelChanged(file=request.model_uri)
    build_plan = plan(checkpoint, request.key, request.model, lambda: steps.enter("passes"))
    if notes := notes_of(build_plan.graph):
        tell = log.info if request.key.quant.scheme == AS_IS else log.warning
        tell("checkpoint_was_quantized", engine=request.key.digest, notes=notes)
    layers = _adopted_layers(store, request.key)
    if layers is None:
        made = _quantized(request, store, build_plan, checkpoint, hashes, steps)
        layers = (
            *_graph_layers(store, build_plan.source, made.graph),
            *made.layers,
            *_file_layers(store, build_plan),
        )
        graph = made.graph
    else:
        graph = _adopted_graph(store, layers)
    steps.enter("kernels")
    kernels = tuple(
        store.write_blob([content], KERNELS_TYPE, title)
        for title, content in machine_code(graph, request.key.arch, steps.share)
    )
    steps.enter("publish")
    return EngineDraft(request.key, request.model, (*layers, *kernels))


def machine_code(
    graph: Graph, arch_name: str, on_share: Callable[[float], None] = lambda share: None
) -> list[tuple[str, bytes]]:
    """The kernel layers of an engine, (title, bytes); none where torch runs the graph.

    Args:
        on_share: told the share of its kernels that is compiled, now and then.
    """
    arch = arch_named(arch_name)
    if not arch.is_gpu:
        return []
    # Only a build for a GPU needs the compiler's half of kernels/.
    from kernels.aot import compile_variants, pack_kernels
    from kernels.lowering import variants

    wanted = variants(graph, arch, with_candidates=True)
    return pack_kernels(compile_variants(wanted, arch, on_share=on_share), arch)


def _published(store: LocalStore, key: EngineKey) -> EngineManifest | None:
    try:
        return store.get(key.digest)
    except EngineNotFound:
        return None


def _adopted_layers(store: LocalStore, key: EngineKey) -> tuple[Blob, ...] | None:
    """The layers of an engine that differs in arch alone, if the store has one and it is whole."""
    for engine in store.list():
        if not share_weights(engine.key, key):
            continue
        layers = tuple(blob for blob in engine.layers if blob.media_type != KERNELS_TYPE)
        if all(store.adopt(blob) for blob in layers):
            return layers
    return None


def _adopted_graph(store: LocalStore, layers: tuple[Blob, ...]) -> Graph:
    # A build may have kept more weights in bf16 than its plan says.
    (blob,) = (blob for blob in layers if blob.title == GRAPH_TITLE)
    return Graph.from_json(store.read_all(blob.digest).decode())


def _graph_layers(store: LocalStore, source: Graph, graph: Graph) -> tuple[Blob, ...]:
    return tuple(
        store.write_blob([graph.to_json().encode()], GRAPH_TYPE, title)
        for title, graph in ((GRAPH_TITLE, graph), ("graph.source.json", source))
    )


def _quantized(
    request: BuildRequest,
    store: LocalStore,
    build_plan: BuildPlan,
    checkpoint: Checkpoint,
    hashes: FileHashes,
    steps: "_Steps",
) -> QuantizedWeights:
    """Makes the weights while a thread reads the files once more and hashes them.

    A file that changes at any moment of the build has another hash, or another state at its end.

    Raises:
        ModelChanged: one did; names it.
        InvalidModel, InvalidField, QualityGate: as in `quantize_weights`, or a tied head is not.
    """
    require_tied_head(build_plan.source, checkpoint)
    with ThreadPoolExecutor(1, thread_name_prefix="rehash") as pool:
        unchanged = pool.submit(
            verify_unchanged,
            checkpoint.digest_inputs,
            hashes,
            build_plan.key.model_digest,
            steps.check,
        )
        made = quantize_weights(
            store, build_plan, checkpoint, request.calibration_uri, steps.enter, steps.read
        )
        unchanged.result()
    for title, content in checkpoint.digest_inputs.items():
        if isinstance(content, Path) and hashes.known(content) is None:
            raise ModelChanged(file=title)
    return made


def _skipped_stages(key: EngineKey) -> frozenset[str]:
    """The stages that a build of this key does not have, or that take it no time."""
    quant, scheme = key.quant, scheme_named(key.quant)
    skipped = set()
    if not arch_named(key.arch).is_gpu:
        skipped.add("kernels")
    if scheme.calibrate is None:
        skipped.add("calibrate")
    if not scheme.measures(quant):
        skipped.add("quality")
    return frozenset(skipped)


def _file_layers(store: LocalStore, build_plan: BuildPlan) -> tuple[Blob, ...]:
    return tuple(
        store.write_blob([content], FILE_TYPE, title) for title, content in build_plan.files.items()
    )


class _Steps:
    """Where the build is; every step forward reports, and is where a cancel is noticed."""

    def __init__(
        self, report: Report, is_cancelled: IsCancelled, skipped: frozenset[str] = frozenset()
    ) -> None:
        self._report, self._is_cancelled = report, is_cancelled
        self._stage, self._done, self._total = "import", 0, 0
        self._fraction = self._share = 0.0
        shares = {stage: 0 if stage in skipped else share for stage, share in STAGES.items()}
        ends = list(itertools.accumulate(shares.values()))
        self._spans = {
            stage: ((end - share) / ends[-1], end / ends[-1])
            for (stage, share), end in zip(shares.items(), ends, strict=True)
        }

    def enter(self, stage: str, total_bytes: int = 0) -> None:
        self._stage, self._done, self._total, self._share = stage, 0, total_bytes, 0.0
        self._tell()

    def read(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._share = self._done / self._total if self._total else 0.0
        self._tell()

    def share(self, share: float) -> None:
        """So much of the stage is done; no bytes of the checkpoint tell how much."""
        self._share = share
        self._tell()

    def reading(self, total_bytes: int) -> Callable[[int], None]:
        self._total = total_bytes
        return self.read

    def check(self, num_bytes: int = 0) -> None:
        if self._is_cancelled():
            raise BuildCancelled

    def _tell(self) -> None:
        start, end = self._spans[self._stage]
        share = self._share
        # The search for layers to keep reads the checkpoint again and again.
        self._fraction = max(self._fraction, start * (1 - share) + end * share)
        fraction = self._fraction
        self._report(BuildProgress(self._stage, fraction, self._done, self._total))
        self.check()
