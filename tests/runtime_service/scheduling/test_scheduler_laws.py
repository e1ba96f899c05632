"""Laws 4 and 5 over random loads: batching never changes an answer, and nothing leaks."""

import random

import pytest

from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from tests.runtime_service.fake_runner import VOCAB_SIZE, prompt_scores_alone, small_limits
from tests.runtime_service.fake_runner import tokens_alone as alone
from tests.runtime_service.scheduling.driving import Drive


class RandomLoad:
    """Random clients of one scheduler, drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        limits = self._limits()
        self.drive = Drive(limits, max_unread_steps=self.random.randrange(4))
        self.limits = limits
        self.requests: dict[int, Request] = {}
        self.max_new_tokens: dict[int, int] = {}
        self.updated: set[int] = set()
        self.aborted: set[tuple[int, int]] = set()
        # Their clients grant nothing until everything else has ended.
        self.late: set[int] = set()
        # Prompts begin alike, so that prefixes are found.
        self._stems = [[self.random.randrange(3) for _ in range(120)] for _ in range(3)]

    def _limits(self) -> RuntimeLimits:
        pick = self.random.choice
        block_tokens = pick([1, 2, 4, 16])
        max_sequence_tokens = pick([24, 48, 64, 128])
        least = -(-max_sequence_tokens // block_tokens)
        return small_limits(
            max_sequence_tokens=max_sequence_tokens,
            max_sequences=pick([1, 3, 8, 16]),
            max_step_tokens=pick([2, 5, 16, 64]),
            block_tokens=block_tokens,
            num_blocks=pick([least, least + 2, 3 * least, 5 * least]),
        )

    def operate(self) -> None:
        """One random operation."""
        kind = self.random.random()
        if kind < 0.002:
            self.drive.run()
        elif kind < 0.2:
            # Enough wait to be chosen from, few enough to be admitted while others come.
            if self.drive.scheduler.stats().num_waiting < 12:
                self.add()
        elif kind < 0.24:
            self.abort()
        elif kind < 0.27:
            self.update()
        elif kind < 0.32:
            self.credit(self.random.randrange(1, 5))
        else:
            self.drive.step()

    def add(self) -> None:
        pick = self.random.choice
        request_id = len(self.requests)
        room = self.limits.max_sequence_tokens
        longest = min(room - 4, pick([20, 40, 120]))
        prompt = pick(self._stems)[: self.random.randrange(1, longest)]
        if pick([True, False]):
            prompt = [*prompt, self.random.randrange(VOCAB_SIZE)]
        num_samples = pick([1, 1, 1, 2, 4])
        resumed = [5, 6] if num_samples == 1 and pick([True, False, False]) else []
        most = room - len(prompt)
        ends = tuple(sorted({self.random.randrange(VOCAB_SIZE) for _ in range(pick([0, 3, 20]))}))
        max_new_tokens = self.random.randrange(len(resumed) + 1, most + 1)
        request = Request(
            request_id,
            prompt,
            SamplingParams(
                seed=self.random.getrandbits(64),
                num_logprobs=pick([None, None, 2]),
                prompt_logprobs=pick([False, False, True]),
            ),
            StopParams(max_new_tokens, self.random.randrange(max_new_tokens + 1), ends),
            resumed_token_ids=resumed,
            num_samples=num_samples,
            priority=pick([0, 0, 0, 1, -1]),
            cache_salt=pick(["", "", "other"]),
            credit_tokens=pick([None, None, 0, 1, 3]),
        )
        if pick([True, False, False, False]):
            self.late.add(request_id)
        self.requests[request_id] = request
        self.max_new_tokens[request_id] = max_new_tokens
        self.drive.add(request)

    def abort(self) -> None:
        if not self.requests:
            return
        request = self.requests[self.random.randrange(len(self.requests))]
        whole = self.random.choice([True, False])
        chosen = () if whole else (self.random.randrange(request.num_samples),)
        self.drive.scheduler.abort(request.request_id, chosen)
        for index in chosen or range(request.num_samples):
            if (request.request_id, index) not in self.drive.finishes:
                self.aborted.add((request.request_id, index))

    def update(self) -> None:
        if not self.requests:
            return
        request = self.requests[self.random.randrange(len(self.requests))]
        room = self.limits.max_sequence_tokens - len(request.prompt_token_ids)
        priority = self.random.choice([None, -1, 0, 2])
        limit = self.random.choice([None, None, self.random.randrange(1, room + 1)])
        if limit is not None:
            self.updated.add(request.request_id)
        self.drive.take(self.drive.scheduler.update(request.request_id, priority, limit))

    def credit(self, tokens: int) -> None:
        live = [number for number in self.drive.scheduler._groups if number not in self.late]
        if live:
            self.drive.scheduler.credit(self.random.choice(live), tokens)

    def finish(self) -> None:
        """Lets everything end, one late client after the other."""
        for request_id in list(self.drive.scheduler._groups):
            if request_id not in self.late:
                self.drive.scheduler.credit(request_id, 10_000)
        self.drive.run()
        left = self.drive.scheduler._groups
        assert self.late.issuperset(left), "those without credit hold others up"
        for request_id in list(left):
            self.drive.scheduler.credit(request_id, 10_000)
            self.drive.run()
            assert request_id not in left
        self.drive.check_empty()

    def check_answers(self) -> None:
        """Every sample got what it gets alone, and one end unless it was aborted."""
        drive = self.drive
        for request in self.requests.values():
            for index in range(request.num_samples):
                sample = (request.request_id, index)
                tokens, finish = alone(request, index)
                found = tuple(drive.tokens.get(sample, ()))
                if sample in self.aborted:
                    assert sample not in drive.finishes, "an aborted sample has no end"
                    assert request.request_id in self.updated or found == tokens[: len(found)]
                elif request.request_id in self.updated:
                    shorter = min(len(found), len(tokens))
                    assert found[:shorter] == tokens[:shorter]
                    assert sample in drive.finishes
                else:
                    assert (found, drive.finishes[sample]) == (tokens, finish), sample
        for output in drive.outputs:
            request = self.requests[output.request_id]
            wants = request.sampling.num_logprobs is not None
            assert len(output.logprobs) == (len(output.token_ids) if wants else 0)
        self._check_prompt_logprobs()

    def _check_prompt_logprobs(self) -> None:
        for request in self.requests.values():
            outputs = [o for o in self.drive.outputs if o.request_id == request.request_id]
            if not any(o.token_ids for o in outputs):
                continue
            found = [o.prompt_logprobs for o in outputs if o.prompt_logprobs]
            scores = prompt_scores_alone(request)
            assert found == ([scores] if scores and request.sampling.prompt_logprobs else [])


@pytest.mark.parametrize("seed", range(40))
def test_answers_do_not_depend_on_the_load(seed: int) -> None:
    """Laws 4 and 5: 10^5 random operations in all, blocks counted after each.

    Whenever nothing happens any more, nobody who has credit is left (`Drive` sees to it).
    """
    load = RandomLoad(seed)
    for _ in range(2500):
        load.operate()
        load.drive.check_blocks()
    load.finish()
    load.check_answers()
