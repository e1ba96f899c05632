"""The quality report: what was measured, as an engine carries it in its layer `quality.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from compiler_service.quality.logits import ComparedLogits
from compiler_service.quality.probe import Probe
from shared.engine import QuantConfig, canonical_json

QUALITY_TITLE = "quality.json"
_DIGITS = 6
_NUM_WORST = 8


@dataclass(frozen=True, slots=True)
class WeightError:
    """What storing one weight cost.

    Args:
        error: relative to the unquantized output, on the unquantized input: this weight's own.
        drift: relative to the unquantized output, on what the quantized graph feeds it: its own
            and all before it.
        impact: `error` times the share of the residual stream that its block writes: how far this
            weight alone moves what later layers read. Weights are ranked by it.
    """

    weight: str
    layout: str
    error: float
    drift: float
    impact: float


@dataclass(frozen=True, slots=True)
class NeedleResult:
    """Whether the fact at `depth` was retrieved by each model. What the unquantized one does not
    retrieve is not scored."""

    depth: float
    unquantized: bool
    quantized: bool


@dataclass(frozen=True, slots=True)
class ContextResult:
    """The facts in a context of `tokens`; none, and why, where it was skipped."""

    tokens: int
    skipped: str
    needles: tuple[NeedleResult, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantized graph against the unquantized one. KL in nats a token.

    Args:
        contexts: of the long-context probe, the shortest first.
    """

    num_tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity_unquantized: float
    perplexity_quantized: float
    weights: tuple[WeightError, ...]
    contexts: tuple[ContextResult, ...]

    @property
    def scored_needles(self) -> list[NeedleResult]:
        """Those that the unquantized model retrieves; none = the probe is not applicable."""
        return [n for context in self.contexts for n in context.needles if n.unquantized]

    @property
    def perplexity_increase(self) -> float:
        """As a share of the unquantized model's."""
        return self.perplexity_quantized / self.perplexity_unquantized - 1

    @property
    def worst(self) -> list[str]:
        """Names of quantized weights, the largest impact first."""
        quantized = [weight for weight in self.weights if weight.layout != "plain"]
        return [w.weight for w in sorted(quantized, key=lambda w: w.impact, reverse=True)]


def measurement_of(
    probe: Probe, logits: ComparedLogits, weights: Sequence[WeightError]
) -> Measurement:
    """The numbers of one comparison."""
    count = probe.num_measured
    kl_R = logits.kl_R[:count]
    agreement_R = (logits.reference_top_R == logits.quantized_top_R)[:count].double()
    return Measurement(
        num_tokens=count,
        kl_mean=float(kl_R.mean()),
        kl_p99=float(kl_R.quantile(0.99)),
        top1_agreement=float(agreement_R.mean()),
        perplexity_unquantized=float(logits.reference_loss_R[:count].mean().exp()),
        perplexity_quantized=float(logits.quantized_loss_R[:count].mean().exp()),
        weights=tuple(weights),
        contexts=_contexts(probe, logits),
    )


def _contexts(probe: Probe, logits: ComparedLogits) -> tuple[ContextResult, ...]:
    contexts, first = [], probe.num_measured
    for context in probe.contexts:
        results = []
        for needle in context.needles:
            rows = slice(first, first + len(needle.answer))
            answer = torch.tensor(needle.answer)
            tops = (logits.reference_top_R[rows], logits.quantized_top_R[rows])
            results.append(NeedleResult(needle.depth, *(torch.equal(top, answer) for top in tops)))
            first = rows.stop
        contexts.append(ContextResult(context.num_tokens, context.skipped, tuple(results)))
    return tuple(contexts)


def report_json(
    measurement: Measurement,
    quant: QuantConfig,
    calibration_tokens: int,
    kept: Sequence[str],
    auto_kept: Sequence[str],
) -> bytes:
    """The layer `quality.json`.

    Args:
        calibration_tokens: that the scheme looked at; a text may have fewer than `quant` asks for.
        kept: weights in bf16 that the scheme would quantize.
        auto_kept: those of them that the build chose.
    """
    return canonical_json(
        {
            "measured_tokens": measurement.num_tokens,
            "text_digest": quant.calibration_digest,
            "calibration_tokens": calibration_tokens,
            "kv_cache": quant.kv_cache,
            "kl": {"mean": _number(measurement.kl_mean), "p99": _number(measurement.kl_p99)},
            "top1_agreement": _number(measurement.top1_agreement),
            "perplexity": {
                "unquantized": _number(measurement.perplexity_unquantized),
                "quantized": _number(measurement.perplexity_quantized),
                "increase": _number(measurement.perplexity_increase),
            },
            "limits": {
                "max_kl": quant.max_kl,
                "max_perplexity_increase": quant.max_perplexity_increase,
            },
            "weights": [
                {
                    **asdict(w),
                    "error": _number(w.error),
                    "drift": _number(w.drift),
                    "impact": _number(w.impact),
                }
                for w in measurement.weights
            ],
            "worst": measurement.worst[:_NUM_WORST],
            "needle": {
                "is_applicable": bool(measurement.scored_needles),
                "num_scored": len(measurement.scored_needles),
                "num_retrieved": sum(n.quantized for n in measurement.scored_needles),
                "contexts": [asdict(context) for context in measurement.contexts],
            },
            "kept": sorted(kept),
            "auto_kept": sorted(auto_kept),
        }
    )


def _number(value: float) -> float:
    # More digits would only differ between CPUs.
    return float(f"{value:.{_DIGITS}g}")
