"""Draws a step's tokens on the device, into the token table and into tensors that are read back."""

from collections.abc import Callable, Mapping

import torch

from kernels.launch import Grid
from kernels.launcher import KernelLibrary
from kernels.logits import launch as logits
from kernels.sampling import launch as sampling
from kernels.truncation import launch as truncation
from kernels.variant import KernelVariant
from runtime_service.execution.device_rows import DeviceRows, SentStep
from runtime_service.execution.row_parameters import ADJUSTS, DRAWS_RANDOM, REPORTS, TRUNCATES


class DeviceSampler:
    """The sampling kernels, bound to the rows.

    Args:
        scratch: as `sampler_scratch` gives it.
        copy_logits: keeps a step's logits [S, V] as they are until the next step is launched.
    """

    def __init__(
        self,
        library: KernelLibrary,
        rows: DeviceRows,
        vocab_size: int,
        scratch: Mapping[str, torch.Tensor],
        copy_logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        count = rows.layout.max_sequences
        self._vocab_size = vocab_size
        self._copy_logits = copy_logits
        # Kernels whose operands have one name share its memory.
        self._memory = {
            **scratch,
            "message": rows.message,
            "tokens": rows.tokens,
            "sampling": rows.sampling,
            "edits": rows.edits,
        }
        self._integers = {"max_sequences": count, "tokens_stride": rows.layout.tokens_stride}
        self._adjust = self._bound(library, logits.adjust_variant(vocab_size))
        self._draw_best = self._bound(library, sampling.draw_best_variant(vocab_size))
        self._draw_random = self._bound(library, sampling.draw_random_variant(vocab_size))
        self._narrow = [self._bound(library, v) for v in truncation.narrow_variants(vocab_size)]
        self._gather = self._bound(library, truncation.gather_variant(vocab_size))
        self._finish = self._bound(library, truncation.finish_variant(vocab_size))
        self._report = self._bound(library, logits.report_variant(vocab_size))

    def launch(
        self,
        logits_SV: torch.Tensor,
        step: SentStep,
        drawn_S: torch.Tensor,
        reports_SW: torch.Tensor,
    ) -> None:
        """Draws for every sequence of the step that was sent last; does not wait.

        Args:
            logits_SV: fp32; changed where sequences adjust them.
            drawn_S: int32, takes the token of each sequence that draws, -1 where its logits are not finite. No kernel
                reads it: it may be the host's pinned memory.
            reports_SW: int32 [S, REPORT_WORDS], likewise how likely the token was, where that is asked for
                (`kernels/logits/triton.py`).
        """
        count, vocab_size, given_SV = step.num_sequences, self._vocab_size, logits_SV
        if step.needs & ADJUSTS:
            if step.needs & REPORTS:  # they tell of the model's own
                given_SV = self._copy_logits(logits_SV)
            self._adjust(logits.adjust_grid(count), logits_SV)
        draw_grid = sampling.greedy_grid(count, vocab_size)
        self._draw_best(draw_grid, logits_SV, drawn=drawn_S)
        if step.needs & DRAWS_RANDOM:
            self._draw_random(draw_grid, logits_SV, drawn=drawn_S)
        if step.needs & TRUNCATES:
            grid = truncation.row_grid(count, vocab_size)
            for narrow in self._narrow:
                narrow(grid, logits_SV)
            self._gather(grid, logits_SV)
            self._finish((count, 1, 1), logits_SV, drawn=drawn_S)
        if step.needs & REPORTS:
            self._report(logits.report_grid(count, vocab_size), given_SV, reports=reports_SW)

    def _bound(self, library: KernelLibrary, variant: KernelVariant) -> "_Bound":
        operands = {name: tensor.data_ptr() for name, tensor in self._memory.items()}
        return _Bound(library, variant, {**operands, **self._integers})


class _Bound:
    """A kernel that waits for its grid, the logits, and what is given by name: addresses of others do not change."""

    def __init__(
        self, library: KernelLibrary, variant: KernelVariant, operands: dict[str, int]
    ) -> None:
        self._kernel = library.kernel(variant)
        self._names = [argument.name for argument in variant.arguments]
        self._operands = operands

    def __call__(self, grid: Grid, logits_SV: torch.Tensor, **given: torch.Tensor) -> None:
        at = {name: tensor.data_ptr() for name, tensor in given.items()}
        operands = {**self._operands, "logits": logits_SV.data_ptr(), **at}
        self._kernel(grid, *(operands[name] for name in self._names))


def sampler_scratch(count: int, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Memory of the kernels by name, for `count` rows; what must start at 0 does, and is left so by every kernel."""

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    programs, _, _ = logits.adjust_grid(count)
    chunks, report_chunks = truncation.num_chunks(vocab_size), logits.num_chunks(vocab_size)
    return {
        "best": zeros(torch.int64, count),
        "counters": zeros(torch.int32, count),
        "highest": zeros(torch.float32, count),
        "counts": zeros(torch.int32, programs, vocab_size),
        "found": zeros(torch.int32, count),
        "weights": zeros(torch.float32, count, 2),
        "partials": zeros(torch.float32, count, chunks, 1 << truncation.DIGIT_BITS),
        "lengths": zeros(torch.int32, count),
        "listed_tokens": zeros(torch.int32, count, truncation.CAPACITY),
        "listed_scores": zeros(torch.float32, count, truncation.CAPACITY),
        "maxima": zeros(torch.float32, count, report_chunks),
        "sums": zeros(torch.float32, count, report_chunks),
        "ranks": zeros(torch.int32, count, report_chunks),
        "tops": zeros(torch.int64, count, report_chunks, logits.TOP_BLOCK),
    }
