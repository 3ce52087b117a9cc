"""The files of the dashboard, and that they need nobody else's."""

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import httpx
import pytest
import pytest_asyncio

from kvmesh.gateway.app import create_app
from kvmesh.testing.no_generator import NoGenerator

pytestmark = pytest.mark.asyncio(loop_scope="module")

TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class References(HTMLParser):
    """What a page refers to, and what stands in it that belongs into a file of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()
        self.inline: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        for name, value in attrs:
            if name in ("src", "href") and tag in ("script", "link", "img"):
                self.files.add(value or "")
            if name.startswith("on") or name == "style":
                self.inline.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style") and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._within = ""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(services=[], generator=NoGenerator(), unready_reason=lambda: None)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def references(client: httpx.AsyncClient) -> References:
    parsed = References()
    parsed.feed((await client.get("/")).text)
    return parsed


async def test_the_page_is_html_under_a_policy_that_allows_its_own_files_alone(client: httpx.AsyncClient) -> None:
    page = await client.get("/")

    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"


async def test_no_script_and_no_style_stands_in_the_page(client: httpx.AsyncClient) -> None:
    parsed = await references(client)

    assert parsed.inline == []


async def test_every_file_that_is_named_is_served_with_its_type(client: httpx.AsyncClient) -> None:
    waiting = (await references(client)).files
    seen: set[str] = set()

    while waiting:
        name = waiting.pop()
        reply = await client.get(f"/{name}")
        seen.add(name)
        assert (name, reply.status_code) == (name, 200)
        assert reply.headers["content-type"].startswith(TYPES[name.rpartition(".")[2]])
        assert reply.headers["x-content-type-options"] == "nosniff"
        imported = re.findall(r'from "\./([\w.]+)"', reply.text) if name.endswith(".js") else []
        waiting |= {f"dashboard/{each}" for each in imported} - seen

    assert {"dashboard/main.js", "dashboard/style.css", "dashboard/units.js"} <= seen


async def test_no_file_names_another_address_or_makes_markup_of_text(client: httpx.AsyncClient) -> None:
    names = ["", "dashboard/style.css", "dashboard/main.js", "dashboard/prompt.js", "dashboard/decisions.js"]
    texts = [(await client.get(f"/{name}")).text for name in [*names, "dashboard/dom.js", "dashboard/plan.js"]]

    addresses = {found for text in texts for found in re.findall(r"https?://[\w./]+", text)}
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert [
        text for text in texts if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    ] == []


@pytest.mark.parametrize(
    "path", ["/dashboard/", "/dashboard/index.html", "/dashboard/absent.js", "/dashboard/../app.py"]
)
async def test_nothing_else_of_the_folder_is_served(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404


async def test_the_page_takes_no_other_verb(client: httpx.AsyncClient) -> None:
    reply = await client.post("/", json={})

    assert reply.status_code == 405
    assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD"}
