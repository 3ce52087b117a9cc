"""The thread on which an engine follows streams, with an event loop of its own: one task per running request.

What the streams bring piles up, in order, until the engine's thread takes it. One lock guards that.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from kvmesh.core.errors import MeshError, Reason, TryElsewhereError
from kvmesh.core.kv_events import KvEvent
from kvmesh.engines.engine import EngineHandoff, EngineLoad, EngineRequest, FinishReason

T = TypeVar("T")
Publish = Callable[[Sequence[KvEvent]], None]

_CLOSE_S = 5.0
_REST_S = 1.0
"""For what is left on the loop after that; what takes longer is let go of."""


class StreamUsage(NamedTuple):
    """What the other side counted."""

    prompt_tokens: int
    cached_tokens: int | None = None
    """None: it does not say."""
    completion_tokens: int = 0
    """0: it does not say."""


class Piece(NamedTuple):
    """What a stream brings at once."""

    words: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish: FinishReason | None = None
    """Nothing follows."""
    handoff: EngineHandoff | None = None
    """With PREFILLED: what another instance goes on from."""
    usage: StreamUsage | None = None
    """None: the other side has not said it."""


class Streams(Protocol):
    """Where the work is done. Every method but `figures` is called on the streams' thread."""

    async def open(self, publish: Publish) -> None:
        """Get ready; KV events of the other side's cache, if it tells any, go to `publish`. Raises: MeshError."""

    def stream(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        """Yield what one request produces, up to its finish; closing it ends the work. Raises: MeshError."""

    def figures(self, counted: EngineLoad) -> EngineLoad:
        """Return the load as the other side sees it, from what is `counted` here; O(1), on the engine's thread."""

    async def aclose(self) -> None:
        """Give everything back."""


class StreamThread(Generic[T]):
    """Follows streams, each under a name of the caller's. All methods are for the caller's one thread."""

    def __init__(self, streams: Streams, *, name: str, open_s: float) -> None:
        """Own `streams` from now on and open them, within `open_s`. Raises: MeshError."""
        self._streams = streams
        self._arrived: list[tuple[T, Piece | MeshError]] = []
        self._kv_events: deque[KvEvent] = deque()
        self._has_news = threading.Condition()
        """Guards both."""
        self._followers: set[asyncio.Task[None]] = set()
        """Known to the streams' thread alone."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-streams", daemon=True)
        self._thread.start()
        try:
            self._on_loop(streams.open(self._publish), timeout_s=open_s)
        except TimeoutError as exc:
            self.close()
            raise TryElsewhereError(Reason.WORKER_LOST, f"{name} was not ready within {open_s:g} s") from exc
        except BaseException:
            self.close()
            raise

    def follow(self, request: EngineRequest, *, under: T) -> "Future[None]":
        """Begin to follow a request's stream; cancel what is returned to end it."""
        return asyncio.run_coroutine_threadsafe(self._follow(request, under), self._loop)

    def take(self, *, wait_s: float) -> list[tuple[T, Piece | MeshError]]:
        """Return what has arrived since, waiting `wait_s` for something, KV events too, if nothing has."""
        with self._has_news:
            self._has_news.wait_for(lambda: bool(self._arrived or self._kv_events), wait_s)
            arrived, self._arrived = self._arrived, []
        return arrived

    def take_kv_events(self) -> tuple[KvEvent, ...]:
        """Return the KV events that have arrived since."""
        with self._has_news:
            events = tuple(self._kv_events)
            self._kv_events.clear()
        return events

    def bring(self, under: T, news: Piece | MeshError) -> None:
        """Have `news` taken with what arrives next; on any thread."""
        with self._has_news:
            self._arrived.append((under, news))
            self._has_news.notify()

    def close(self) -> None:
        """End every stream and the thread. Idempotent."""
        if self._loop.is_closed():
            return
        try:
            with suppress(TimeoutError):
                self._on_loop(self._close_streams(), timeout_s=_CLOSE_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)

    async def _follow(self, request: EngineRequest, under: T) -> None:
        follower = asyncio.current_task()
        assert follower is not None
        self._followers.add(follower)
        try:
            async with aclosing(self._streams.stream(request)) as pieces:
                async for piece in pieces:
                    self.bring(under, piece)
                    if piece.finish is not None:
                        return
            self.bring(under, TryElsewhereError(Reason.WORKER_LOST, "the stream ended before the answer did"))
        except MeshError as error:
            self.bring(under, error)
        except Exception as error:  # nobody else would hear of it, and the request would wait for its deadline
            self.bring(under, MeshError(Reason.INTERNAL, repr(error)))
        finally:
            self._followers.discard(follower)

    def _publish(self, events: Sequence[KvEvent]) -> None:
        with self._has_news:
            self._kv_events.extend(events)
            self._has_news.notify()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_finish_the_rest())
        finally:
            self._loop.close()

    def _on_loop(self, work: Coroutine[Any, Any, None], *, timeout_s: float) -> None:
        """Wait for `work` on the streams' thread. Raises: TimeoutError, and what it raises."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    async def _close_streams(self) -> None:
        followers = tuple(self._followers)
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        await self._streams.aclose()


async def _finish_the_rest() -> None:
    """Let end what the streams' libraries left to the loop: the closing of generators that nobody iterates any more."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):
            await asyncio.get_running_loop().shutdown_asyncgens()
            await asyncio.sleep(0)  # a generator that is let go of is closed by a task that the loop makes next
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)
