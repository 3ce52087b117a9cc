"""The asking end of Router.Exchange: what is asked while a write is under way travels in the next message.

Laws:
    - a question ends with its answer, with its refusal, or with WORKER_LOST when the exchange breaks: then it may have
      been done or not, and the next exchange knows nothing of it;
    - a booking that nobody waits for any more when it arrives is released.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.rpc import status_pb2

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.services.duplex_call import DuplexCall
from kvmesh.v1 import router_pb2
from kvmesh.wire.error_catalog import from_status

_MAX_QUESTIONS = 64
"""In one message."""
_ENOUGH_BYTES = 4 << 20
"""Of questions in one message, before the last: a long prompt takes a megabyte with its text, servers take 64 MiB."""


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
        self._on_end = on_end
        self._asked: dict[int, _Asked] = {}
        self._last_id = 0
        self._last_sent = 0
        """The highest id that has gone out: they go in order."""
        self._questions: deque[router_pb2.RouterQuestion] = deque()
        self._withdrawn: list[int] = []
        self._stream = DuplexCall(
            call,
            peer="router",
            write_timeout_s=write_timeout_s,
            to_send=self._to_send,
            receive=self._take_all,
            on_end=self._ended,
        )

    def ask(self, question: router_pb2.RouterQuestion) -> "asyncio.Future[router_pb2.RouterAnswer]":
        """Send a question and return its answer to come; cancelling that withdraws the question.

        The future raises what the question's call would, and TryElsewhereError(WORKER_LOST) when the exchange breaks.
        """
        answer: asyncio.Future[router_pb2.RouterAnswer] = asyncio.get_running_loop().create_future()
        if self._stream.is_over:
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
        self._stream.wake()

    async def aclose(self) -> None:
        """End the exchange; what has not been sent is not sent any more."""
        await self._stream.aclose("the processor is closing")

    def _given_up(self, question_id: int) -> None:
        if question_id > self._last_sent:
            self._asked.pop(question_id, None)  # and never sent
        elif question_id in self._asked and not self._stream.is_over:
            self._withdrawn.append(question_id)
            self._stream.wake()

    def _to_send(self) -> list[router_pb2.RouterExchangeRequest]:
        withdrawn, self._withdrawn = self._withdrawn, []
        questions: list[router_pb2.RouterQuestion] = []
        size = 0
        while self._questions and len(questions) < _MAX_QUESTIONS and size < _ENOUGH_BYTES:
            question = self._questions.popleft()
            if question.question_id:
                self._last_sent = question.question_id
            if not question.question_id or question.question_id in self._asked:
                questions.append(question)
                size += question.ByteSize()
        if not questions and not withdrawn:
            return []
        return [router_pb2.RouterExchangeRequest(questions=questions, withdrawn=withdrawn)]

    def _take_all(self, response: router_pb2.RouterExchangeResponse) -> None:
        for answer in response.answers:
            self._take(answer)

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
            refusal = status_pb2.Status.FromString(answer.failed.SerializeToString())
            asked.answer.set_exception(from_status(refusal))
        else:
            asked.answer.set_result(answer)

    def _ended(self, why: str) -> None:
        self._on_end(self)
        asked, self._asked = self._asked, {}
        for one in asked.values():
            if not one.answer.done():
                one.answer.set_exception(_lost(why))


def _lost(why: str) -> TryElsewhereError:
    return TryElsewhereError(Reason.WORKER_LOST, f"the exchange with the router: {why}")
