"""What a served instance says of its load and its cache, on the streams that every worker of the mesh has."""

import asyncio
from collections.abc import Callable, Sequence

from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.kv_events import KvEvent
from kvmesh.engines.engine import EngineLoad
from kvmesh.services.worker_events import LoadView, RankView, WorkerEvents


class Publications:
    """One instance's figures and KV events; its methods may be called from any thread."""

    def __init__(self, *, is_draining: Callable[[], bool]) -> None:
        """Nothing is published before something is said; made on the event loop."""
        self._is_used = False
        self._is_decided = False
        self._block_size: int | None = None
        self._is_draining = is_draining
        self._loop = asyncio.get_running_loop()
        self._load = EngineLoad()
        self._early: list[KvEvent] = []
        self._events: WorkerEvents | None = None

    @property
    def is_used(self) -> bool:
        """Something publishes here, so the instance serves WorkerEvents."""
        return self._is_used

    @property
    def block_size(self) -> int:
        """Tokens in a block of the events."""
        return self._block_size or 1

    @property
    def total_blocks(self) -> int:
        """Blocks of the pool, as it was said first."""
        return self._load.total_blocks

    def use(self, *, block_size: int | None = None) -> None:
        """Have the instance serve WorkerEvents, its blocks of so many tokens; None = no blocks are told of.

        Raises: RuntimeError once the instance is served and the others were told that it does not.
        """
        is_new = not self._is_used or (block_size is not None and block_size != self._block_size)
        if self._is_decided and is_new:
            raise RuntimeError("the instance is served already: make its publishers in __init__ or @on_start")
        if block_size is not None and self._block_size not in (None, block_size):
            raise RuntimeError(f"blocks of {self._block_size} and of {block_size} tokens: one instance has one size")
        self._is_used = True
        self._block_size = self._block_size if block_size is None else block_size

    def open(self, worker_id: WorkerId, epoch: Epoch) -> WorkerEvents | None:
        """Return the servicer, with all that was said until now; None, for good, where nothing publishes."""
        self._is_decided = True
        if not self._is_used:
            return None
        self._events = WorkerEvents(
            worker_id=worker_id, epoch=epoch, block_size=self.block_size, load_source=lambda _router_id: self._view()
        )
        self._events.publish_kv(self._early)
        self._early.clear()
        return self._events

    def say_load(self, load: EngineLoad) -> None:
        """Publish the figures."""
        self._load = load
        self._on_loop(lambda: self._events.load_changed() if self._events is not None else None)

    def say_kv(self, events: Sequence[KvEvent]) -> None:
        """Publish KV events, in the order of the calls."""
        self._on_loop(lambda: self._publish(events))

    def close(self) -> None:
        """End every watch, so that the server can stop. Idempotent."""
        if self._events is not None:
            self._events.close()

    def drain_changed(self) -> None:
        """Tell the watchers that the instance drains, or does no more."""
        if self._events is not None:
            self._events.load_changed()

    def _publish(self, events: Sequence[KvEvent]) -> None:
        if self._events is None:
            self._early += events
        else:
            self._events.publish_kv(events)

    def _on_loop(self, say: Callable[[], None]) -> None:
        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_here = False
        if is_here:
            say()
            return
        try:
            self._loop.call_soon_threadsafe(say)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # the instance has ended, and so has everybody who listened: its author's thread need not know

    def _view(self) -> LoadView:
        return LoadView(draining=self._is_draining(), ranks=(RankView(load=self._load),))
