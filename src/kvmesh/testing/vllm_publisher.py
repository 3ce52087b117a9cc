"""A publisher of KV events as vLLM's is: PUB with a sequence per message, ROUTER for replay of what it keeps."""

from collections import deque
from typing import Any

from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.vllm_events import require_packages

_END = (-1).to_bytes(8, "big", signed=True)
_SUBSCRIBED = b"\x01"


class VllmPublisher:
    """One life of a publisher; make it with `start` and end it with `aclose`."""

    def __init__(self, *, buffer_batches: int = 10_000) -> None:
        """Keep the latest `buffer_batches` for replay; their numbers begin at 0."""
        self.endpoint = ""
        self.replay_endpoint = ""
        self.replays: list[int] = []
        """First sequence of each replay that was asked for."""
        self.answers_replays = True
        self._zmq = require_packages()
        self._context = self._zmq.asyncio.Context()
        self._live = self._context.socket(self._zmq.XPUB)  # a PUB that hears of its subscribers
        self._replay = self._context.socket(self._zmq.ROUTER)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=buffer_batches)
        self._next = 0
        self._tasks = OwnedTasks()

    @classmethod
    async def start(
        cls,
        *,
        endpoint: str = "tcp://127.0.0.1:*",
        replay_endpoint: str = "tcp://127.0.0.1:*",
        buffer_batches: int = 10_000,
    ) -> "VllmPublisher":
        """Listen, by default on free ports."""
        publisher = cls(buffer_batches=buffer_batches)
        try:
            publisher.endpoint = _bind(publisher._live, endpoint)
            publisher.replay_endpoint = _bind(publisher._replay, replay_endpoint)
        except BaseException:
            await publisher.aclose()
            raise
        publisher._tasks.start(publisher._answer_replays(), name="vllm-replay")
        return publisher

    async def aclose(self) -> None:
        """Close everything, what is kept with it. Idempotent."""
        await self._tasks.aclose()
        self._context.destroy(linger=0)

    async def wait_subscribed(self) -> None:
        """Return when one more subscriber has joined: what is published from then on reaches it."""
        while not (await self._live.recv()).startswith(_SUBSCRIBED):
            continue

    async def publish(self, *events: Any, rank: int | None = 0, is_lost: bool = False) -> int:
        """Send one batch and return its number; `is_lost`: keep it for replay only."""
        return await self.publish_payload(packed([float(self._next), list(events), rank]), is_lost=is_lost)

    async def publish_payload(self, payload: bytes, *, is_lost: bool = False) -> int:
        """Send one batch as it is and return its number."""
        sequence, self._next = self._next, self._next + 1
        if not is_lost:
            await self._live.send_multipart([b"", sequence.to_bytes(8, "big"), payload])
        self._kept.append((sequence, payload))
        return sequence

    async def _answer_replays(self) -> None:
        while True:
            identity, _, start_bytes = await self._replay.recv_multipart()
            start = int.from_bytes(start_bytes, "big")
            self.replays.append(start)
            if not self.answers_replays:
                continue
            for sequence, payload in list(self._kept):
                if sequence >= start:
                    await self._replay.send_multipart([identity, b"", sequence.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([identity, b"", _END, b""])


def packed(batch: Any) -> bytes:
    """Return a batch as msgpack."""
    import msgpack  # noqa: PLC0415  # an extra

    return bytes(msgpack.packb(batch))


def stored(*block_hashes: Any, tokens: list[int], parent: Any = None, block_size: int = 16, **fields: Any) -> Any:
    """Return a BlockStored in map form."""
    event = {"type": "BlockStored", "block_hashes": list(block_hashes), "parent_block_hash": parent}
    return event | {"token_ids": tokens, "block_size": block_size, "lora_id": None, "medium": "GPU", **fields}


def removed(*block_hashes: Any, **fields: Any) -> Any:
    """Return a BlockRemoved in map form."""
    return {"type": "BlockRemoved", "block_hashes": list(block_hashes), "medium": "GPU", **fields}


def cleared() -> Any:
    """Return an AllBlocksCleared in map form."""
    return {"type": "AllBlocksCleared"}


def _bind(socket: Any, endpoint: str) -> str:
    import zmq  # noqa: PLC0415  # an extra

    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(endpoint)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
