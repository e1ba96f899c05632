"""A real engine behind the real front: what is drawn does not depend on how it is asked for."""

from pathlib import Path
from typing import Any

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from compiler_service.builder import BuildRequest, build
from compiler_service.resolve import resolve
from shared.engine import EngineManifest, QuantConfig
from shared.store import LocalStore
from tests.checkpoints import write_checkpoint
from tests.runtime_service.daemon import TOKENIZER, Seen, running_daemon, start_of

LOADER = "runtime_service.execution.loader:load_engine"
SEEDED = pb.SamplingParams(temperature=1.0, top_k=50, seed=7)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose store holds a tiny random Llama for `cpu` in fp32."""
    folder = tmp_path_factory.mktemp("engine")
    publish(LocalStore(folder / "store"), write_checkpoint(folder / "checkpoint"))
    return folder


def publish(store: LocalStore, checkpoint: Path) -> EngineManifest:
    """The engine of `checkpoint`; a cache hit where it is there."""
    cache = store.root.parent / "cache"
    cache.mkdir(exist_ok=True)
    resolved = resolve(str(checkpoint), ["cpu"], QuantConfig("fp32"), "tiny", cache)
    request = BuildRequest(str(checkpoint), resolved.keys["cpu"], resolved.model, cache)
    return build(request, store, lambda progress: None)


def serving(built: Path) -> Any:
    """A daemon that serves the built engine."""
    return running_daemon(
        built,
        loader=LOADER,
        publish=lambda store: publish(store, built / "checkpoint"),
        num_threads=1,
        max_sequences=8,
    )


async def generate(daemon: Any, *starts: pb.StartGeneration) -> dict[str, Seen]:
    call = daemon.call()
    for start in starts:
        await call.send(start=start)
    seen: dict[str, Seen] = await call.finish()
    return seen


def seeded(request_id: str, **fields: Any) -> pb.StartGeneration:
    return start_of(
        "hello", request_id=request_id, sampling=SEEDED, ignore_end_tokens=True, **fields
    )


async def test_resumed_stream_is_the_stream_that_was_broken(built: Path) -> None:
    """Tokens and text go on wherever the stream broke, beside any neighbours."""
    async with serving(built) as daemon:
        whole = (await generate(daemon, seeded("whole", max_new_tokens=24)))["whole"]
        token_ids = whole.token_ids[0]
        cuts = range(1, 24, 4)
        resumed = await generate(
            daemon,
            *(
                seeded(str(cut), max_new_tokens=24, resumed_token_ids=token_ids[:cut])
                for cut in cuts
            ),
        )
    assert len(set(token_ids)) > 5
    assert whole.text[0] == TOKENIZER.decode(token_ids)
    for cut in cuts:
        assert resumed[str(cut)].token_ids[0] == token_ids[cut:]


async def test_one_sample_of_many_is_drawn_alone_from_anywhere(built: Path) -> None:
    """What a gateway does when a runtime with several samples of one prompt is lost."""
    async with serving(built) as daemon:
        many = seeded("many", max_new_tokens=20)
        many.sampling.n = 3
        samples = (await generate(daemon, many))["many"].token_ids
        alone = await generate(
            daemon,
            *(
                seeded(
                    f"{index}/{cut}",
                    max_new_tokens=20,
                    sample_index=index,
                    resumed_token_ids=samples[index][:cut],
                )
                for index in range(3)
                for cut in (0, 1, 11)
            ),
        )
    assert samples[0] != samples[1] != samples[2]
    for index in range(3):
        for cut in (0, 1, 11):
            assert alone[f"{index}/{cut}"].token_ids[0] == samples[index][cut:]


async def test_stop_string_and_end_token_cut_the_same_stream(built: Path) -> None:
    async with serving(built) as daemon:
        whole = (await generate(daemon, seeded("whole", max_new_tokens=40)))["whole"]
        token_ids = whole.token_ids[0]
        stop = whole.text[0][8:10]
        cut = await generate(
            daemon,
            seeded("string", max_new_tokens=40, strings=[stop]),
            seeded("token", max_new_tokens=40, token_ids=[token_ids[20]]),
        )
        await daemon.freed()
    assert cut["string"].reason == "STOP_STRING"
    assert cut["string"].text[0] == whole.text[0][: whole.text[0].index(stop)]
    assert cut["token"].reason == "STOP_TOKEN"
    assert cut["token"].token_ids[0] == token_ids[: token_ids.index(token_ids[20]) + 1]


async def test_logprobs_add_up_over_the_candidates(built: Path) -> None:
    async with serving(built) as daemon:
        start = start_of("hello", request_id="a", max_new_tokens=5, ignore_end_tokens=True)
        start.sampling.top_logprobs = 3
        start.sampling.prompt_logprobs = True
        seen = (await generate(daemon, start))["a"]
    rows = [row for chunk in seen.chunks for row in chunk.logprobs]
    assert [row.token_id for row in rows] == seen.token_ids[0]
    for row in rows:
        assert row.rank == 1
        assert row.top[0].token_id == row.token_id
        assert row.top[0].logprob == pytest.approx(row.logprob)
    prompt = [row.token_id for chunk in seen.chunks for row in chunk.prompt_logprobs]
    assert prompt == TOKENIZER.encode("hello").ids[1:]
