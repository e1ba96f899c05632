"""`millrace generate` and `millrace chat`: text as it is generated, and how fast that was."""

import sys
import time
from collections.abc import Iterator

from millrace.cli import output
from millrace.client import Client
from millrace.generation import Chunk, GenerateOptions, Generation, Message, Prompt
from millrace.stream import Stream


def generate(client: Client, prompt: Prompt, options: GenerateOptions, *, as_json: bool) -> None:
    """Streams one answer to stdout; its speed goes to stderr."""
    if as_json:
        result = client.generate(prompt, **options).wait()
        output.print_json(generation_dict(result))
        return
    result, first_s = stream_text(client, prompt, options)
    output.say(f"[dim]{speed_text(result, first_s)}[/]")


def stream_text(
    client: Client, prompt: Prompt, options: GenerateOptions
) -> tuple[Generation, float]:
    """Writes an answer to stdout as it arrives. Returns it, and the seconds to its first token."""
    start = time.monotonic()
    first_s = 0.0
    with client.generate(prompt, **options) as stream:
        for chunk in _watched(stream):
            first_s = first_s or time.monotonic() - start
            if chunk.sample_index == 0:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    sys.stdout.write("\n")
    for index, sample in enumerate(stream.result.samples[1:], 2):
        sys.stdout.write(f"\n--- sample {index}\n{sample.text}\n")
    sys.stdout.flush()
    return stream.result, first_s


def _watched(stream: Stream) -> Iterator[Chunk]:
    """The stream's chunks; until the first one a terminal shows that it is waited for."""
    chunks = iter(stream)
    with output.waiting("waiting for the first token"):
        first = next(chunks, None)
    if first is not None:
        yield first
        yield from chunks


def speed_text(result: Generation, first_s: float) -> str:
    """`first token 41 ms, 83.1 tokens/s, 24 + 128 tokens, stopped at its length`."""
    parts = [f"first token {first_s * 1000:.0f} ms"]
    if result.tokens_per_s:
        parts.append(f"{result.tokens_per_s:.1f} tokens/s")
    cached = f" ({result.cached_prompt_tokens} cached)" if result.cached_prompt_tokens else ""
    generated = output.count_text(result.generated_tokens, "token")
    parts.append(f"{result.prompt_tokens} prompt{cached} + {generated}")
    reasons = sorted({sample.finish_reason.replace("_", " ") for sample in result.samples})
    parts.append(f"ended by {', '.join(reasons)}")
    return ", ".join(parts)


def generation_dict(result: Generation) -> dict[str, object]:
    """A finished generation, for programs."""
    return {
        "text": result.text,
        "samples": [
            {
                "text": sample.text,
                "token_ids": sample.token_ids,
                "finish_reason": sample.finish_reason,
                "stop_string": sample.stop_string,
                "stop_token_id": sample.stop_token_id,
            }
            for sample in result.samples
        ],
        "seed": result.seed,
        "prompt_tokens": result.prompt_tokens,
        "cached_prompt_tokens": result.cached_prompt_tokens,
        "generated_tokens": result.generated_tokens,
        "time_to_first_token_s": result.time_to_first_token_s,
        "total_s": result.total_s,
        "tokens_per_s": round(result.tokens_per_s, 2),
    }


def chat(client: Client, system: str, options: GenerateOptions) -> None:
    """A conversation on the terminal: a line in, an answer out; Ctrl-C stops an answer."""
    status = client.get_status()
    output.say(f"[bold]{status.engine.model}[/] on {status.engine.key.arch}")
    output.say("[dim]/reset forgets, /quit or Ctrl-D leaves, Ctrl-C stops an answer[/]")
    messages: list[Message] = [Message(role="system", content=system)] if system else []
    first = len(messages)
    while (said := _ask()) is not None:
        if said == "/quit":
            return
        if said == "/reset":
            del messages[first:]
        elif said:
            messages.append(Message(role="user", content=said))
            answer = _answer(client, messages, options)
            messages.append(Message(role="assistant", content=answer))


def _ask() -> str | None:
    """The next line of the person, None when there is none."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()
    try:
        prompt = "\n\033[1m> \033[0m" if output.is_fancy() else "> " if sys.stdin.isatty() else ""
        return input(prompt).strip()
    except EOFError:
        return None


def _answer(client: Client, messages: list[Message], options: GenerateOptions) -> str:
    said: list[str] = []
    start = time.monotonic()
    first_s = 0.0
    with client.generate(messages, **options) as stream:
        try:
            for chunk in _watched(stream):
                first_s = first_s or time.monotonic() - start
                said.append(chunk.text)
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        except KeyboardInterrupt:  # stops this answer, not the conversation
            sys.stdout.write(" ...\n")
            return "".join(said)
    sys.stdout.write("\n")
    sys.stdout.flush()
    output.say(f"[dim]{speed_text(stream.result, first_s)}[/]")
    return "".join(said)
