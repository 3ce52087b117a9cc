"""The dashboard in a real browser, on a mesh that serves requests: what it shows, not how it is painted."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.chromium import Chromium, Page, find_chromium, running_chromium
from kvmesh.testing.mesh import running_mesh

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: make install-chromium"),
]

DECODE = ("NODE1/decode/0", "NODE2/decode/1")
PREFILL = "NODE3/prefill/0"
REQUEST_S = 20.0
CTRL = 2
LONG_NODES = "gpu-node-with-a-rather-long-name.cluster-0123456789.region-4.example.internal"
MARKUP = "<img src=x onerror=alert(1)><b>bold</b>"
# Numbers that stand alone, as texts of the page have them; what has a unit has a letter or a % behind the figure.
BARE_NUMBERS = """
(() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const bare = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const owner = node.parentElement.closest(".quantity, text, td, li, p, dd") ?? node.parentElement;
    if (owner.closest("pre, textarea, time, title, script")) continue;
    if (/^[\\s\\d.,]*\\d[\\s.,]*$/.test(owner.textContent)) bare.push(owner.outerHTML);
  }
  return bare;
})()
"""
QUANTITIES = "[...document.querySelectorAll('.quantity')].map((each) => each.textContent).filter(Boolean)"
# What reaches beyond the window, and what of the picture reaches beyond its node. What scrolls by itself may be wider.
OVERFLOWING = """
(() => {
  const found = [];
  const width = document.documentElement.clientWidth;
  for (const each of document.body.querySelectorAll("*")) {
    if (!each.checkVisibility() || each.closest(".scroll, .hidden, .skip, script, noscript")) continue;
    const box = each.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1)) found.push(each.outerHTML.slice(0, 120));
    const clips = getComputedStyle(each).overflowX !== "visible" || each instanceof SVGElement;
    if (!clips && each.clientWidth && each.scrollWidth > each.clientWidth + 1) found.push(each.outerHTML.slice(0, 120));
  }
  for (const node of document.querySelectorAll(".picture .node")) {
    const frame = node.querySelector(".frame").getBoundingClientRect();
    for (const text of node.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.right > frame.right || box.left < frame.left || box.bottom > frame.bottom) found.push(text.outerHTML);
    }
  }
  for (const tick of document.querySelectorAll(".plot text")) {
    const box = tick.getBoundingClientRect();
    const plot = tick.closest(".plot").getBoundingClientRect();
    if (box.left < plot.left - 1 || box.right > plot.right + 1) found.push(tick.outerHTML);
  }
  return found;
})()
"""
# Texts whose contrast with what lies behind them is below that of WCAG AA for small text.
LOW_CONTRAST = """
(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const linear = channels(colour).slice(0, 3).map((channel) => channel / 255)
      .map((channel) => channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
  };
  const low = [];
  const texts = "h1, h2, h3, p, dt, dd, small, th, td, li, label, summary, span, a, button:enabled, pre, time";
  for (const each of document.querySelectorAll(texts)) {
    if (!each.textContent.trim() || each.closest(".hidden, .skip")) continue;
    const [one, other] = [luminance(getComputedStyle(each).color), luminance(behind(each))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${each.outerHTML.slice(0, 100)}`);
  }
  return low;
})()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    """A mesh that moves KV: prompts of two blocks or more are prefilled remotely."""
    async with running_mesh(
        mesh__decode=2,
        mesh__prefill=1,
        engine__name="simulated",
        engine__options__block_size="16",
        remote_prefill__min_uncached_tokens=32,
    ) as mesh:
        yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Chromium]:
    async with running_chromium() as chromium:
        yield chromium


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(mesh: Mesh, chromium: Chromium) -> Page:
    """The page of a mesh that has served eight requests while it was looked at."""
    page = await chromium.open(url_of(mesh), width=1280, height=900)
    await page.wait_for("document.querySelectorAll('.workers tbody tr').length == 3")
    await send_requests(mesh, 8)
    await page.wait_for("document.getElementById('tiles').textContent.includes('8 requests so far')")
    await page.wait_for("document.querySelectorAll('.decisions details').length == 8")
    await page.wait_for("document.querySelector('#chart-ttft .line') !== null")
    return page


def url_of(mesh: Mesh) -> str:
    return f"http://{mesh.http_address}/"


async def send_requests(mesh: Mesh, count: int) -> None:
    async with httpx.AsyncClient(base_url=url_of(mesh), trust_env=False, timeout=REQUEST_S) as client:
        for number in range(count):
            prompt = f"What does every worker of a mesh tell its router, and how often? Reader {number % 2}"
            answer = await client.post("/generate", json={"prompt": prompt, "sampling": {"max_tokens": 8}})
            answer.raise_for_status()


async def send_prompt(page: Page, text: str) -> None:
    await page.evaluate(f"document.getElementById('prompt').value = {text!r}")
    await page.evaluate("document.getElementById('prompt-form').requestSubmit()")
    await page.wait_for("/^Done in/.test(document.getElementById('prompt-status').textContent)")


async def topology_of(mesh: Mesh) -> Any:
    async with httpx.AsyncClient(base_url=url_of(mesh), trust_env=False, timeout=REQUEST_S) as client:
        return (await client.get("/mesh/v1/topology")).json()["topology"]


async def test_every_worker_is_in_the_picture_and_in_the_table(served: Page) -> None:
    rows = await served.evaluate("[...document.querySelectorAll('.workers tbody tr')].map((row) => row.dataset.worker)")
    titles = await served.evaluate("[...document.querySelectorAll('.picture title')].map((each) => each.textContent)")
    states = await served.evaluate("[...document.querySelectorAll('.workers .state')].map((each) => each.textContent)")

    assert rows == [*DECODE, PREFILL]
    assert [name for name in ("gateway", "router", *DECODE, "KV blocks", "prefill queue", PREFILL) if not any(
        title.startswith(name) for title in titles
    )] == []  # fmt: skip
    assert states == ["ready"] * 3


async def test_edges_join_the_roles_that_talk_to_each_other(served: Page) -> None:
    edges = await served.evaluate("[...document.querySelectorAll('.edge')].map((edge) => edge.dataset.edge)")

    assert set(edges) == {
        "router>gateway",
        *(f"gateway>worker {worker}" for worker in DECODE),
        *(f"worker {worker}>queue" for worker in DECODE),
        *(f"kv>worker {worker}" for worker in DECODE),
        f"queue>worker {PREFILL}",
        f"worker {PREFILL}>kv",
    }


async def test_edges_are_live_while_requests_pass(mesh: Mesh, served: Page) -> None:
    live = "[...document.querySelectorAll('.edge.live.%s')].some((edge) => edge.dataset.edge.startsWith('%s'))"

    await send_requests(mesh, 2)
    await served.wait_for(live % ("request", "gateway>worker"))
    await send_prompt(served, "Another prompt that is prefilled remotely, for it is long and new")
    await served.wait_for(live % ("task", "queue>worker"))
    await served.wait_for(live % ("kv", f"worker {PREFILL}>kv"))

    assert await served.evaluate("document.querySelectorAll('.edge').length") == 9


async def test_charts_show_latencies_and_hit_rates_as_the_topology_has_them(mesh: Mesh, served: Page) -> None:
    await served.wait_for("document.querySelector('#chart-hits .line.good') !== null")
    legend = await served.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) =>"
        " [chart.id, chart.querySelector('.legend').textContent]))"
    )
    counters = (await topology_of(mesh))["counters"]

    assert "p50" in legend["chart-ttft"]
    assert "p99" in legend["chart-itl"]
    assert int(counters["prompt_tokens"]) > 0
    assert legend["chart-hits"].startswith("actual ")
    assert " %" in legend["chart-hits"].partition("predicted")[0]
    assert legend["chart-hits"].endswith(" %")


async def test_decisions_show_every_term_of_every_candidate(mesh: Mesh, served: Page) -> None:
    await served.evaluate("document.querySelector('.decisions details').open = true")

    await served.wait_for("document.querySelector('.decisions .terms') !== null")
    head = await served.evaluate(
        "[...document.querySelectorAll('.decisions .terms th[scope=col]')].map((e) => e.textContent)"
    )
    rows = await served.evaluate(
        "[...document.querySelector('.decisions .terms').tBodies[0].rows].map((row) =>"
        " [...row.cells].map((cell) => cell.textContent))"
    )

    assert {"candidate", "cost", "overlap blocks", "prefill cost", "decode cost", "why not"} <= set(head)
    assert {row[0] for row in rows} == set(DECODE)
    assert all(cell.endswith((" blocks", " requests", " tokens")) for row in rows for cell in row[1:-1])
    assert [row[-1] for row in rows].count("chosen") == 1


async def test_held_decisions_stay_and_come_when_let_go(mesh: Mesh, served: Page) -> None:
    newest = "document.querySelector('.decisions details').dataset.key"
    before = await served.evaluate(newest)

    await served.evaluate("document.getElementById('hold').click()")
    await send_requests(mesh, 1)
    await served.wait_for("/Held: [1-9]/.test(document.getElementById('decisions-note').textContent)")
    held = await served.evaluate(newest)
    await served.evaluate("document.getElementById('hold').click()")
    await served.wait_for(f"{newest} !== {before!r}")

    assert held == before


async def test_a_prompt_shows_its_tokens_and_the_path_they_took(mesh: Mesh, served: Page) -> None:
    moved_before = int((await topology_of(mesh))["counters"]["kv_bytes_moved"])

    await send_prompt(served, "A prompt that nobody has sent before, and which is long enough for a remote prefill")
    path = await served.evaluate("[...document.querySelectorAll('.path > li')].map((step) => step.textContent)")
    output = await served.evaluate("document.getElementById('output').textContent")
    marked = await served.evaluate("[...document.querySelectorAll('.node.on-path title')].map((e) => e.textContent)")
    topology = await topology_of(mesh)

    worker = next(worker for worker in DECODE if any(step.startswith(f"decode worker {worker}") for step in path))
    moved = int(topology["counters"]["kv_bytes_moved"]) - moved_before
    assert len(output) > 8
    assert any(step.startswith("router least_work chose among 2 candidates") for step in path)
    assert any(step.startswith("prefill remote") for step in path)
    assert any(step.startswith("cache 0 tokens of ") for step in path)
    assert moved > 0
    assert any(step.startswith("KV moved") and step.endswith(" moved") for step in path)
    assert any(step.startswith("tokens ") and step.endswith("tokens/s from there on") for step in path)
    assert {"gateway", "router", worker, "prefill queue", "KV blocks"} == {title.split(",")[0] for title in marked}


async def test_markup_in_a_prompt_and_in_its_answer_stays_text(chromium: Chromium) -> None:
    async with running_mesh(engine__name="echo", mesh__decode=1, mesh__prefill=0) as mesh:
        page = await chromium.open(url_of(mesh), width=390, height=800)
        await send_prompt(page, MARKUP)
        output = await page.evaluate("document.getElementById('output').textContent")
        elements = await page.evaluate("document.querySelectorAll('#output b, #output img, #path img').length")

    assert output.startswith(MARKUP)
    assert elements == 0


async def test_a_refused_prompt_says_why(served: Page) -> None:
    await served.evaluate("document.getElementById('prompt-form').noValidate = true")
    await served.evaluate("document.getElementById('prompt').value = ''")

    await served.evaluate("document.getElementById('prompt-form').requestSubmit()")
    await served.wait_for("document.getElementById('prompt-status').textContent.startsWith('EMPTY_PROMPT')")

    assert await served.evaluate("document.getElementById('send').disabled") is False


async def test_every_number_has_its_unit(served: Page) -> None:
    await served.evaluate("document.querySelector('.decisions details').open = true")

    quantities = await served.evaluate(QUANTITIES)

    assert await served.evaluate(BARE_NUMBERS) == []
    assert len(quantities) > 40
    assert [text for text in quantities if text[-1:].isdigit()] == []


@pytest.mark.parametrize("width", [1280, 900, 390, 320])
async def test_nothing_overflows(served: Page, width: int) -> None:
    await served.evaluate("document.querySelector('.decisions details').open = true")

    await served.resize(width, 844)
    await served.wait_for(f"document.querySelector('.picture svg').clientWidth < {width}")
    await served.wait_for(f"[...document.querySelectorAll('.plot svg')].every((plot) => plot.clientWidth < {width})")
    found = await served.evaluate(OVERFLOWING)
    await served.resize(1280, 900)

    assert found == []


@pytest.mark.parametrize("is_dark", [False, True])
async def test_texts_are_readable_in_the_theme_of_the_system(served: Page, is_dark: bool) -> None:
    await served.prefer_dark(is_dark)
    background = await served.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    low = await served.evaluate(LOW_CONTRAST)
    await served.prefer_dark(False)

    assert (sum(map(int, background[4:-1].split(","))) < 3 * 64) is is_dark
    assert low == []


async def test_a_chosen_theme_beats_that_of_the_system_and_is_remembered(mesh: Mesh, chromium: Chromium) -> None:
    page = await chromium.open(url_of(mesh), width=390, height=800)
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = await page.evaluate(background)

    for _ in ("light", "dark"):
        await page.evaluate("document.getElementById('theme').click()")
    dark = await page.evaluate(background)
    await page.go(url_of(mesh))

    assert dark != light
    assert await page.evaluate(background) == dark
    assert await page.evaluate("document.getElementById('theme').textContent") == "theme: dark"
    await page.evaluate("localStorage.clear()")


async def test_controls_regions_and_pictures_have_names(served: Page) -> None:
    tree = (await served.command("Accessibility.getFullAXTree"))["nodes"]
    wanted = {"button", "textbox", "spinbutton", "link", "image", "region", "meter", "list", "log"}
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node.get("role", {}).get("value") in wanted
    ]

    assert {"button", "textbox", "spinbutton", "link"} <= {role for role, _ in found}
    assert [role for role, name in found if not name and role != "list"] == []
    assert ("textbox", "Prompt") in found


async def test_the_page_runs_under_its_own_policy_without_a_fault(served: Page) -> None:
    refused = [fault for fault in served.faults if "/mesh/v1/generate" not in fault]  # what a test had refused

    assert refused == []
    assert await served.evaluate("document.getElementById('connection').textContent") == "live"


async def test_the_keyboard_sends_a_prompt(served: Page) -> None:
    await served.evaluate("document.getElementById('prompt').value = 'By the keyboard'")
    await served.evaluate("document.getElementById('prompt-status').textContent = ''")
    await served.evaluate("document.getElementById('prompt').focus()")

    for kind in ("rawKeyDown", "keyUp"):
        key = {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": CTRL}
        await served.command("Input.dispatchKeyEvent", key)
    await served.wait_for("/^Done in/.test(document.getElementById('prompt-status').textContent)")

    assert await served.evaluate("document.querySelectorAll('#output span').length") > 8


async def test_a_stopped_prompt_is_cancelled_in_the_mesh(mesh: Mesh, served: Page) -> None:
    before = (await topology_of(mesh))["counters"]
    await served.evaluate("document.getElementById('prompt').value = 'Go on for long'")
    await served.evaluate("document.getElementById('max-tokens').value = 4096")
    await served.evaluate("document.getElementById('prompt-form').requestSubmit()")
    await served.wait_for("document.querySelectorAll('#output span').length > 4")

    await served.evaluate("document.getElementById('stop').click()")
    await served.wait_for("document.getElementById('prompt-status').textContent.startsWith('Stopped')")
    await served.wait_for("document.getElementById('tiles').textContent.includes('1 request cancelled')")
    await served.evaluate("document.getElementById('max-tokens').value = 16")
    after = (await topology_of(mesh))["counters"]

    assert int(after["cancelled"]) == int(before["cancelled"]) + 1


async def test_a_large_mesh_with_long_names_stays_within_the_window(chromium: Chromium) -> None:
    async with running_mesh(mesh__decode=11, mesh__prefill=7, mesh__node_names=LONG_NODES) as mesh:
        page = await chromium.open(url_of(mesh), width=1280, height=900)
        await page.wait_for("document.querySelectorAll('.workers tbody tr').length == 18")
        wide = await page.evaluate(OVERFLOWING)
        more = await page.evaluate("[...document.querySelectorAll('.node.more title')].map((e) => e.textContent)")
        await page.resize(390, 844)
        await page.wait_for("document.querySelector('.picture svg').clientWidth < 390")
        narrow = await page.evaluate(OVERFLOWING)

    assert [text.split(",")[0] for text in more] == ["and 4 more"]
    assert (wide, narrow) == ([], [])


async def test_a_mesh_that_has_served_nothing_says_so(chromium: Chromium) -> None:
    async with running_mesh(mesh__decode=1, mesh__prefill=0) as mesh:
        page = await chromium.open(url_of(mesh), width=390, height=800)
        await page.wait_for("document.querySelectorAll('.workers tbody tr').length == 1")
        shown = await page.evaluate("document.body.innerText")
        live = await page.evaluate("document.querySelectorAll('.edge.live').length")

    assert live == 0
    assert "No request has been routed yet." in shown
    assert "No request had its first token in these two minutes." in shown
    assert "Send a prompt to see who served it, and why." in shown


async def test_a_worker_that_dies_visibly_goes(chromium: Chromium) -> None:
    async with running_mesh(mesh__decode=2, mesh__prefill=0) as mesh:
        page = await chromium.open(url_of(mesh), width=1280, height=800)
        await page.wait_for("document.querySelectorAll('.workers tbody tr').length == 2")

        await mesh.workers[1].stop()
        await page.wait_for(f"document.querySelector('[data-worker=\"{DECODE[1]}\"].gone') !== null")
        state = await page.evaluate(f"document.querySelector('[data-worker=\"{DECODE[1]}\"] .state').textContent")
        title = await page.evaluate("document.querySelector('.picture .node.gone title').textContent")
        log = await page.evaluate("document.getElementById('events').textContent")
        note = await page.evaluate("document.getElementById('workers-note').textContent")

    assert state == "gone"
    assert title.startswith(DECODE[1])
    assert f"{DECODE[1]} is gone." in log
    assert note == "1 worker"


async def test_the_page_says_that_the_gateway_is_away_and_comes_back_by_itself(chromium: Chromium) -> None:
    async with running_mesh(mesh__decode=1, mesh__prefill=0) as mesh:
        port = int(mesh.http_address.rpartition(":")[2])
        page = await chromium.open(url_of(mesh), width=390, height=800)
        await page.wait_for("document.getElementById('connection').dataset.state == 'live'")
    await page.wait_for("document.getElementById('connection').textContent.startsWith('the gateway does not answer')")
    async with running_mesh(mesh__decode=2, mesh__prefill=0, http__port=port):
        await page.wait_for("document.getElementById('connection').dataset.state == 'live'")
        await page.wait_for("document.querySelectorAll('.workers tbody tr').length == 2")
        log = await page.evaluate("document.getElementById('events').textContent")

    assert "The gateway does not answer." in log
    assert "Connected to the gateway again." in log


async def test_a_hidden_page_asks_for_nothing_and_goes_on_when_it_is_seen(mesh: Mesh, chromium: Chromium) -> None:
    await send_requests(mesh, 1)
    page = await chromium.open(url_of(mesh), width=390, height=800)
    await page.wait_for("document.getElementById('connection').dataset.state == 'live'")
    await page.wait_for("document.querySelector('.decisions details') !== null")
    listed = await page.evaluate("document.querySelectorAll('.decisions details').length")

    await page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "window.opened = 0; const own = window.EventSource;"
        "window.EventSource = class extends own { constructor(url) { super(url); window.opened += 1; } };"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    opened_hidden = await page.evaluate("window.opened")
    await page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    opened_again = await page.evaluate("window.opened")
    await send_requests(mesh, 1)
    await page.wait_for(f"document.querySelectorAll('.decisions details').length > {listed}")

    assert opened_hidden == 0
    assert opened_again == 2
    assert await page.evaluate("document.querySelectorAll('.decisions details').length") == listed + 1
