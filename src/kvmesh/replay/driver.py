"""Drives a mesh with a trace, in an open loop: a request is sent when its time has come, whatever runs still.

What is slow is done before the clock starts: prompts are expanded and serialised, the channel is connected and used.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvmesh.core.errors import FixRequestError, NotKnownError, Reason, TryElsewhereError
from kvmesh.replay.outcome import Outcome
from kvmesh.replay.prompt_tokens import prompt_tokens
from kvmesh.replay.result import ReplayResult, summarise
from kvmesh.replay.trace import TraceRow
from kvmesh.services.channels import CHANNEL_OPTIONS
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2
from kvmesh.wire import error_catalog

if TYPE_CHECKING:
    from kvmesh.v1.frontend_pb2_grpc import FrontendAsyncStub

_GENERATE = f"/{frontend_pb2.DESCRIPTOR.services_by_name['Frontend'].full_name}/Generate"
_CONNECT_S = 5.0
_LEAD_S = 0.05
"""Between the end of the preparations and the first request."""


@dataclass(slots=True)
class _Request:
    """One request, ready to be sent."""

    outcome: Outcome
    offset_s: float
    """When to send it, after the replay's beginning."""
    body: bytes
    """The serialised GenerateRequest."""


async def replay(
    rows: Sequence[TraceRow],
    *,
    target: str,
    speed: float = 1.0,
    model: str = "",
    timeout_s: float = 300.0,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> ReplayResult:
    """Send every row at its time divided by `speed` and return the figures once each has ended.

    `model` may be empty where the mesh serves one; `timeout_s` is the deadline of each request; `on_end` is called as
    each of them ends. Raises: grpc.aio.AioRpcError where the mesh does not answer, MeshError where it serves no such
    model.
    """
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        name = await _resolve_model(frontend_pb2_grpc.FrontendStub(channel), model)
        requests = await asyncio.to_thread(_prepare, rows, model=name, speed=speed)
        call = channel.unary_stream(
            _GENERATE,
            request_serializer=_take_body,
            response_deserializer=frontend_pb2.GenerateResponse.FromString,
        )
        # Not the loop's clock: it stands still within a turn, and uvloop's counts milliseconds.
        began_at = time.perf_counter() + _LEAD_S
        async with asyncio.TaskGroup() as running:
            for request in requests:
                request.outcome.scheduled_at = began_at + request.offset_s
                if (wait_s := request.outcome.scheduled_at - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                running.create_task(_run(request, call, timeout_s, on_end))
        return summarise([request.outcome for request in requests], duration_s=time.perf_counter() - began_at)


async def _resolve_model(frontend: "FrontendAsyncStub", name: str) -> str:
    """Return the model to ask for; the call also connects the channel."""
    answer = await frontend.ListModels(frontend_pb2.ListModelsRequest(), timeout=_CONNECT_S)
    known = [model.name for model in answer.models]
    if not known:
        raise TryElsewhereError(Reason.NO_WORKERS, "no worker serves any model yet")
    if name and name not in known:
        raise NotKnownError(Reason.UNKNOWN_MODEL, f"{name!r} is not served; models: {', '.join(known)}", field="model")
    if not name and len(known) > 1:
        raise FixRequestError(
            Reason.INVALID_FIELD, f"name one of the models that are served: {', '.join(known)}", field="model"
        )
    return name or known[0]


def _prepare(rows: Sequence[TraceRow], *, model: str, speed: float) -> list[_Request]:
    return [
        _Request(
            outcome=Outcome(max_tokens=row.output_length),
            offset_s=(row.timestamp_ms - rows[0].timestamp_ms) / 1000.0 / speed,
            body=generate_request(row, model=model).SerializeToString(),
        )
        for row in rows
    ]


def generate_request(row: TraceRow, *, model: str) -> frontend_pb2.GenerateRequest:
    """Return what a row asks the mesh."""
    token_ids = generation_pb2.TokenIds(token_ids=prompt_tokens(row.hash_ids, row.input_length))
    return frontend_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(token_ids=token_ids),
        model=model,
        sampling=generation_pb2.SamplingParams(max_tokens=row.output_length, ignore_eos=True),
    )


def _take_body(request: _Request) -> bytes:
    """Give the bytes away: gRPC asks for them when it sends, and that is the moment that counts."""
    request.outcome.sent_at = time.perf_counter()
    body, request.body = request.body, b""
    return body


async def _run(
    request: _Request,
    call: "grpc.aio.UnaryStreamMultiCallable[_Request, frontend_pb2.GenerateResponse]",
    timeout_s: float,
    on_end: Callable[[Outcome], None],
) -> None:
    outcome = request.outcome
    stream = call(request, timeout=timeout_s)
    try:
        async for response in stream:
            outcome.receive(response, now=time.perf_counter())
        outcome.end()
    except grpc.aio.AioRpcError as error:
        _fail(outcome, error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        _fail(outcome, await _error_of(stream))  # gRPC raises this too where a server answers CANCELLED
    on_end(outcome)


async def _error_of(
    stream: "grpc.aio.UnaryStreamCall[_Request, frontend_pb2.GenerateResponse]",
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await stream.code(), await stream.initial_metadata(), await stream.trailing_metadata(), await stream.details()
    )


def _fail(outcome: Outcome, error: grpc.aio.AioRpcError) -> None:
    """A mesh that is gone can type nothing: gRPC's UNAVAILABLE tells its client as much as an error of the mesh."""
    reason = _typed_reason(error)
    if reason is None and error.code() is grpc.StatusCode.UNAVAILABLE:
        reason = error.code().name
    if reason is not None:
        outcome.error = reason
    else:
        outcome.lost = error.code().name


def _typed_reason(error: grpc.aio.AioRpcError) -> str | None:
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # foreign details that contradict their call, or are none
        return None
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info) and info.domain == error_catalog.DOMAIN:
            return str(info.reason)
    return None
