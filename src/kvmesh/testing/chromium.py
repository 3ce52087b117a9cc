"""A headless Chromium, driven by its DevTools protocol over a pair of pipes: no port, no driver, no package.

async with running_chromium() as chromium:
    page = await chromium.open("http://127.0.0.1:8080/", width=390, height=800)
    await page.wait_for("document.title")
"""

import asyncio
import base64
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvmesh.services.owned_tasks import OwnedTasks

__all__ = ["WAIT_S", "Chromium", "Page", "PageError", "find_chromium", "running_chromium"]

WAIT_S = 30.0
"""How long anything in the browser may take on a busy machine."""
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--mute-audio",
)
_MAX_MESSAGE_BYTES = 64 * 2**20
_END_S = 5.0


class PageError(Exception):
    """The browser refused a command, or an expression threw."""


def find_chromium() -> str | None:
    """Return the program, None where none is installed; `make install-chromium` installs one on Debian."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@asynccontextmanager
async def running_chromium() -> AsyncIterator["Chromium"]:
    """Run a browser with a profile of its own for the block. Raises: RuntimeError where none is installed."""
    program = find_chromium()
    if program is None:
        raise RuntimeError("no Chromium: make install-chromium")
    with TemporaryDirectory(prefix="kvmesh-chromium-", ignore_cleanup_errors=True) as profile:
        chromium = Chromium()
        try:
            await chromium.start(program, profile=Path(profile))
            yield chromium
        finally:
            await chromium.aclose()


class Chromium:
    """One browser process."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._commands: asyncio.WriteTransport | None = None
        self._tasks = OwnedTasks()
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def start(self, program: str, *, profile: Path) -> None:
        """Start it."""
        commands_out, commands_in = os.pipe()
        events_out, events_in = os.pipe()
        flags = [*_FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        redirect = f'exec "$0" "$@" 3</dev/fd/{commands_out} 4>/dev/fd/{events_in}'
        try:
            self._process = await asyncio.create_subprocess_exec(
                "sh", "-c", redirect, program, *flags, "about:blank",
                pass_fds=(commands_out, events_in),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(commands_out)
            os.close(events_in)
        loop = asyncio.get_running_loop()
        self._commands, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(commands_in, "wb"))
        reader = asyncio.StreamReader(limit=_MAX_MESSAGE_BYTES)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(events_out, "rb"))
        self._tasks.start(self._read(reader), name="chromium")

    async def aclose(self) -> None:
        """End it, with all its processes. Idempotent."""
        if self._process is not None and self._process.returncode is None:
            with suppress(PageError, TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self.command("Browser.close")
                    await self._process.wait()
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            await self._process.wait()
        await self._tasks.aclose()
        if self._commands is not None:
            self._commands.close()

    async def open(self, url: str, *, width: int, height: int, dark: bool = False) -> "Page":
        """Open a page in a window of this size, in CSS pixels, and wait until it is loaded."""
        target = await self.command("Target.createTarget", {"url": "about:blank"})
        session = await self.command("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        page = Page(self, session["sessionId"])
        self._pages[session["sessionId"]] = page
        for domain in ("Page", "Runtime", "Log"):
            await page.command(f"{domain}.enable")
        await page.command("Emulation.setFocusEmulationEnabled", {"enabled": True})  # seen, whichever tab is in front
        await page.resize(width, height)
        await page.prefer_dark(dark)
        await page.go(url)
        return page

    async def command(self, method: str, params: dict[str, Any] | None = None, session: str = "") -> dict[str, Any]:
        """Send one command and return its result. Raises: PageError, TimeoutError."""
        assert self._commands is not None
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = session
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._commands.write(json.dumps(message).encode() + b"\0")
        try:
            async with asyncio.timeout(WAIT_S):
                return await answer
        finally:
            del self._answers[number]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._take(json.loads((await reader.readuntil(b"\0"))[:-1]))
        except asyncio.IncompleteReadError:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(PageError("the browser has ended"))

    def _take(self, message: dict[str, Any]) -> None:
        answer = self._answers.get(message.get("id", 0))
        if answer is not None and not answer.done():
            if "error" in message:
                answer.set_exception(PageError(message["error"]["message"]))
            else:
                answer.set_result(message["result"])
        elif (page := self._pages.get(message.get("sessionId", ""))) is not None:
            page.take_event(message.get("method", ""), message.get("params", {}))


class Page:
    """One tab."""

    def __init__(self, chromium: Chromium, session: str) -> None:
        self._chromium = chromium
        self._session = session
        self._loaded = asyncio.Event()
        self.faults: list[str] = []
        """What the page threw, and what its console showed as an error: refused scripts and styles among them."""

    async def go(self, url: str) -> None:
        """Load another document."""
        self._loaded.clear()
        await self.command("Page.navigate", {"url": url})
        async with asyncio.timeout(WAIT_S):
            await self._loaded.wait()

    async def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.command("Emulation.setDeviceMetricsOverride", size)

    async def prefer_dark(self, dark: bool) -> None:  # reads as a sentence where it is called
        """Say what the system's theme is."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.command("Emulation.setEmulatedMedia", {"features": [scheme]})

    async def evaluate(self, expression: str) -> Any:
        """Return the value, as JSON has it, of an expression or of the promise that it is. Raises: PageError."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = await self.command("Runtime.evaluate", params)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    async def wait_for(self, expression: str) -> Any:
        """Return the expression's value once the document makes it true. Raises: TimeoutError with what it shows."""
        try:
            return await self.evaluate(_ONCE_TRUE % {"expression": expression})
        except TimeoutError as exc:
            shown = await self.evaluate("document.body.innerText")
            raise TimeoutError(f"not within {WAIT_S:g} s: {expression}\nfaults: {self.faults}\n{shown}") from exc

    async def screenshot(self) -> bytes:
        """Return the whole document, beyond the window too, as PNG."""
        size = (await self.command("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        params = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        return base64.b64decode((await self.command("Page.captureScreenshot", params))["data"])

    async def command(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send this tab one command and return its result. Raises: PageError, TimeoutError."""
        return await self._chromium.command(method, params, self._session)

    def take_event(self, method: str, params: dict[str, Any]) -> None:
        """Take what the browser says of this tab by itself."""
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.faults.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.faults.append(f"{entry['text']} {entry.get('url', '')}")


_ONCE_TRUE = """new Promise((resolve) => {
  const look = () => {
    const value = (%(expression)s);
    if (value) { observer.disconnect(); resolve(value); }
  };
  const observer = new MutationObserver(look);
  observer.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  look();
})"""
