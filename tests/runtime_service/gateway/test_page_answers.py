"""The web page's hard moments, in a real browser: long answers, code, broken streams, a silent gateway."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from playwright.async_api import Page, Route, expect

from tests.runtime_service.gateway.running_gateway import running_fleet
from tests.runtime_service.gateway.test_page import CHROMIUM, opened

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

PHONE = {"width": 390, "height": 844}
FROM_END = (
    "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.querySelector('#log'))"
)
ANSWER = """**Short**: `f` is

```python
def f(x):
    return "<img src=x onerror=alert(1)>" + x + "a line that is wider than any telephone's screen is"
```

## Cost
2 ** 3 is not bold ** at all"""


async def asked(page: Page, text: str) -> None:
    await expect(page.locator("#model")).to_have_value("echo")
    await page.fill("#prompt", text)
    await page.press("#prompt", "Enter")


def events(*texts: str, rest: str = "") -> str:
    """A stream of an answer, as far as these texts."""
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + rest


async def test_code_in_an_answer_stands_apart_and_nothing_widens_a_phone(tmp_path: Path) -> None:
    async with (
        running_fleet(tmp_path, 1, max_sequence_tokens=4000) as fleet,
        opened(fleet, viewport=PHONE) as page,
    ):
        await asked(page, ANSWER)
        answer = page.locator(".turn.assistant")
        await expect(answer.locator("small")).to_be_visible()
        await expect(answer.locator("pre")).to_have_attribute("data-language", "python")
        code = ANSWER.split("```")[1].removeprefix("python\n").removesuffix("\n")
        assert await answer.locator("pre").inner_text() == code
        assert await answer.locator("p code").all_inner_texts() == ["f"]
        assert await answer.locator("b").all_inner_texts() == ["Short", "Cost"]
        await expect(answer.locator("p").last).to_contain_text("2 ** 3 is not bold ** at all")
        assert await answer.locator("img").count() == 0
        assert await page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await answer.locator(".copy").click()
        await expect(answer.locator(".copy.done")).to_be_visible()
        assert await page.evaluate("navigator.clipboard.readText()") == code
        # Who holds a phone sees the fleet's state as well.
        await expect(page.locator("#state")).to_be_visible()


async def test_page_follows_a_fast_answer_and_leaves_a_reader_who_scrolls_up(
    tmp_path: Path,
) -> None:
    async with (
        running_fleet(tmp_path, 1, step_s=0.0005, max_sequence_tokens=4000) as fleet,
        opened(fleet) as page,
    ):
        await page.select_option("#mode", "complete")
        await page.fill("#tokens", "3000")
        await asked(page, "la\nla\nla\n")
        notes = page.locator(".turn.assistant small")
        await expect(notes).to_have_count(1)
        assert await page.evaluate(FROM_END) < 2

        await asked(page, "lo\nlo\nlo\n")
        await expect(page.locator(".turn.assistant p").nth(1)).to_contain_text("lo\nlo\nlo\n")
        await page.evaluate("document.querySelector('#log').scrollTop = 0")
        await expect(notes).to_have_count(2)
        assert await page.evaluate("document.querySelector('#log').scrollTop") == 0


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("", "The answer broke off."),
        ('data: {"error": {"message": "No <b>engine</b>."}}\n\n', "No <b>engine</b>."),
    ],
    ids=["cut off", "failed"],
)
async def test_what_came_of_an_answer_stays_when_it_breaks_off(
    tmp_path: Path, rest: str, says: str
) -> None:
    async def answered(route: Route) -> None:
        body = events("It begins ", "well", rest=rest)
        await route.fulfill(body=body, content_type="text/event-stream")

    async with running_fleet(tmp_path, 1) as fleet, opened(fleet) as page:
        await page.route("**/v1/chat/completions", answered)
        await asked(page, "hello")
        answer = page.locator(".turn.assistant")
        await expect(answer.locator(".problem")).to_have_text(says)
        await expect(answer.locator(".said")).to_have_text("It begins well")


async def test_a_gateway_that_is_silent_is_asked_once_at_a_time(tmp_path: Path) -> None:
    looks = 0

    async def held(route: Route) -> None:
        nonlocal looks
        looks += 1

    async with running_fleet(tmp_path, 1) as fleet, opened(fleet) as page:
        await expect(page.locator("#state")).to_have_text("1 runtime serves")
        await page.clock.install()
        await page.route("**/api/fleet", held)
        async with page.expect_request("**/api/fleet"):
            await page.reload()
        await page.clock.run_for(4000)
        assert looks == 1
        # In the browser's own time, it is given up.
        await expect(page.locator("#state")).to_have_text("the gateway does not answer")


class ManyBuilds(compiler_pb2_grpc.CompilerServiceServicer):
    async def ListBuilds(self, request: Any, context: Any) -> compiler_pb2.ListBuildsResponse:
        response = compiler_pb2.ListBuildsResponse()
        for number in range(9):
            state = compiler_pb2.BUILD_STATE_SUCCEEDED
            response.builds.add(model_uri=f"file:/x/model-{number}", state=state)
        return response


async def test_builds_that_are_not_shown_are_told_of(tmp_path: Path) -> None:
    compiler = grpc.aio.server()
    compiler_pb2_grpc.add_CompilerServiceServicer_to_server(ManyBuilds(), compiler)
    address = f"127.0.0.1:{compiler.add_insecure_port('127.0.0.1:0')}"
    await compiler.start()
    try:
        async with running_fleet(tmp_path, 1, compiler=address) as fleet, opened(fleet) as page:
            await expect(page.locator("#builds .card")).to_have_count(6)
            await expect(page.locator("#builds")).to_contain_text("Older ones: millrace builds")
    finally:
        await compiler.stop(0)


STATES = ("2 runtimes serve", "the gateway does not answer")


@pytest.mark.parametrize("width", [360, 400, 900, 1280])
async def test_header_tells_the_fleets_state_in_full_on_any_screen(
    tmp_path: Path, width: int
) -> None:
    viewport = {"width": width, "height": 800}
    async with running_fleet(tmp_path, 2) as fleet, opened(fleet, viewport=viewport) as page:
        for number, state in enumerate(STATES):
            if number:
                await page.route("**/api/fleet", lambda route: route.fulfill(body="no JSON"))
            told = page.locator("#state span")
            await expect(told).to_have_text(state)
            assert await told.evaluate(
                "s => s.scrollWidth <= s.clientWidth && s.scrollHeight <= s.clientHeight"
            )
        assert await page.evaluate("document.documentElement.scrollWidth") == width
        for name in ("New chat", "API key"):
            await expect(page.get_by_role("button", name=name)).to_be_visible()
        await expect(page.locator("#send")).to_be_in_viewport(ratio=1)
