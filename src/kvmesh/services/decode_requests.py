"""The requests that a decode worker owns, from accepted to their end, whatever door they came through.

A request's life:
    submitted -> rejected                                     (the sink hears `failed(rejected=True)`, nothing is owned)
              -> accepted -> [remote prefill] -> engine -> finished | failed | cancelled
Everything it holds (engine slot, blocks, pin, remote task, deadline timer) is given back in `_end`, in one place.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable

from kvmesh import telemetry
from kvmesh.core.errors import (
    ConflictError,
    MeshError,
    NotKnownError,
    OutOfTimeError,
    Reason,
    TryElsewhereError,
)
from kvmesh.core.ids import AttemptKey
from kvmesh.services.decode_request import to_engine_request
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.owned_request import OwnedRequest, Sink
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.remote_prefill import RemotePrefill
from kvmesh.v1 import decode_worker_pb2, generation_pb2, worker_events_pb2
from kvmesh.wire.validation import seconds

log = telemetry.logger(__name__)


class DecodeRequests:
    """Owns every running request of one decode worker. All methods are for the event loop."""

    def __init__(
        self,
        *,
        driver: EngineDriver,
        models: tuple[str, ...],
        remote_prefill: RemotePrefill | None,
        request_timeout_s: float,
    ) -> None:
        """Serve `models` with one engine; without `remote_prefill` every prefill is local."""
        self.draining = False
        self.counters: dict[str, int] = {
            "requests": 0, "remote_prefills": 0, "local_prefills": 0, "kv_bytes_moved": 0, "cached_tokens": 0,
        }  # fmt: skip
        self.load_changed: Callable[[], None] = lambda: None
        """Told whenever what `shares` answers has changed; set by the worker that publishes loads."""
        self.load_sequence: Callable[[], int] = lambda: 0
        self._driver = driver
        self._models = models
        self._remote_prefill = remote_prefill
        self._request_timeout_s = request_timeout_s
        self._running: dict[AttemptKey, OwnedRequest] = {}
        self._tasks = OwnedTasks()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._running)

    def submit(self, request: decode_worker_pb2.DecodeRequest, sink: Sink) -> AttemptKey | None:
        """Take a request in, or reject it through its sink and return None."""
        try:
            running = self._admit(request, sink)
        except MeshError as error:
            sink.failed(error, rejected=True)
            return None
        key = running.engine_request.key
        self._running[key] = running
        self._empty.clear()
        self.counters["requests"] += 1
        self.load_changed()
        sink.accepted(self.load_sequence())
        if self._remote_prefill is not None and self._remote_prefill.is_possible(request.model):
            running.task = self._tasks.start(self._prepare(running), name=f"prepare-{key.request_id}")
        else:
            self._run_locally(running, reason="no_prefill_worker")
        return key

    def cancel(self, key: AttemptKey) -> None:
        """Drop a request whose receiver is gone; its sink hears nothing more. Idempotent."""
        running = self._running.get(key)
        if running is not None:
            self._end(running)

    def finish(self, running: OwnedRequest, reason: generation_pb2.FinishReason.ValueType) -> None:
        """End a request well."""
        if self._end(running):
            running.sink.finished(generation_pb2.Finished(reason=reason, usage=running.usage))

    def fail(self, running: OwnedRequest, error: MeshError) -> None:
        """End a request badly."""
        if self._end(running):
            running.sink.failed(error, rejected=False)

    def prompt_computed(self, running: OwnedRequest) -> None:
        """Note that the prompt's last token is computed: what was pinned for it is now its own."""
        self.counters["cached_tokens"] += running.usage.cached_tokens
        self._unpin(running)
        running.sink.computed(running.usage)

    def shares(self) -> list[worker_events_pb2.RouterShare]:
        """Return the load by the router that sent it; "" = unrouted."""
        by_router: defaultdict[str, list[OwnedRequest]] = defaultdict(list)
        for running in self._running.values():
            by_router[running.router_id].append(running)
        size = self._driver.info.block_size
        return [
            worker_events_pb2.RouterShare(
                router_id=router_id,
                active_requests=len(sent),
                prefill_tokens=sum([one.prefill_tokens for one in sent]),
                decode_blocks=sum([-(-(one.prompt_tokens + one.generated) // size) for one in sent]),
            )
            for router_id, sent in by_router.items()
        ]

    def reservation_ids(self, router_id: str) -> list[int]:
        """Return the live reservations of one router."""
        return [
            running.reservation_id
            for running in self._running.values()
            if running.router_id == router_id and running.reservation_id
        ]

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new, let what runs finish, fail the rest after `timeout_s`; return (finished, cancelled)."""
        self.draining = True
        self.load_changed()
        before = len(self._running)
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="drain_s").inc()
        left = list(self._running.values())
        for running in left:
            self.fail(running, TryElsewhereError(Reason.DRAINING, "this worker is shutting down"))
        return before - len(left), len(left)

    def undrain(self) -> None:
        """Take requests again. Idempotent."""
        self.draining = False
        self.load_changed()

    async def aclose(self) -> None:
        """Fail whatever still runs."""
        await self.drain(0)
        await self._tasks.aclose()

    def _admit(self, request: decode_worker_pb2.DecodeRequest, sink: Sink) -> OwnedRequest:
        if self.draining:
            raise TryElsewhereError(Reason.DRAINING, "this worker takes no new requests")
        if request.model and request.model not in self._models:
            raise NotKnownError(
                Reason.UNKNOWN_MODEL, f"{request.model}: this worker serves {', '.join(self._models)}", field="model"
            )
        engine_request, prompt_tokens = to_engine_request(request, self._driver.info)
        if engine_request.key in self._running:
            raise ConflictError(Reason.ALREADY_EXISTS, f"{request.request_id}/{request.attempt} is running")
        running = OwnedRequest(self, request, engine_request, prompt_tokens, sink)
        timeout_s = self._request_timeout_s
        if request.HasField("timeout"):
            timeout_s = min(timeout_s, seconds(request.timeout, path="timeout"))
        loop = asyncio.get_running_loop()
        running.deadline_at = loop.time() + timeout_s
        running.deadline = loop.call_at(running.deadline_at, self._expire, running)
        return running

    def _expire(self, running: OwnedRequest) -> None:
        telemetry.WAIT_ENDED.labels(wait="request_s").inc()
        self.fail(running, OutOfTimeError(Reason.DEADLINE, "the request's time is up on the worker"))

    async def _prepare(self, running: OwnedRequest) -> None:
        """Have the prefill done remotely if that pays, then decode; any trouble on the way means a local prefill."""
        assert self._remote_prefill is not None
        try:
            prepared = await self._remote_prefill.prepare(
                running.request,
                running.engine_request,
                prompt_tokens=running.prompt_tokens,
                deadline_at=running.deadline_at,
                on_decision=lambda decision: self._decided(running, decision),
            )
        except MeshError as error:
            self.fail(running, error)
            return
        except Exception:  # ours to fix, and no reason to leave the client waiting for its deadline
            self.fail(running, MeshError(Reason.INTERNAL, "remote prefill failed unexpectedly"))
            raise
        if prepared is None:
            self._run_locally(running, reason=None)
            return
        running.use(prepared)
        self.counters["remote_prefills"] += 1
        self.counters["kv_bytes_moved"] += prepared.bytes_moved
        self._driver.submit(running.engine_request, running)

    def _decided(self, running: OwnedRequest, decision: generation_pb2.PrefillDecision) -> None:
        running.prefill_tokens = 0 if decision.remote else running.prompt_tokens
        running.sink.prefill(decision)
        self.load_changed()

    def _run_locally(self, running: OwnedRequest, *, reason: str | None) -> None:
        """`reason`: why, where nobody has said it yet."""
        running.prefill_tokens = running.prompt_tokens
        self.counters["local_prefills"] += 1
        if reason is not None:
            running.sink.prefill(generation_pb2.PrefillDecision(remote=False, reason=reason))
        self._driver.submit(running.engine_request, running)

    def _end(self, running: OwnedRequest) -> bool:
        """Give back everything a request holds; False if it had ended already."""
        if self._running.pop(running.engine_request.key, None) is None:
            return False
        if running.deadline is not None:
            running.deadline.cancel()
        if running.task is not None and running.task is not asyncio.current_task():
            running.task.cancel()
        self._driver.cancel(running.engine_request.key)
        self._unpin(running)
        if not self._running:
            self._empty.set()
        self.load_changed()
        return True

    def _unpin(self, running: OwnedRequest) -> None:
        prepared = running.prepared
        if prepared is not None and prepared.pin_id is not None:
            pin_id, prepared.pin_id = prepared.pin_id, None
            self._driver.post(lambda engine: engine.unpin(pin_id))
