"""The web page in a real browser: it chats, shows the fleet and builds, and asks for a key."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from playwright.async_api import Page, async_playwright, expect

from runtime_service.deployments import Deployment, DeploymentProblem, Deployments
from shared.auth import ApiKeys
from shared.errors import EngineNotFound
from shared.redis import connect
from shared.security import ServerSecurity
from tests.runtime_service.daemon import FP32
from tests.runtime_service.gateway.running_gateway import RunningGateway, running_fleet
from tests.shared.key_files import new_key

DESKTOP = {"width": 1280, "height": 800}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# For what takes moments, on a machine that does much beside.
expect.set_options(timeout=30_000)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class Compiler(compiler_pb2_grpc.CompilerServiceServicer):
    """Has one build under way and one that failed."""

    async def ListBuilds(self, request: Any, context: Any) -> compiler_pb2.ListBuildsResponse:
        response = compiler_pb2.ListBuildsResponse()
        running = response.builds.add(
            model_uri="sample:smollm2-135m", state=compiler_pb2.BUILD_STATE_RUNNING
        )
        running.key.arch, running.key.quant.scheme = "sm_90", "int4-awq"
        running.key.quant.group_size, running.key.quant.kv_cache = 64, "fp8"
        running.progress.stage, running.progress.fraction = "quantize", 0.42
        running.progress.eta.FromSeconds(31)
        failed = response.builds.add(model_uri="file:/x/b", state=compiler_pb2.BUILD_STATE_FAILED)
        failed.error.message = "<b>No</b> room left."
        return response


@asynccontextmanager
async def opened(fleet: RunningGateway, **options: Any) -> AsyncIterator[Page]:
    """The page in a browser, which reports nothing and asks nobody else for anything."""
    said: list[str] = []
    asked: set[str] = set()
    async with async_playwright() as playwright:
        # Containers have no namespaces for its sandbox, and the page is our own.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(**{"viewport": DESKTOP, **options})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.add(request.url.split("/")[2]))
        await page.goto(f"http://{fleet.http.address}/")
        yield page
        await browser.close()
    # What a key is asked for, or may not see, the browser reports by itself.
    assert [text for text in said if not text.endswith(("(Unauthorized)", "(Forbidden)"))] == []
    assert asked - {""} == {fleet.http.address}


async def test_page_chats_and_shows_the_fleet_and_builds(tmp_path: Path) -> None:
    compiler = grpc.aio.server()
    compiler_pb2_grpc.add_CompilerServiceServicer_to_server(Compiler(), compiler)
    address = f"127.0.0.1:{compiler.add_insecure_port('127.0.0.1:0')}"
    await compiler.start()
    try:
        async with (
            running_fleet(
                tmp_path, 2, step_s=0.01, max_sequence_tokens=4000, compiler=address
            ) as fleet,
            opened(fleet) as page,
        ):
            await expect(page.locator("#state")).to_have_text("2 runtimes serve")
            await expect(page.locator("#runtimes .card")).to_have_count(2)
            runtime = page.locator("#runtimes .card").first
            await expect(runtime).to_contain_text("echofp32 · cpu")
            await expect(runtime).to_contain_text(re.compile(r"KV cache\d+ % of 256 blocks"))
            await expect(runtime).to_contain_text("serving")
            await page.fill("#prompt", "hello <i>Wörld</i>")
            await page.press("#prompt", "Enter")
            answer = page.locator(".turn.assistant")
            await expect(answer.locator("p")).to_have_text("user\nhello <i>Wörld</i>")
            await expect(answer.locator("small")).to_contain_text("tokens/s")
            builds = page.locator("#builds .card")
            await expect(builds.nth(0)).to_contain_text("int4-awq-g64-kv-fp8 · sm_90")
            await expect(builds.nth(0)).to_contain_text("quantize42 % · 31 s left")
            await expect(builds.nth(1)).to_contain_text("<b>No</b> room left.")

            await page.select_option("#mode", "complete")
            await page.fill("#prompt", "la ")
            await page.fill("#tokens", "3900")
            await page.press("#prompt", "Enter")
            await expect(answer.nth(1).locator("p")).to_contain_text("la")
            await page.click("#send:has-text('Stop')")
            await expect(answer.nth(1).locator("small")).to_contain_text("stopped")

            await page.fill("#tokens", "1")
            await page.fill("#prompt", "la ")
            await page.press("#prompt", "Enter")
            await expect(answer.nth(2).locator("small")).to_have_text(
                re.compile(r"^1 token · first token .* · stopped at the limit$")
            )

            # A question that nobody answers.
            await page.route("**/v1/completions", lambda route: None)
            await page.fill("#prompt", "la ")
            await page.press("#prompt", "Enter")
            await page.click("#send:has-text('Stop')")
            await expect(answer.nth(3).locator("small")).to_have_text("stopped")
            await expect(answer.nth(3).locator("p")).to_have_text("")
            await page.click("#fresh")
            await expect(page.locator(".turn")).to_have_count(0)
    finally:
        await compiler.stop(0)


@pytest.mark.redis
async def test_page_says_why_a_deployment_is_not_served(tmp_path: Path, redis_url: str) -> None:
    redis = connect(redis_url)
    try:
        async with running_fleet(tmp_path, 1, redis=redis) as fleet, opened(fleet) as page:
            chat, runtime = Deployment("chat", "nothing", FP32, "", 1), fleet.daemons[0].runtime
            await Deployments(redis).apply(chat)
            (chat,) = await Deployments(redis).list()
            error = EngineNotFound(engine="<b>nothing</b>")
            runtime.deployment_problem = DeploymentProblem(chat, error)
            row = page.locator("#deployments .row")
            await expect(row).to_contain_text("0 of 1 ready")
            await expect(row).to_contain_text("0 of its 1 runtimes, and no other is idle")
            await expect(row.locator(".problem")).to_have_text(str(error))
            # What was wrong with a version that is past, or that is served, is over.
            await Deployments(redis).apply(replace(chat, model="something"))
            await expect(row).to_contain_text("something")
            await expect(row.locator(".problem")).to_have_count(0)
            (chat,) = await Deployments(redis).list()
            runtime.deployment_problem = DeploymentProblem(chat, error)
            await expect(row.locator(".problem")).to_have_text(str(error))
            runtime.deployment, runtime.deployment_version = chat.name, chat.version
            await expect(row).to_contain_text("1 of 1 ready")
            await expect(row.locator(".problem")).to_have_count(0)
    finally:
        await redis.aclose()


async def test_page_asks_for_a_key_and_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = new_key(capsys, tmp_path / "keys", "acme")
    security = ServerSecurity(api_keys=ApiKeys(tmp_path / "keys"))
    async with (
        running_fleet(tmp_path, 1, gateway_security=security) as fleet,
        opened(fleet) as page,
    ):
        await expect(page.locator("#key-dialog")).to_be_visible()
        await page.keyboard.press("Escape")
        async with page.expect_response("**/api/fleet"):
            pass
        await expect(page.locator("#key-dialog")).not_to_be_visible()
        await page.click("#key-open")
        await page.fill("#key", "mr_wrong_key")
        await page.press("#key", "Enter")
        await expect(page.locator("#key-problem")).to_contain_text("not valid")
        await page.fill("#key", key)
        await page.press("#key", "Enter")
        await expect(page.locator("#state")).to_have_text("1 runtime serves")
        await page.fill("#prompt", "hello")
        await page.press("#prompt", "Enter")
        await expect(page.locator(".turn.assistant p")).to_have_text("user\nhello")


async def test_page_is_dark_or_light_as_the_system_is_until_somebody_chooses(
    tmp_path: Path,
) -> None:
    grounds = []
    background = "getComputedStyle(document.body).backgroundColor"
    async with running_fleet(tmp_path, 1) as fleet, opened(fleet, color_scheme="dark") as page:
        grounds.append(await page.evaluate(background))
        await page.emulate_media(color_scheme="light")
        grounds.append(await page.evaluate(background))
        await page.click("#theme")
        grounds.append(await page.evaluate(background))
        await page.reload()
        grounds.append(await page.evaluate(background))
    assert grounds[0] != grounds[1]
    assert grounds[2] == grounds[3] == grounds[0]
