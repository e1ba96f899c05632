"""One generation by itself: what it tells its engine, and what is counted of it."""

from runtime_service.detokenizer import Detokenizer, TokenBytes
from runtime_service.engine_messages import AbortSamples, AddCredit, Command, SampleOutput
from runtime_service.generation import Generation
from runtime_service.metrics import RuntimeMetrics
from runtime_service.sample_text import SampleText
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.stop_strings import StopAutomaton
from tests.runtime_service.daemon import TOKENIZER


class _Link:
    def __init__(self) -> None:
        self.commands: list[Command] = []

    def send(self, command: Command) -> None:
        self.commands.append(command)

    def forget(self, request_id: int) -> None:
        pass


def two_samples(link: _Link, metrics: RuntimeMetrics, credit: int | None = None) -> Generation:
    """A generation that runs; its samples end at an exclamation mark."""
    generation = Generation("a", metrics, lambda _: None, lambda _: None)
    request = Request(7, [40], SamplingParams(), StopParams(9), num_samples=2, credit_tokens=credit)
    stops, table = StopAutomaton(["!"]), TokenBytes(TOKENIZER)
    texts = [SampleText(Detokenizer(table), stops, 0) for _ in range(2)]
    generation.submitted(link, request, texts, sends_logprobs=False)
    return generation


def test_token_that_nobody_gets_costs_no_credit() -> None:
    """The engine draws on until it hears of a stop string: the other sample would be short of that."""
    link = _Link()
    generation = two_samples(link, RuntimeMetrics(), credit=4)
    (end,) = TOKENIZER.encode("!").ids
    generation.on_output(SampleOutput(7, 0, (end,), num_cached_tokens=0), 1.0)
    assert link.commands == [AbortSamples(7, (0,))]
    generation.on_output(SampleOutput(7, 0, (40,)), 2.0)
    assert link.commands[1:] == [AddCredit(7, 1)]
    (chunk,) = (e.tokens for e in generation.take_events() if e.HasField("tokens"))
    assert list(chunk.token_ids) == [end]


def test_time_between_tokens_is_that_of_one_sample() -> None:
    """Samples gain theirs in one step: what a client waits for is the next token of each."""
    metrics = RuntimeMetrics()
    generation = two_samples(_Link(), metrics)
    for now_s in (1.0, 2.0, 3.0):
        for sample in range(2):
            generation.on_output(SampleOutput(7, sample, (40,), num_cached_tokens=0), now_s)
    found = metrics.inter_token_seconds.family("seconds", "")
    values = {s.name: s.value for s in found.samples}
    assert (values["seconds_count"], values["seconds_sum"]) == (4, 4.0)
