"""The pins a worker holds for others, and the KvTransfer service that gives them back."""

import asyncio
import contextvars
from collections.abc import Callable

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, NotKnownError, Reason, TryElsewhereError
from kvmesh.engines.engine import Pin
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.identity import WorkerIdentity
from kvmesh.v1 import kv_transfer_pb2, kv_transfer_pb2_grpc

log = telemetry.logger(__name__)

_REMEMBERED_S = 300.0
"""How long an ended pin is told apart from one that never was."""


class LentPins:
    """Pins of handed-over blocks: each ends once, by `release` or when its time is up."""

    def __init__(self, driver: EngineDriver, *, pin_ttl_s: float) -> None:
        """Hold pins of one engine for `pin_ttl_s` each."""
        self.pin_ttl_s = pin_ttl_s
        self._driver = driver
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._ended: dict[int, asyncio.TimerHandle] = {}

        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._timers)

    async def wait_none(self, timeout_s: float) -> bool:
        """Wait until nothing is lent; False if something still was after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._none.wait()
        except TimeoutError:
            return False
        return True

    def lend(self, pin: Pin) -> None:
        """Hold a pin for others; it is ours to give back from now on."""
        self._none.clear()
        self._timers[pin.pin_id] = _later(self.pin_ttl_s, self._expire, pin.pin_id)

    def release(self, pin_id: int) -> None:
        """End a pin. Raises: TryElsewhereError(PIN_EXPIRED) if it has ended, NotKnownError if it never was."""
        timer = self._timers.pop(pin_id, None)
        if timer is None:
            if pin_id in self._ended:
                raise TryElsewhereError(Reason.PIN_EXPIRED, f"pin {pin_id} has ended")
            raise NotKnownError(Reason.NOT_FOUND, f"pin {pin_id} was never lent", field="pin_id")
        timer.cancel()
        self._end(pin_id)

    def take_back(self, pin_id: int) -> None:
        """End a pin that nobody was told of; nothing happens if its time was up."""
        timer = self._timers.pop(pin_id, None)
        if timer is not None:
            timer.cancel()
            self._end(pin_id)

    def close(self) -> None:
        """Forget everything; the engine is closed by its own owner."""
        for timer in (*self._timers.values(), *self._ended.values()):
            timer.cancel()
        self._timers.clear()
        self._ended.clear()
        self._none.set()

    def _expire(self, pin_id: int) -> None:
        del self._timers[pin_id]
        telemetry.WAIT_ENDED.labels(wait="pin_s").inc()
        log.warning("pin.expired", pin_id=pin_id)
        self._end(pin_id)

    def _end(self, pin_id: int) -> None:
        if not self._timers:
            self._none.set()
        self._driver.post(lambda engine: engine.unpin(pin_id))
        self._ended[pin_id] = _later(_REMEMBERED_S, self._forget, pin_id)

    def _forget(self, pin_id: int) -> None:
        del self._ended[pin_id]


def _later(delay_s: float, what: Callable[[int], None], pin_id: int) -> asyncio.TimerHandle:
    """Set a timer whose log lines do not belong to the call that happened to set it."""
    return asyncio.get_running_loop().call_later(delay_s, what, pin_id, context=contextvars.Context())


class KvTransfer(kv_transfer_pb2_grpc.KvTransferServicer):
    """Serves one worker's pins."""

    def __init__(self, identity: WorkerIdentity, pins: LentPins) -> None:
        """Serve `pins` under `identity`."""
        self._identity = identity
        self._pins = pins

    async def Release(
        self,
        request: kv_transfer_pb2.KvTransferReleaseRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> kv_transfer_pb2.KvTransferReleaseResponse:
        """See the contract."""
        if request.worker_id != self._identity.worker_id:
            raise NotKnownError(Reason.NOT_FOUND, f"{request.worker_id} is not served here", field="worker_id")
        if request.epoch != self._identity.epoch:
            raise ConflictError(Reason.STALE_EPOCH, f"epoch {request.epoch} of {request.worker_id} is not live here")
        self._pins.release(request.pin_id)
        return kv_transfer_pb2.KvTransferReleaseResponse()
