"""What `make chaos` says of an answer: it must be able to find fault."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest

from kvmesh.core.errors import FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.runtime.server import GrpcServer
from kvmesh.testing.chaos import ChaosResult, Question, ask
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2

QUESTION = Question(tokens=(5, 6, 7), max_tokens=3)
EXPECTED = [11, 12, 13]
FINISHED = frontend_pb2.GenerateResponse(
    finished=generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_LENGTH, usage=generation_pb2.Usage())
)


class Scripted(frontend_pb2_grpc.FrontendServicer):
    """Answers as it is told."""

    def __init__(self, tokens: Sequence[int], error: MeshError | None, *, finishes: bool) -> None:
        self._tokens = tokens
        self._error = error
        self._finishes = finishes

    async def Generate(
        self,
        request: frontend_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[frontend_pb2.GenerateResponse]:
        for token in self._tokens:
            yield frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(token_ids=[token]))
        if self._error is not None:
            raise self._error
        if self._finishes:
            yield FINISHED


@asynccontextmanager
async def serving(servicer: Scripted) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer()
    server.add(
        servicer,
        frontend_pb2.DESCRIPTOR.services_by_name["Frontend"],
        frontend_pb2_grpc.add_FrontendServicer_to_server,
    )
    port = await server.start("127.0.0.1", 0, flag="--port")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.drain_and_stop(1.0)


def lost() -> MeshError:
    return TryElsewhereError(Reason.WORKER_LOST, "the worker is gone")


def refused() -> MeshError:
    return FixRequestError(Reason.INVALID_FIELD, "no disturbance explains that", field="prompt")


def late() -> MeshError:
    return MeshError(Reason.DEADLINE, "too late")


@pytest.mark.parametrize(
    ("tokens", "error", "finishes", "outcome", "faults"),
    [
        pytest.param(EXPECTED, None, True, "finished_local", (0, 0, 0), id="the expected answer"),
        pytest.param([11, 12, 99], None, True, "finished_local", (1, 0, 0), id="one wrong token"),
        pytest.param([11, 12], None, True, "finished_local", (1, 0, 0), id="too few tokens"),
        pytest.param([11, 12], lost, False, "failed_worker_lost", (0, 0, 0), id="the beginning, and a typed error"),
        pytest.param([11, 99], lost, False, "failed_worker_lost", (1, 0, 0), id="a wrong beginning"),
        pytest.param([], refused, False, "failed_invalid_field", (0, 0, 1), id="a reason of another kind"),
        pytest.param([11], late, False, "hung", (0, 1, 0), id="a deadline"),
        pytest.param(EXPECTED, None, False, "unfinished", (0, 0, 1), id="an end without a word"),
    ],
)
async def test_each_fault_is_found(
    tokens: list[int],
    error: Callable[[], MeshError] | None,
    finishes: bool,
    outcome: str,
    faults: tuple[int, int, int],
) -> None:
    result = ChaosResult()

    scripted = Scripted(tokens, error and error(), finishes=finishes)  # type: ignore[abstract]  # of one method
    async with serving(scripted) as channel:
        await ask(channel, QUESTION, EXPECTED, result)

    assert result.outcomes == {outcome: 1}
    assert (result.wrong, result.hung, result.unexpected) == faults
    assert result.is_good == (faults == (0, 0, 0))
