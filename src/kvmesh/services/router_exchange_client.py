"""The asking end of Router.Exchange: what is asked while a write is under way travels in the next message.

Laws:
    - one reader and one writer per exchange; gRPC forbids concurrent writes on a stream;
    - a question ends with its answer, with its refusal, or with WORKER_LOST when the exchange breaks: then it may have
      been done or not, and the next exchange knows nothing of it;
    - a booking that nobody waits for any more when it arrives is released.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.v1 import router_pb2
from kvmesh.wire.error_catalog import from_status

_MAX_QUESTIONS = 64
"""In one message: a question about a prompt of 128k tokens takes up to 80 KiB."""


@dataclass(frozen=True, slots=True)
class _Asked:
    question: router_pb2.RouterQuestion
    answer: "asyncio.Future[router_pb2.RouterAnswer]"


class RouterExchangeClient:
    """One open exchange."""

    def __init__(
        self,
        call: Any,  # grpc.aio.StreamStreamCall: its class is generic in the stubs only
        *,
        write_timeout_s: float,
        on_end: Callable[["RouterExchangeClient"], None],
    ) -> None:
        """Speak on `call`, each write bounded; `on_end` is told once, when the exchange is of no more use."""
        self._call = call
        self._write_timeout_s = write_timeout_s
        self._on_end = on_end
        self._asked: dict[int, _Asked] = {}
        self._last_id = 0
        self._questions: list[router_pb2.RouterQuestion] = []
        self._withdrawn: list[int] = []
        self._ready = asyncio.Event()
        self._is_over = False
        self._tasks = OwnedTasks()
        self._tasks.start(self._read(), name="router-exchange-read")
        self._tasks.start(self._write(), name="router-exchange-write")

    def ask(self, question: router_pb2.RouterQuestion) -> "asyncio.Future[router_pb2.RouterAnswer]":
        """Send a question and return its answer to come; cancelling that withdraws the question.

        The future raises what the question's call would, and TryElsewhereError(WORKER_LOST) when the exchange breaks.
        """
        answer: asyncio.Future[router_pb2.RouterAnswer] = asyncio.get_running_loop().create_future()
        if self._is_over:
            answer.set_exception(_lost("it has ended"))
            return answer
        self._last_id += 1
        question.question_id = self._last_id
        self._asked[self._last_id] = _Asked(question, answer)
        answer.add_done_callback(lambda done: self._given_up(question.question_id) if done.cancelled() else None)
        self.tell(question)
        return answer

    def tell(self, question: router_pb2.RouterQuestion) -> None:
        """Send a question without waiting for its answer; nothing happens once the exchange has ended."""
        self._questions.append(question)
        self._ready.set()

    async def aclose(self) -> None:
        """End the exchange; what has not been sent is not sent any more."""
        self._end("the processor is closing")
        await self._tasks.aclose()

    def _given_up(self, question_id: int) -> None:
        if question_id in self._asked and not self._is_over:
            self._withdrawn.append(question_id)
            self._ready.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._ready.wait()
                self._ready.clear()
                while self._questions or self._withdrawn:
                    questions, self._questions = self._questions[:_MAX_QUESTIONS], self._questions[_MAX_QUESTIONS:]
                    withdrawn, self._withdrawn = self._withdrawn, []
                    async with asyncio.timeout(self._write_timeout_s):
                        await self._call.write(
                            router_pb2.RouterExchangeRequest(questions=questions, withdrawn=withdrawn)
                        )
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="exchange_write_s").inc()
            self._end("the router does not read")
        except (grpc.RpcError, asyncio.InvalidStateError) as exc:
            self._end(f"the exchange broke: {exc!r}")

    async def _read(self) -> None:
        why = "the router ended the exchange"
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                for answer in response.answers:
                    self._take(answer)
        except grpc.aio.AioRpcError as exc:
            why = f"the exchange broke: {exc.code().name}: {exc.details()}"
        finally:
            self._end(why)

    def _take(self, answer: router_pb2.RouterAnswer) -> None:
        asked = self._asked.pop(answer.question_id, None)
        if asked is None:
            return
        if asked.answer.cancelled():
            if answer.HasField("reserve"):
                booked = asked.question.reserve
                key = router_pb2.ReservationKey(request_id=booked.request_id, attempt=booked.attempt)
                self.tell(router_pb2.RouterQuestion(release=router_pb2.RouterReleaseRequest(key=key)))
        elif answer.HasField("failed"):
            asked.answer.set_exception(from_status(answer.failed))
        else:
            asked.answer.set_result(answer)

    def _end(self, why: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._on_end(self)
        self._call.cancel()
        self._tasks.cancel()
        asked, self._asked = self._asked, {}
        for one in asked.values():
            if not one.answer.done():
                one.answer.set_exception(_lost(why))


def _lost(why: str) -> TryElsewhereError:
    return TryElsewhereError(Reason.WORKER_LOST, f"the exchange with the router: {why}")
