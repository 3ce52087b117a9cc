"""The two doors of a decode worker: Generate for people and other languages, Exchange for processors."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason
from kvmesh.services.decode_requests import DecodeRequests
from kvmesh.services.exchange import Exchange
from kvmesh.v1 import decode_worker_pb2, decode_worker_pb2_grpc, generation_pb2
from kvmesh.wire.validation import invalid, seconds

_Response = decode_worker_pb2.DecodeWorkerGenerateResponse
_LONGEST_MERGE_S = 1.0


class _CallSink:
    """Collects the events of one Generate call; output that the reader has not taken yet merges into one chunk."""

    def __init__(self) -> None:
        self.events: deque[_Response | MeshError] = deque()
        self.ready = asyncio.Event()
        self.is_over = False
        """The worker owns the request no more: its key may be another request's by now."""
        self._logprobs: list[generation_pb2.TokenLogprobs] = []
        """Of the output that comes next."""

    def accepted(self, load_sequence: int) -> None:
        self._put(_Response(accepted=decode_worker_pb2.Accepted(load_sequence=load_sequence)))

    def prefill(self, decision: generation_pb2.PrefillDecision) -> None:
        self._put(_Response(prefill=decision))

    def computed(self, usage: generation_pb2.Usage) -> None:
        pass  # its usage comes with `finished`

    def likely(self, logprobs: list[generation_pb2.TokenLogprobs]) -> None:
        self._logprobs = logprobs

    def produced(self, token_ids: tuple[int, ...], words: tuple[str, ...]) -> None:
        logprobs, self._logprobs = self._logprobs, []
        last = self.events[-1] if self.events else None
        if isinstance(last, _Response) and last.HasField("chunk"):
            last.chunk.token_ids.extend(token_ids)
            last.chunk.logprobs.extend(logprobs)
            last.chunk.text += "".join(words)
        else:
            chunk = generation_pb2.Chunk(token_ids=token_ids, text="".join(words), logprobs=logprobs)
            self._put(_Response(chunk=chunk))

    def finished(self, finished: generation_pb2.Finished) -> None:
        self.is_over = True
        self._put(_Response(finished=finished))

    def failed(self, error: MeshError, *, rejected: bool) -> None:
        self.is_over = True
        self._put(error)

    def _put(self, event: _Response | MeshError) -> None:
        self.events.append(event)
        self.ready.set()


class DecodeWorker(decode_worker_pb2_grpc.DecodeWorkerServicer):
    """Serves the requests of one decode worker."""

    def __init__(self, requests: DecodeRequests, *, write_timeout_s: float) -> None:
        """Open both doors to `requests`."""
        self._requests = requests
        self._write_timeout_s = write_timeout_s
        self._exchanges: dict[str, Exchange] = {}

    def close(self) -> None:
        """End every exchange once what it has to say is said, so that the server can stop."""
        for exchange in self._exchanges.values():
            exchange.finish()

    async def Generate(
        self,
        request: decode_worker_pb2.DecodeWorkerGenerateRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[_Response]:
        """See the contract."""
        sink = _CallSink()
        key = self._requests.submit(request.request, sink)
        try:
            while True:
                await sink.ready.wait()
                sink.ready.clear()
                while sink.events:
                    event = sink.events.popleft()
                    if isinstance(event, MeshError):
                        raise event
                    yield event
                    if event.HasField("finished"):
                        return
        finally:
            if key is not None and not sink.is_over:
                self._requests.cancel(key)

    async def Exchange(  # type: ignore[override]  # the stub's base is synchronous
        self,
        request_iterator: AsyncIterator[decode_worker_pb2.ExchangeRequest],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        """See the contract."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                first = await anext(aiter(request_iterator), None)
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="exchange_write_s").inc()
            raise OutOfTimeError(Reason.DEADLINE, "an exchange was opened and said nothing") from exc
        if first is None or first.WhichOneof("command") != "open" or not first.open.processor_id:
            raise invalid("command", "the first command of an exchange is open, with a processor_id")
        processor_id = first.open.processor_id
        older = self._exchanges.get(processor_id)
        if older is not None:
            older.supersede()
        merge_within_s = seconds(first.open.merge_within, path="open.merge_within", high=_LONGEST_MERGE_S)
        exchange = Exchange(self._requests, write_timeout_s=self._write_timeout_s, merge_within_s=merge_within_s)
        self._exchanges[processor_id] = exchange
        try:
            await exchange.run(request_iterator, context)
        finally:
            if self._exchanges.get(processor_id) is exchange:
                del self._exchanges[processor_id]
