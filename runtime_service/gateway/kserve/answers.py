"""Events of one generation as KServe's clients read them: an answer, or many in a stream."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from millrace.kserve.v2 import inference_pb2 as kserve
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.kserve.requests import OUTPUTS, VERSION, Asked
from runtime_service.gateway.kserve.tensors import Value, add_output

# Python's word, which is what Triton's vLLM backend sends of a sample that goes on.
_GOES_ON = "None"
_REASONS = {
    pb.FINISH_REASON_STOP_TOKEN: "stop",
    pb.FINISH_REASON_STOP_STRING: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
}


@dataclass(slots=True)
class _Sample:
    text: str
    finish_reason: str = _GOES_ON
    num_tokens: int = 0
    cumulative_logprob: float = 0.0
    rows: list[pb.TokenLogprob] = field(default_factory=list)


class Answer:
    """What `asked` came to since the last response."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.is_final = False
        self._num_prompt_tokens = 0
        self._samples = [_Sample(asked.prefix) for _ in range(asked.start.sampling.n or 1)]

    def take(self, event: pb.Event) -> None:
        """Takes an event, which is no error."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._num_prompt_tokens = event.started.prompt_tokens
        elif kind == "tokens":
            chunk = event.tokens
            sample = self._samples[chunk.sample_index]
            sample.text += chunk.text
            sample.num_tokens += len(chunk.token_ids)
            sample.cumulative_logprob += sum(row.logprob for row in chunk.logprobs)
            sample.rows += chunk.logprobs
        else:
            self.is_final = True
            for finish in event.finished.samples:
                self._samples[finish.sample_index].finish_reason = _REASONS[finish.reason]

    @property
    def has_news(self) -> bool:
        """Claims that a stream's reader is to be told something."""
        return self.is_final or any(sample.num_tokens for sample in self._samples)

    def response(self) -> kserve.ModelInferResponse:
        """All that was taken; text and tokens are those since the response before."""
        samples = self._samples
        cumulative = [sample.cumulative_logprob for sample in samples]
        length = max(len(sample.rows) for sample in samples)
        values: dict[str, list[Value]] = {
            "text_output": [sample.text for sample in samples],
            "finish_reason": [sample.finish_reason for sample in samples],
            "cumulative_logprob": [*cumulative],
            "logprobs": [_logprobs_json(sample.rows) for sample in samples],
            "cum_log_probs": [*cumulative],
            # Rows of one length: what a shorter one lacks is 0, as the TensorRT-LLM backend has it.
            "output_log_probs": [
                sample.rows[place].logprob if place < len(sample.rows) else 0.0
                for sample in samples
                for place in range(length)
            ],
            "num_input_tokens": [self._num_prompt_tokens],
            "num_output_tokens": [sample.num_tokens for sample in samples],
        }
        response = bare_response(self.asked)
        for name in self.asked.outputs:
            shape = [len(samples), length] if name == "output_log_probs" else None
            add_output(response, name, OUTPUTS[name][0], values[name], shape)
        for sample in samples:
            sample.text, sample.num_tokens = "", 0
            sample.rows.clear()
        return response


def _logprobs_json(rows: Iterable[pb.TokenLogprob]) -> str:
    """An object a token: token ids, each with its log probability, as vLLM's backend writes it."""
    return json.dumps(
        [
            {
                # The likeliest come with their places; the token itself may be none of them.
                **{str(t.token_id): _one(t, n) for n, t in enumerate(row.top, start=1)},
                str(row.token_id): _one(row, row.rank),
            }
            for row in rows
        ]
    )


def _one(token: pb.TokenLogprob | pb.TopLogprob, rank: int) -> dict[str, object]:
    text = token.token.decode(errors="replace")
    # JSON has no infinity: of what cannot be there is no number.
    logprob = token.logprob if math.isfinite(token.logprob) else None
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


def bare_response(asked: Asked) -> kserve.ModelInferResponse:
    """A response without outputs."""
    return kserve.ModelInferResponse(model_name=asked.model, model_version=VERSION, id=asked.id)
