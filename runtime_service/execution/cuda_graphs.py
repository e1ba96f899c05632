"""A step's forward pass on an NVIDIA GPU: captured graphs for decode and for small mixed steps, launches for others.

Padding exists only here: a step replays the graph of the next larger bucket, keyed by its number of tokens alone, and
one that is launched is padded to the next larger number of sequences that the library has loaded kernels for. Tokens
and sequences beyond the step have length 0, write nowhere and are read by nobody. A graph makes its own inputs from the
message that was sent before, so that nothing of a step is baked into it.

Legend: T packed tokens, S sequences, R rows whose logits are wanted, V vocabulary.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
import torch

from kernels.kv_cache import by_layer, kv_format
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary
from kernels.regimes import Regime
from runtime_service.device_full import what_is_full
from runtime_service.execution.cuda_executor import CudaExecutor, rope_table
from runtime_service.execution.device_rows import DeviceRows, SentStep
from runtime_service.execution.device_stream import DeviceStream
from runtime_service.execution.step_inputs import StepInputs
from runtime_service.limits import RuntimeLimits
from shared.ir import Graph

# Beyond it a step's launches take less time than its kernels.
_MAX_CAPTURED_TOKENS = 512
_FIRST_MIXED_BUCKET = 16

_log = structlog.get_logger()

# Whether every sequence has one token, and the bucket: tokens of the largest step that the graph serves.
GraphKey = tuple[bool, int]


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    logits_RV: torch.Tensor


class CudaGraphExecutor:
    """Steps of one engine, with its KV cache and its captured graphs.

    Args:
        executor: prepared for `regimes`.
        regimes: decode ones, whose `max_sequences` grow, and ragged ones, whose `max_tokens` grow; 0 is any number.
    """

    def __init__(
        self,
        graph: Graph,
        executor: CudaExecutor,
        regimes: Sequence[Regime],
        library: KernelLibrary,
        rows: DeviceRows,
        limits: RuntimeLimits,
        stream: DeviceStream,
    ) -> None:
        self._executor = executor
        self._stream = stream
        self._rows = rows
        self._decode = [regime for regime in regimes if regime.max_sequences]
        self._ragged = [regime for regime in regimes if not regime.max_sequences]
        self._max_sequences = limits.max_sequences
        self._launched_sequences = launched_buckets(limits.max_sequences)
        self._kv_parts = kv_format(graph).allocate(
            graph, limits.num_blocks, limits.block_tokens, partial(_zeros, device=stream.device)
        )
        caches = by_layer(self._kv_parts)
        rope = rope_of(graph, limits.max_sequence_tokens, stream.device)
        self._inputs = StepInputs(
            library, rows, executor.max_sizes, limits.block_tokens, caches, rope
        )
        # In the order of capturing; what is captured already, ascending.
        self._to_capture = graphs_to_capture(limits, self._decode[-1].max_sequences)
        self._captured_buckets: dict[bool, list[int]] = {False: [], True: []}
        self._captured: dict[GraphKey, _Captured] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs that are captured."""
        return len(self._captured)

    @property
    def max_logit_rows(self) -> int:
        """The most tokens of a step that wants all of their logits."""
        return self._executor.max_sizes.rows

    def capture_few(self) -> None:
        """Captures those of `first_graphs`: until more are there, steps are padded up to them."""
        self._capture_all(first_graphs(self._to_capture))

    def capture_next(self) -> bool:
        """Captures one more graph; False where none was left. For times when nothing else is to be done.

        Where the device has no room for one, no other is tried: steps are padded up to what is there.
        """
        if not self._to_capture:
            return False
        try:
            self._capture_all(self._to_capture[:1])
        except RuntimeError as error:
            problem = what_is_full(error)
            if not problem:
                raise
            _log.warning("graphs_not_captured", problem=problem, captured_graphs=self.num_graphs)
            self._to_capture.clear()
            return False
        return True

    def capture(self) -> None:
        """Captures every bucket's graph that is not captured yet, largest first."""
        self._capture_all(list(self._to_capture))

    def load_products(self) -> None:
        """Loads what the library multiplies with in steps that are launched: `CudaExecutor.load_products`."""
        tokens = launched_buckets(self._executor.max_sizes.tokens)
        most = min(self._max_sequences, self._executor.max_sizes.rows)
        self._executor.load_products(self._ragged[-1], tokens, launched_buckets(most))

    def run(self, step: SentStep) -> torch.Tensor:
        """Launches the step that was sent last and does not wait.

        Returns:
            Logits [S, V] of each sequence's last token, fp32, in memory that the next step overwrites.
        """
        buckets = self._captured_buckets[step.is_decode]
        index = bisect.bisect_left(buckets, step.num_tokens)
        if index == len(buckets):
            most = self._launched_sequences
            sequences = min(most[bisect.bisect_left(most, step.num_sequences)], step.num_tokens)
            sizes = Sizes(step.num_tokens, sequences, sequences)
            logits_RV = self._executor.run(
                self._ragged_regime(sizes.tokens), self._inputs.launch(sizes)
            )
            return logits_RV[: step.num_sequences]
        captured = self._captured[step.is_decode, buckets[index]]
        captured.replay()
        return captured.logits_RV[: step.num_sequences]

    def run_for_all_logits(self, step: SentStep) -> torch.Tensor:
        """Likewise, for a step of at most `max_logit_rows` tokens: logits [T, V] of every token."""
        sizes = Sizes(step.num_tokens, step.num_sequences, step.num_tokens)
        batch = self._inputs.launch(sizes, wants_all_logits=True)
        return self._executor.run(self._ragged_regime(sizes.tokens), batch)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV blocks in all layers, one after the other."""
        for source, destination in copies:
            for part in self._kv_parts:
                part[:, destination].copy_(part[:, source])

    def _ragged_regime(self, tokens: int) -> Regime:
        return next(r for r in self._ragged if not r.max_tokens or r.max_tokens >= tokens)

    def _capture_all(self, keys: Sequence[GraphKey]) -> None:
        self._rows.send_nothing()
        for is_decode, bucket in keys:
            self._capture(is_decode, bucket)
            self._to_capture.remove((is_decode, bucket))

    def _capture(self, is_decode: bool, bucket: int) -> None:
        if is_decode:
            regime = next(r for r in self._decode if r.max_sequences >= bucket)
        else:
            regime = self._ragged_regime(bucket)
        # Every sequence has a token: T bounds S, and S bounds the rows that can be wanted.
        sequences = min(bucket, self._max_sequences)
        sizes = Sizes(bucket, sequences, sequences)
        logits: list[torch.Tensor] = []

        def launch() -> None:
            logits[:] = [self._executor.run(regime, self._inputs.launch(sizes))]

        replay = self._stream.capture(launch)
        self._captured[is_decode, bucket] = _Captured(replay, logits[0])
        bisect.insort(self._captured_buckets[is_decode], bucket)


def graphs_to_capture(limits: RuntimeLimits, most_decoding: int) -> list[GraphKey]:
    """Every graph that steps may replay, in the order of capturing: of each kind the largest first.

    Args:
        most_decoding: sequences of a decode step that the engine has kernels for.
    """
    most_tokens = min(limits.max_step_tokens, _MAX_CAPTURED_TOKENS)
    decode = decode_buckets(min(most_tokens, limits.max_sequences, most_decoding))
    mixed = mixed_buckets(most_tokens)
    return [(False, bucket) for bucket in reversed(mixed)] + [(True, b) for b in reversed(decode)]


def first_graphs(keys: Sequence[GraphKey]) -> list[GraphKey]:
    """Powers of two and the largest of each kind: few, and whatever has a graph at all has one to be padded to.

    A server that is never idle captures no others.
    """
    largest = {is_decode: max(b for d, b in keys if d is is_decode) for is_decode, _ in keys}
    return [key for key in keys if key[1] & (key[1] - 1) == 0 or key[1] == largest[key[0]]]


def decode_buckets(most: int) -> list[int]:
    """Sizes of captured decode steps.

    Up to 16 tokens share one tile of the linears, so that padding costs nothing; beyond, it stays under 10 %.
    """
    few = [bucket for bucket in (1, 2, 4, 8) if bucket < min(most, 16)]
    return few + mixed_buckets(most)


def mixed_buckets(most: int) -> list[int]:
    """Sizes of captured mixed steps, from 16 tokens on, such that less than 10 % of a step is padding.

    Powers of two, which are frequent, are among them.
    """
    buckets = [min(_FIRST_MIXED_BUCKET, most)]
    while (last := buckets[-1]) < most:
        # The smallest step that the next bucket takes has last + 1 tokens: (next - (last + 1)) / next < 0.1.
        following = max(last + 1, -(-(last + 1) * 10 // 9) - 1)
        buckets.append(min(following, 1 << last.bit_length(), most))
    return buckets


def launched_buckets(most: int) -> list[int]:
    """Sizes that the library's products are loaded for: numbers of sequences, which launched steps are padded to, or of
    tokens, which they are not."""
    powers = [1 << power for power in range(4, most.bit_length())]
    return [size for power in powers for size in (power, power * 3 // 2) if size < most] + [most]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def rope_of(graph: Graph, num_positions: int, device: torch.device) -> torch.Tensor:
    """The rotations of a graph's positions, as `rope_table` gives them."""
    inv_freq, scaling = _rotation(graph)
    return rope_table(inv_freq, scaling, num_positions, device)


def rope_bytes(graph: Graph) -> int:
    """What they take for each position."""
    return 2 * len(_rotation(graph)[0]) * torch.float32.itemsize


def _rotation(graph: Graph) -> tuple[list[float], float]:
    """inv_freq and attention_scaling of every layer."""
    nodes = [node for node in graph.nodes if node.op == "qkv_rope_write"]
    forms = {(node.attrs["inv_freq"], node.attrs["attention_scaling"]) for node in nodes}
    assert len(forms) == 1, f"layers rotate in {len(forms)} ways"
    inv_freq, scaling = forms.pop()
    assert isinstance(inv_freq, tuple)
    assert isinstance(scaling, int | float)
    return [float(frequency) for frequency in inv_freq], float(scaling)
