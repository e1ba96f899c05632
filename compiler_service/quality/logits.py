"""Two models' logits compared, a slice of the vocabulary at a time: never all logits in memory.

For reference logits l, quantized ones m, p = softmax(l), q = softmax(m) and a text's next token t:

    KL(p || q) = sum_v p[v] (l[v] - m[v]) - lse(l) + lse(m);   nll = lse(l) - l[t]

All are sums over v, kept relative to a running maximum as in the online softmax.
Legend: R rows (positions), C tokens of the vocabulary in a slice.
Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ComparedLogits:
    """Per row, fp64 and int64: divergence, losses in nats, and each model's likeliest token."""

    kl_R: torch.Tensor
    reference_loss_R: torch.Tensor
    quantized_loss_R: torch.Tensor
    reference_top_R: torch.Tensor
    quantized_top_R: torch.Tensor


class LogitComparison:
    """Takes slices of both models' logits in any order; then `finish`.

    Args:
        following_R: int64, the text's next token of each row.
    """

    def __init__(self, following_R: torch.Tensor) -> None:
        self._following_R = following_R
        self._reference, self._quantized = _Softmax(len(following_R)), _Softmax(len(following_R))
        self._difference_R = torch.zeros(len(following_R), dtype=torch.float64)

    def add(self, first: int, reference_RC: torch.Tensor, quantized_RC: torch.Tensor) -> None:
        """Takes the logits, fp32, of the tokens from `first` on."""
        weights_RC, shrink_R = self._reference.add(first, reference_RC, self._following_R)
        self._quantized.add(first, quantized_RC, self._following_R)
        difference_RC = weights_RC.mul_(reference_RC - quantized_RC)
        self._difference_R.mul_(shrink_R).add_(difference_RC.sum(1, dtype=torch.float64))

    def finish(self) -> ComparedLogits:
        """What all slices together say."""
        reference, quantized = self._reference, self._quantized
        kl_R = self._difference_R / reference.sum_R - reference.log_sum_R + quantized.log_sum_R
        return ComparedLogits(
            kl_R=kl_R.clamp_(min=0.0),
            reference_loss_R=reference.log_sum_R - reference.target_R,
            quantized_loss_R=quantized.log_sum_R - quantized.target_R,
            reference_top_R=reference.top_R,
            quantized_top_R=quantized.top_R,
        )


class _Softmax:
    """One model's running maximum, its place, the sum of exponentials and the target's logit."""

    def __init__(self, num_rows: int) -> None:
        self.max_R = torch.full((num_rows,), -torch.inf, dtype=torch.float64)
        self.sum_R = torch.zeros(num_rows, dtype=torch.float64)
        self.target_R = torch.zeros(num_rows, dtype=torch.float64)
        self.top_R = torch.zeros(num_rows, dtype=torch.int64)

    @property
    def log_sum_R(self) -> torch.Tensor:
        return self.max_R + self.sum_R.log()

    def add(
        self, first: int, logits_RC: torch.Tensor, following_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(logit - new maximum), and what sums before are multiplied with."""
        slice_max_R, slice_top_R = logits_RC.max(1)
        is_higher_R = slice_max_R > self.max_R
        self.top_R = torch.where(is_higher_R, slice_top_R + first, self.top_R)
        max_R = torch.maximum(self.max_R, slice_max_R.double())
        shrink_R = (self.max_R - max_R).exp_()
        weights_RC = (logits_RC - max_R.float()[:, None]).exp_()
        self.sum_R.mul_(shrink_R).add_(weights_RC.sum(1, dtype=torch.float64))
        self.max_R = max_R
        place_R = following_R - first
        is_here_R = (place_R >= 0) & (place_R < logits_RC.shape[1])
        found_R = logits_RC.gather(1, place_R.clamp(0, logits_RC.shape[1] - 1)[:, None])[:, 0]
        self.target_R = torch.where(is_here_R, found_R.double(), self.target_R)
        return weights_RC, shrink_R
