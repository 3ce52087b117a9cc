"""Makes the ZMQ publisher of an engine's KV events a worker's event source.

    live message: topic, sequence (u64, big-endian), batch       replay request: "", first sequence
                                                                 replies: "", sequence, batch ... "", -1, ""

A publisher loses messages without a word, and starts at 0 again when it restarts. What it keeps for replay is the
truth: it is asked when a live message does not follow on, and every `check_s` without any, always from the last message
that was taken in, inclusive. If that comes back as it was, what follows it is what was missed; if not, this is another
life of the publisher, or more was lost than it keeps, and the cache is learnt anew. Nothing is ever claimed that is not
known: where no replay can tell, everything is forgotten.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from xxhash import xxh3_64_intdigest

from kvmesh import telemetry
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.foreign_blocks import ForeignBlocks, Refusal
from kvmesh.core.kv_events import CacheCleared, KvEvent
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.vllm_events import decode_batch, require_packages

log = telemetry.logger(__name__)

_END = (-1).to_bytes(8, "big", signed=True)
_LIVE_FRAMES = 3
_HIGH_WATER = 100_000
"""Messages that may wait to be read; publishers keep as many by default."""
_RETRY_S = 1.0


class VllmEventSource:
    """Follows the publisher of one data-parallel rank; all on the event loop."""

    def __init__(
        self,
        *,
        endpoint: str,
        publish: Callable[[Sequence[KvEvent]], None],
        block_size: int,
        replay_endpoint: str | None = None,
        topic: str = "",
        lora_names: Mapping[int, str] | None = None,
        max_blocks: int = 1_048_576,
        check_s: float = 5.0,
        replay_timeout_s: float = 2.0,
    ) -> None:
        """Connect to `endpoint` from `start` on and hand on what it says to `publish`, e.g. of a WorkerEvents.

        `replay_timeout_s` bounds the wait for each reply. Raises: NotServedError if a package is missing.
        """
        self.position: int | None = None
        """The last message that was taken in; None: none."""
        self._zmq = require_packages()
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._topic = topic.encode()
        self._publish = publish
        self._blocks = ForeignBlocks(block_size=block_size, lora_names=lora_names, max_blocks=max_blocks)
        self._check_s = check_s
        self._replay_timeout_s = replay_timeout_s
        self._digest = 0
        """Of the message at `position`."""
        self._last_live: int | None = None
        self._is_whole = False
        """True: everything before `position` is known, as far as the publisher keeps it."""
        self._context = self._zmq.asyncio.Context()
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Begin to follow."""
        self._tasks.start(self._follow(), name=f"vllm-events-{self._endpoint}")

    async def aclose(self) -> None:
        """Stop following; what was published stays. Idempotent."""
        await self._tasks.aclose()
        self._context.destroy(linger=0)

    async def _follow(self) -> None:
        while True:
            try:
                await self._follow_live()
            except self._zmq.ZMQError as exc:
                log.warning("engine_events.broken", endpoint=self._endpoint, error=str(exc))
            await asyncio.sleep(_RETRY_S)

    async def _follow_live(self) -> None:
        zmq = self._zmq
        with self._context.socket(zmq.SUB) as live:
            live.set(zmq.RCVHWM, _HIGH_WATER)
            live.set(zmq.LINGER, 0)
            live.set(zmq.SUBSCRIBE, self._topic)
            live.connect(self._endpoint)
            await self._catch_up()
            while True:
                if await live.poll(self._check_s * 1e3):
                    await self._take_live(await live.recv_multipart())
                    await asyncio.sleep(0)  # what has arrived is read without waiting: let others run in between
                else:
                    await self._catch_up()

    async def _take_live(self, frames: Sequence[bytes]) -> None:
        if len(frames) != _LIVE_FRAMES:
            _ignored("frames")
            return
        sequence = int.from_bytes(frames[1], "big")
        if self._last_live is not None and sequence <= self._last_live:
            self._forget("restarted")
        self._last_live = sequence
        if self.position is not None and sequence <= self.position:
            return  # a replay was faster
        if sequence == self._next:
            self._apply(sequence, frames[2])
        elif not await self._catch_up():
            self._forget("lost")
            self._apply(sequence, frames[2])
            self._last_live = sequence
        elif sequence < self._next:
            self._last_live = sequence
        else:
            _ignored("of_another_life")  # all that this publisher had sent was in the replay

    @property
    def _next(self) -> int:
        return 0 if self.position is None else self.position + 1

    async def _catch_up(self) -> bool:
        """Take in what the publisher keeps beyond the position; False: it cannot be asked, or does not answer."""
        if self._replay_endpoint is None:
            return False
        try:
            if self.position is not None and self._is_whole:
                if await self._replay_from(self.position, digest=self._digest):
                    return True
                self._forget("restarted")
            await self._replay_from(0)
        except TimeoutError:
            telemetry.ENGINE_EVENT_REPLAYS.labels(outcome="no_answer").inc()
            return False
        return True

    async def _replay_from(self, start: int, *, digest: int | None = None) -> bool:
        """Take in a replay; False, and nothing is changed, if it does not begin with the message of this digest."""
        is_first = True
        async with aclosing(self._replies(start)) as replies:
            async for sequence, payload in replies:
                if is_first and digest is not None:
                    if (sequence, xxh3_64_intdigest(payload)) != (start, digest):
                        return False
                elif is_first:
                    self._forget("replayed")
                    self._is_whole = True
                    self._apply(sequence, payload)
                else:
                    if sequence != self._next:
                        self._forget("lost")
                    self._apply(sequence, payload)
                is_first = False
        telemetry.ENGINE_EVENT_REPLAYS.labels(outcome="answered").inc()
        return not is_first or digest is None

    async def _replies(self, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yield what the publisher keeps from `start` on. Raises: TimeoutError."""
        zmq = self._zmq
        with self._context.socket(zmq.DEALER) as asking:  # a new identity: replies to an older request are not for it
            asking.set(zmq.RCVHWM, 0)
            asking.set(zmq.LINGER, 0)
            asking.connect(self._replay_endpoint)
            await asking.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                if not await asking.poll(self._replay_timeout_s * 1e3):
                    raise TimeoutError(f"{self._replay_endpoint} does not answer")
                *_, sequence, payload = await asking.recv_multipart()
                if sequence == _END:
                    return
                yield int.from_bytes(sequence, "big"), payload
                await asyncio.sleep(0)  # as above

    def _apply(self, sequence: int, payload: bytes) -> None:
        """Hand one message on; what cannot be read says nothing."""
        telemetry.ENGINE_EVENT_BATCHES.inc()
        self._is_whole |= self.position is None and not sequence
        self.position, self._digest = sequence, xxh3_64_intdigest(payload)
        try:
            batch = decode_batch(payload, on_ignored=_ignored)
        except FixRequestError:
            _ignored("malformed_batch")
            return
        meant = [self._blocks.translate(event) for event in batch.events]
        for refusal in meant:
            if isinstance(refusal, Refusal):
                _ignored(refusal.value)
        self._publish([event for event in meant if event is not None and not isinstance(event, Refusal)])

    def _forget(self, why: str) -> None:
        """Claim nothing any more: what the engine holds is not known."""
        if self.position is not None:
            log.warning("engine_events.forgotten", endpoint=self._endpoint, why=why, blocks=len(self._blocks))
            telemetry.ENGINE_EVENT_REPLAYS.labels(outcome=why).inc()
        if len(self._blocks):
            self._publish([CacheCleared()])
        self._blocks.forget()
        self.position = self._last_live = None
        self._is_whole = False


def endpoint_of_rank(endpoint: str, rank: int) -> str:
    """Return where a data-parallel rank publishes if rank 0 does so at `endpoint`: each has the next port.

    Raises: FixRequestError(INVALID_FIELD) if that has no port.
    """
    if not rank:
        return endpoint
    if endpoint.startswith("inproc://"):
        return f"{endpoint}_dp{rank}"
    address, _, port = endpoint.rpartition(":")
    if not port.isdecimal():
        raise FixRequestError(
            Reason.INVALID_FIELD, f"{endpoint!r} has no port to count the ranks from", field="endpoint"
        )
    return f"{address}:{int(port) + rank}"


def _ignored(reason: str) -> None:
    telemetry.ENGINE_EVENTS_IGNORED.labels(reason=reason).inc()
