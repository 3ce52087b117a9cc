"""The client's end of a stream that goes both ways and stays open: one reader, one writer, one end.

Laws:
    - gRPC forbids concurrent writes on a stream: one task writes all there is to send, in order, each batch bounded;
    - whatever ends it, the peer, the wire, a peer that does not read or this side: `on_end` is told why, once.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from kvmesh import telemetry
from kvmesh.services.owned_tasks import OwnedTasks


class DuplexCall:
    """One open call. What is sent and what becomes of what arrives is its owner's."""

    def __init__(
        self,
        call: Any,  # grpc.aio.StreamStreamCall: its class is generic in the stubs only
        *,
        peer: str,
        write_timeout_s: float,
        to_send: Callable[[], Sequence[Any]],
        receive: Callable[[Any], None],
        on_end: Callable[[str], None],
    ) -> None:
        """Speak on `call`.

        Args:
            call: The stream, just opened.
            peer: Who is at the other end, as the reasons of an end name it: "worker".
            write_timeout_s: How long the messages of one `to_send` may take to be written, in seconds.
            to_send: Takes the messages that are to go now; asked after `wake`, until there are none.
            receive: Takes each message that arrives.
            on_end: Told once, with the reason, when the call is of no more use.
        """
        self._call = call
        self._peer = peer
        self._write_timeout_s = write_timeout_s
        self._to_send = to_send
        self._receive = receive
        self._on_end = on_end
        self._ready = asyncio.Event()
        self.is_over = False
        self._tasks = OwnedTasks()
        self._tasks.start(self._read(), name="duplex-read")
        self._tasks.start(self._write(), name="duplex-write")

    def wake(self) -> None:
        """Say that there is something to send."""
        self._ready.set()

    def end(self, why: str) -> None:
        """End the call now; nothing more is sent. Idempotent."""
        if self.is_over:
            return
        self.is_over = True
        self._call.cancel()
        self._tasks.cancel()
        self._on_end(why)

    async def aclose(self, why: str) -> None:
        """End the call and wait for its tasks."""
        self.end(why)
        await self._tasks.aclose()

    async def _write(self) -> None:
        try:
            while True:
                await self._ready.wait()
                self._ready.clear()
                while messages := self._to_send():
                    async with asyncio.timeout(self._write_timeout_s):
                        for message in messages:
                            await self._call.write(message)
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="exchange_write_s").inc()
            self.end(f"the {self._peer} does not read")
        except (grpc.RpcError, asyncio.InvalidStateError) as exc:
            self.end(f"the exchange broke: {exc!r}")

    async def _read(self) -> None:
        why = f"the {self._peer} ended the exchange"
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._receive(message)
        except grpc.aio.AioRpcError as exc:
            why = f"the exchange broke: {exc.code().name}: {exc.details()}"
        finally:
            self.end(why)
