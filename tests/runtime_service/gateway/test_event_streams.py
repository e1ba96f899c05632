"""Streams over HTTP whose connection is lost, and what comes after `Last-Event-ID`."""

import asyncio
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shared.auth import ApiKeys
from shared.security import ServerSecurity
from tests.runtime_service.daemon import until
from tests.runtime_service.gateway.openai_client import HELLO, TEXT, client_of
from tests.runtime_service.gateway.running_gateway import (
    RunningGateway,
    running_fleet,
    running_gateway,
)
from tests.shared.key_files import new_key

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
_LONG: dict[str, Any] = {"prompt": TEXT, "max_tokens": 400, "stream": True}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": HELLO, **_USAGE}),
    "chat, two samples, logprobs": (
        CHAT,
        {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 1, **_USAGE},
    ),
    "text offsets across characters": (
        COMPLETIONS,
        {"prompt": TEXT, "max_tokens": 60, "logprobs": 0, **_USAGE},
    ),
    "prompts that end apart, stop string": (
        COMPLETIONS,
        {"prompt": [TEXT, "ab", [40, 41]], "n": 2, "max_tokens": 50, "stop": "STO V", **_USAGE},
    ),
}


class Lost(Exception):
    """The connection is no more."""


@dataclass
class Reader:
    """A client of server-sent events by the book, which loses its connection when it is told to.

    Source: WHATWG HTML, 9.2.6, "Interpreting an event stream".
    """

    fleet: RunningGateway
    path: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    last_id: str = ""
    status: int = 0
    events: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    async def read(self, method: str = "POST", max_bytes: int = 1 << 30) -> None:
        """Takes events to the last one; raises Lost after so many bytes, or where it is cut off."""
        host, _, port = self.fleet.http.address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(self._request(method))
            head = await reader.readuntil(b"\r\n\r\n")
            self.status = int(head.split()[1])
            if self.status != 200:
                self.events.append((await reader.read()).decode())
                return
            await self._events(reader, max_bytes)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Lost from None
        finally:
            writer.transport.abort()

    def _request(self, method: str) -> bytes:
        body = json.dumps(self.body).encode() if method == "POST" else b""
        headers = {"Host": "localhost", "Accept": "text/event-stream", **self.headers}
        if self.last_id:
            headers["Last-Event-ID"] = self.last_id
        if method == "POST":
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        # Of HTTP 1.0: the stream comes as it is, in no chunks.
        return f"{method} {self.path} HTTP/1.0\r\n{lines}\r\n".encode() + body

    async def _events(self, reader: asyncio.StreamReader, max_bytes: int) -> None:
        pending = b""
        while not (self.events and self.events[-1] == "[DONE]"):
            some = await reader.read(min(max_bytes, 300))
            max_bytes -= len(some)
            if not some or max_bytes <= 0:
                raise Lost
            *whole, pending = (pending + some).split(b"\n\n")
            for event in whole:
                lines = [line.partition(b": ")[::2] for line in event.split(b"\n")]
                fields = {name.decode(): value.decode() for name, value in lines}
                self.events.append(fields["data"])
                self.last_id = fields.get("id", self.last_id)
                self.ids.append(self.last_id)


def told(events: list[str]) -> dict[str, Any]:
    """What a stream's events say in all, however it was cut into them; each end and role once."""
    found: dict[str, Any] = defaultdict(list)
    texts: dict[str, str] = defaultdict(str)
    assert events[-1] == "[DONE]"
    for event in map(json.loads, events[:-1]):
        for choice in event["choices"]:
            index = choice["index"]
            delta = choice.get("delta", {})
            texts[f"text {index}"] += choice.get("text", "") + (delta.get("content") or "")
            if "role" in delta:
                found[f"role {index}"].append(delta["role"])
            if choice["finish_reason"]:
                found[f"end {index}"].append(choice["finish_reason"])
            if logprobs := choice["logprobs"]:
                found[f"logprobs {index}"] += logprobs.get("content") or logprobs["tokens"]
                found[f"offsets {index}"] += logprobs.get("text_offset", [])
        if event.get("usage"):
            usage = event["usage"]
            found["usage"].append((usage["prompt_tokens"], usage["completion_tokens"]))
    return {**found, **texts}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2])
async def test_streams_cut_anywhere_go_on_with_nothing_lost_or_repeated(
    tmp_path: Path, case: str, seed: int
) -> None:
    draw = random.Random(f"{case} {seed}")
    path, body = CASES[case]
    num_readers = num_resumed = 0
    async with running_fleet(tmp_path, 2, step_s=0.001) as fleet:
        whole = Reader(fleet, path, body)
        await whole.read()
        # How often a stream is cut is the moment's: tokens that come together are one event.
        while min(num_readers, num_resumed) < 6:
            num_readers += 1
            reader = Reader(fleet, path, body)
            ids: set[str] = set()
            is_read = False
            while not is_read:
                method = draw.choice(["GET", "POST"]) if reader.last_id else "POST"
                try:
                    await reader.read(method, draw.randrange(2, 3000))
                    is_read = True
                except Lost:
                    num_resumed += bool(reader.last_id)
            assert reader.status == 200
            ids.update(reader.ids)
            assert len(ids) == len(reader.ids)
            assert told(reader.events) == told(whole.events)
            assert len({json.loads(event)["id"] for event in reader.events[:-1]}) == 1
        await until(lambda: fleet.sample("running_generations") == 0)
        for daemon in fleet.daemons:
            await daemon.freed()


async def test_any_event_can_be_the_last_one(tmp_path: Path) -> None:
    """What comes after each, also after all was read; after the end there is nothing."""
    path, body = CASES["text offsets across characters"]
    async with running_fleet(tmp_path, 1) as fleet:
        whole = Reader(fleet, path, body)
        await whole.read()
        for number, event_id in reversed(list(enumerate(whole.ids))[:-1]):
            rest = Reader(fleet, path, body, last_id=event_id)
            await rest.read("GET")
            assert told([*whole.events[: number + 1], *rest.events]) == told(whole.events)
        done = Reader(fleet, path, body, last_id=rest.ids[-1])
        await done.read("GET")
    assert (done.status, done.events) == (204, [""])


async def test_a_reader_that_is_still_there_is_cut_off_when_its_client_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It must not take that for the end of the answer; nor does it use its tenant's quota up."""
    key = new_key(capsys, tmp_path / "keys", "acme", concurrent=1)
    security = ServerSecurity(api_keys=ApiKeys(tmp_path / "keys"))
    async with running_fleet(tmp_path, 1, gateway_security=security, step_s=0.005) as fleet:

        def reader(last_id: str = "") -> Reader:
            headers = {"Authorization": f"Bearer {key}"}
            return Reader(fleet, COMPLETIONS, _LONG, headers, last_id)

        old = reader()
        reading = asyncio.create_task(old.read())
        await until(lambda: len(old.events) > 1)
        new = reader(old.ids[0])
        await new.read("GET")
        with pytest.raises(Lost):
            await reading
        whole = reader()
        await whole.read()
        # What it read after that event is no place of the stream any more.
        stale = reader(old.ids[-1])
        await stale.read("GET")
    assert told(old.events[:1] + new.events) == told(whole.events)
    assert stale.status == 404


@pytest.mark.parametrize(
    ("last_id", "path", "status", "code"),
    [
        ("", COMPLETIONS, 400, "invalid_field"),
        ("17", COMPLETIONS, 400, "invalid_field"),
        ("cmpl-" + "0" * 32 + ":3", COMPLETIONS, 404, "generation_not_found"),
        ("chatcmpl-" + "0" * 32 + ":3", COMPLETIONS, 404, "generation_not_found"),
        ("cmpl-" + "0" * 32 + ":" + "9" * 18, CHAT, 404, "generation_not_found"),
    ],
)
async def test_ids_of_nothing_are_refused(
    tmp_path: Path, last_id: str, path: str, status: int, code: str
) -> None:
    async with running_fleet(tmp_path, 1) as fleet:
        reader = Reader(fleet, path, {}, last_id=last_id)
        await reader.read("GET")
    assert reader.status == status
    assert json.loads(reader.events[0])["error"]["code"] == code


async def test_a_stream_is_its_tenants_and_is_forgotten_after_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    mine, other = (new_key(capsys, keys, tenant) for tenant in ("acme", "other"))
    security = ServerSecurity(api_keys=ApiKeys(keys))
    async with running_fleet(tmp_path, 1, gateway_security=security) as fleet:
        statuses = {}
        reader = Reader(fleet, COMPLETIONS, _LONG, {"Authorization": f"Bearer {mine}"})
        await reader.read()
        for name, key in (("other", other), ("nobody", "mr_x_y"), ("mine", mine)):
            headers = {"Authorization": f"Bearer {key}"}
            again = Reader(fleet, COMPLETIONS, _LONG, headers, last_id=reader.ids[5])
            await again.read("GET")
            statuses[name] = again.status
        addresses = [daemon.server.address for daemon in fleet.daemons]
        async with running_gateway(
            addresses, fleet.daemons, security=security, keep_s=0.01
        ) as forgetful:
            reader = Reader(forgetful, COMPLETIONS, _LONG, headers)
            await reader.read()
            kept = forgetful.gateway._kept
            await until(lambda: not kept._items)
            late = Reader(forgetful, COMPLETIONS, _LONG, headers, last_id=reader.ids[5])
            await late.read("GET")
    assert statuses == {"other": 404, "nobody": 401, "mine": 200}
    assert late.status == 404


async def test_ids_are_for_those_who_read_event_streams(tmp_path: Path) -> None:
    """Programs that know `data:` lines alone get nothing else; OpenAI's client reads either."""
    async with running_fleet(tmp_path, 1) as fleet:
        plain = Reader(fleet, COMPLETIONS, _LONG, {"Accept": "*/*"})
        await plain.read()
        assert set(plain.ids) == {""}
        async with client_of(fleet) as client:
            texts = []
            for accept in ("application/json", "text/event-stream"):
                stream = await client.completions.create(
                    model="echo", prompt=TEXT, max_tokens=400, stream=True,
                    extra_headers={"Accept": accept},
                )  # fmt: skip
                texts.append("".join([chunk.choices[0].text async for chunk in stream]))
    assert texts[0] == texts[1] == told(plain.events)["text 0"]
