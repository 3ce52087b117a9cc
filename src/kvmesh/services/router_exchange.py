"""The router's end of Router.Exchange: many questions on one stream, answered in lists.

Laws:
    - a question with an id is answered once: by what its call would have returned, or by the status it would have;
    - at most one message is unsent: what is answered while a write is under way travels in the next;
    - when the stream ends, what waits for a worker or for room is given up.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import structlog

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, RequestCancelledError, TryElsewhereError
from kvmesh.v1 import router_pb2
from kvmesh.wire.error_catalog import foreseen_error, to_status
from kvmesh.wire.validation import invalid, seconds

log = telemetry.logger(__name__)

_MAX_QUESTIONS = 1024
"""In one message."""
_QUESTIONS_PER_TURN = 16
"""Taken before the loop serves others."""
_MAX_UNSENT = 256
"""Answers that may wait for a client that does not read; until they are written, no more questions are taken."""
_MAX_BYTES = 1 << 20
"""Of answers in one message: clients take 4 MiB unless told otherwise."""
_SHORTEST_TIMEOUT_S = 0.001

AnswerAtOnce = Callable[[router_pb2.RouterQuestion, router_pb2.RouterAnswer], None]
"""Writes what a question that never waits is answered. Raises: what its call raises."""
WaitToReserve = Callable[[], Coroutine[Any, Any, router_pb2.ReserveResponse]]
"""Waits for a booking. Raises: what its call raises."""
BeginReserve = Callable[[router_pb2.ReserveRequest, float | None], router_pb2.ReserveResponse | WaitToReserve]
"""Books, or returns the wait for it, of at most so many seconds. Raises: what its call raises."""


class RouterExchange:
    """One open exchange."""

    def __init__(self, answer_at_once: AnswerAtOnce, begin_reserve: BeginReserve, *, write_timeout_s: float) -> None:
        """Ask `begin_reserve` for bookings, which may have to wait, and `answer_at_once` for all else; see `run`."""
        self._answer_at_once = answer_at_once
        self._begin_reserve = begin_reserve
        self._write_timeout_s = write_timeout_s
        self._answers: deque[router_pb2.RouterAnswer] = deque()
        self._waiting: dict[int, asyncio.Task[None]] = {}
        """Those that have an id, by it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_last = False
        """Nothing will be asked any more, and nothing waits."""
        self._ready = asyncio.Event()
        self._written = asyncio.Event()

    async def run(
        self,
        requests: AsyncIterator[router_pb2.RouterExchangeRequest],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
        *,
        closing: asyncio.Event,
    ) -> None:
        """Serve until the client half-closes and has every answer, goes away, stalls, or the router closes."""
        async with asyncio.TaskGroup() as group:
            closed = group.create_task(_until(closing))
            group.create_task(self._read(requests, group))
            await self._write(context)
            closed.cancel()

    async def _read(self, requests: AsyncIterator[router_pb2.RouterExchangeRequest], group: asyncio.TaskGroup) -> None:
        async for request in requests:
            if len(request.questions) > _MAX_QUESTIONS:
                raise invalid("questions", f"{len(request.questions)} in one message: at most {_MAX_QUESTIONS}")
            for index, question in enumerate(request.questions):
                if index % _QUESTIONS_PER_TURN == _QUESTIONS_PER_TURN - 1:
                    await asyncio.sleep(0)
                while len(self._answers) >= _MAX_UNSENT:
                    self._written.clear()
                    await self._written.wait()
                self._take(question, f"questions[{index}]", group)
            for question_id in request.withdrawn:
                if (task := self._waiting.get(question_id)) is not None:
                    task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._is_last = True
        self._ready.set()

    def _take(self, question: router_pb2.RouterQuestion, path: str, group: asyncio.TaskGroup) -> None:
        question_id = question.question_id
        if question_id in self._waiting:
            raise invalid(f"{path}.question_id", f"{question_id} is in use on this exchange")
        answer = router_pb2.RouterAnswer(question_id=question_id)
        try:
            timeout_s = None
            if question.HasField("timeout"):
                timeout_s = seconds(question.timeout, path=f"{path}.timeout", low=_SHORTEST_TIMEOUT_S)
            match question.WhichOneof("question"):
                case None:
                    raise invalid(f"{path}.question", "required: select, reserve, report_progress or release")
                case "reserve":
                    begun = self._begin_reserve(question.reserve, timeout_s)
                    if not isinstance(begun, router_pb2.ReserveResponse):
                        self._start(group, begun, question.reserve.request_id, timeout_s, answer)
                        return
                    answer.reserve.CopyFrom(begun)
                case _:
                    self._answer_at_once(question, answer)
        except Exception as exc:  # fails alone, as its call would
            _refuse(answer, _mesh_error(exc))
        self._put(answer)

    def _start(
        self,
        group: asyncio.TaskGroup,
        wait: WaitToReserve,
        request_id: str,
        timeout_s: float | None,
        answer: router_pb2.RouterAnswer,
    ) -> None:
        task = group.create_task(_wait(wait, request_id, timeout_s, answer))
        self._tasks.add(task)
        if answer.question_id:
            self._waiting[answer.question_id] = task
        task.add_done_callback(lambda done: self._waited(done, answer))

    def _waited(self, task: asyncio.Task[None], answer: router_pb2.RouterAnswer) -> None:
        self._tasks.discard(task)
        self._waiting.pop(answer.question_id, None)
        if task.cancelled():
            _refuse(answer, RequestCancelledError(Reason.CANCELLED, "the question was withdrawn"))
        self._put(answer)

    def _put(self, answer: router_pb2.RouterAnswer) -> None:
        if answer.question_id:
            self._answers.append(answer)
            self._ready.set()

    async def _write(self, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        while not (self._is_last and not self._answers):
            await self._ready.wait()
            self._ready.clear()
            while self._answers:
                response = self._next_response()
                self._written.set()
                try:
                    async with asyncio.timeout(self._write_timeout_s):
                        await context.write(response)
                except TimeoutError as exc:
                    telemetry.WAIT_ENDED.labels(wait="exchange_write_s").inc()
                    raise OutOfTimeError(
                        Reason.DEADLINE, f"no answer was taken for {self._write_timeout_s:g} s"
                    ) from exc

    def _next_response(self) -> router_pb2.RouterExchangeResponse:
        """Take what fits into one message, one answer at least."""
        answers = self._answers
        taken = [answers.popleft()]
        size = taken[0].ByteSize()
        while answers and (size := size + answers[0].ByteSize()) <= _MAX_BYTES:
            taken.append(answers.popleft())
        return router_pb2.RouterExchangeResponse(answers=taken)


async def _wait(
    wait: WaitToReserve,
    request_id: str,
    timeout_s: float | None,
    answer: router_pb2.RouterAnswer,
) -> None:
    structlog.contextvars.bind_contextvars(request_id=request_id)
    try:
        async with asyncio.timeout(timeout_s):
            answer.reserve.CopyFrom(await wait())
    except TimeoutError:
        _refuse(answer, OutOfTimeError(Reason.DEADLINE, "the question's timeout is over"))
    except Exception as exc:  # fails alone, as its call would
        _refuse(answer, _mesh_error(exc))


def _refuse(answer: router_pb2.RouterAnswer, error: MeshError) -> None:
    if answer.question_id:
        answer.failed.MergeFromString(to_status(error).SerializeToString())


async def _until(closing: asyncio.Event) -> None:
    await closing.wait()
    raise TryElsewhereError(Reason.DRAINING, "this router is shutting down")


def _mesh_error(exc: Exception) -> MeshError:
    error = foreseen_error(exc)
    if error is None:
        log.error("router.question_failed", exc_info=exc)
        return MeshError(Reason.INTERNAL, "")
    return error
