"""Generate over real gRPC and a real engine process that repeats its prompt."""

from pathlib import Path

from tests.runtime_service.daemon import TOKENIZER, running_daemon


async def test_text_goes_in_and_comes_out(tmp_path: Path) -> None:
    text = "hello, wörld 🙂"
    num_tokens = len(TOKENIZER.encode(text).ids)
    async with running_daemon(tmp_path) as daemon:
        call = daemon.call()
        await call.start("a", text, max_new_tokens=num_tokens)
        seen = (await call.finish())["a"]
    assert seen.text[0] == text
    assert seen.reason == "LENGTH"
    assert seen.finished is not None
    assert seen.finished.usage.prompt_tokens == seen.prompt_tokens == num_tokens
    assert seen.finished.usage.generated_tokens == num_tokens
    assert seen.finished.timings.total.ToNanoseconds() > 0
    assert seen.seed is not None
