"""The page at /docs in a real browser: it lists what is served, and a form calls it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kvmesh.gateway.app import create_app
from kvmesh.gateway.server import HttpServer
from kvmesh.testing.canned_servicer import CannedServicer
from kvmesh.testing.chromium import Chromium, Page, find_chromium, running_chromium
from kvmesh.testing.no_generator import NoGenerator
from kvmesh.v1 import frontend_pb2, worker_control_pb2

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: make install-chromium"),
]

FRONTEND = frontend_pb2.DESCRIPTOR.services_by_name["Frontend"]
CONTROL = worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"]
MARKUP = "<img src=x onerror=alert(1)>"


class Echo(CannedServicer):
    """Answers with what it was asked, and counts for ever."""

    async def GenerateText(
        self, request: frontend_pb2.GenerateTextRequest, context: object
    ) -> frontend_pb2.GenerateTextResponse:
        return frontend_pb2.GenerateTextResponse(worker_output=request.prompt)

    async def Generate(
        self, request: frontend_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[frontend_pb2.GenerateResponse]:
        yield frontend_pb2.GenerateResponse(started=frontend_pb2.Started(model=request.prompt.text))
        yield frontend_pb2.GenerateResponse(started=frontend_pb2.Started(model="the last"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[tuple[Chromium, str]]:
    app = create_app(
        services=[(FRONTEND, Echo(FRONTEND)), (CONTROL, CannedServicer(CONTROL))],
        generator=NoGenerator(),
        unready_reason=lambda: None,
    )
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    async with running_chromium() as chromium:
        yield chromium, f"http://{server.address}/docs"
    await server.stop(0)


async def opened(browser: tuple[Chromium, str], fragment: str = "", *, width: int = 1280, dark: bool = False) -> Page:
    chromium, url = browser
    page = await chromium.open(url + fragment, width=width, height=1000, dark=dark)
    await page.wait_for("document.querySelector('details.operation')")
    return page


async def test_every_route_is_listed_under_its_service_with_what_it_does(browser: tuple[Chromium, str]) -> None:
    page = await opened(browser)

    shown = await page.evaluate("document.body.innerText")

    assert "kvmesh.v1.WorkerControl" in shown
    assert "/mesh/v1/workers/{worker_id}:drain" in shown
    assert "Generate a continuation, whole: the hello world" in shown
    assert await page.evaluate("document.querySelectorAll('details.operation').length") == 8
    assert page.faults == []


async def test_an_address_that_cannot_be_decoded_opens_nothing(browser: tuple[Chromium, str]) -> None:
    page = await opened(browser, "#100%")

    assert await page.evaluate("document.querySelectorAll('details.operation').length") == 8
    assert await page.evaluate("document.querySelectorAll('details.operation[open]').length") == 0
    assert page.faults == []


async def test_a_word_finds_its_routes(browser: tuple[Chromium, str]) -> None:
    page = await opened(browser)

    await page.evaluate(
        "(() => { const find = document.getElementById('find'); find.value = 'Drain';"
        " find.dispatchEvent(new Event('input')); })()"
    )

    left = "[...document.querySelectorAll('details.operation:not([hidden])')].map((each) => each.id)"
    assert "kvmesh.v1.WorkerControl.Drain" in await page.evaluate(left)
    assert "kvmesh.v1.Frontend.ListModels" not in await page.evaluate(left)


async def test_a_form_sends_the_body_and_shows_the_reply_as_text(browser: tuple[Chromium, str]) -> None:
    page = await opened(browser, "#kvmesh.v1.Frontend.GenerateText")
    suggested = await page.wait_for("document.querySelector('details[open] textarea')?.value")

    await page.evaluate(
        f"document.querySelector('textarea').value = JSON.stringify({{prompt: '{MARKUP}'}});"
        " document.querySelector('form').requestSubmit()"
    )
    status = await page.wait_for("/ms$/.test(document.querySelector('[role=status]').textContent)"
                                 " && document.querySelector('[role=status]').textContent")  # fmt: skip

    assert suggested.split() == ["{", '"prompt":', '""', "}"]
    assert status.startswith("200 OK, id ")
    assert MARKUP in await page.evaluate("document.querySelector('pre').textContent")
    assert await page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.faults == []


async def test_a_form_shows_a_stream_message_by_message(browser: tuple[Chromium, str]) -> None:
    page = await opened(browser, "#kvmesh.v1.Frontend.Generate")
    await page.wait_for("document.querySelector('details[open] select')")

    await page.evaluate(
        "document.querySelector('select').value = 'text/event-stream'; document.querySelector('form').requestSubmit()"
    )
    await page.wait_for("document.querySelector('pre').textContent.includes('the last')")

    shown = await page.evaluate("document.querySelector('pre').textContent")
    assert shown.count("data: ") == 2


async def test_a_path_keeps_the_slashes_of_a_worker_s_name(browser: tuple[Chromium, str]) -> None:
    page = await opened(browser, "#kvmesh.v1.WorkerControl.Drain")
    await page.wait_for("document.querySelector('details[open] form input')")

    await page.evaluate(
        "document.querySelector('form input').value = 'NODE1/decode/0'; document.querySelector('form').requestSubmit()"
    )

    assert await page.wait_for("document.querySelector('[role=status]').textContent.startsWith('200')")


@pytest.mark.parametrize("dark", [False, True])
async def test_nothing_is_wider_than_a_phone(browser: tuple[Chromium, str], dark: bool) -> None:
    page = await opened(browser, "#kvmesh.v1.Frontend.Generate", width=390, dark=dark)
    await page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    await page.wait_for("document.querySelectorAll('form').length === 8")

    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
