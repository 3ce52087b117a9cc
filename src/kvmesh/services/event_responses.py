"""A running request's events as the messages of a stream: the same for every gRPC door."""

from typing import TypeVar

from kvmesh.v1 import frontend_pb2, generation_pb2, processor_pb2
from kvmesh.wire.generation import Delta, Event

_Response = TypeVar("_Response", frontend_pb2.GenerateResponse, processor_pb2.ProcessorGenerateResponse)


def response_of(event: Event, response_type: type[_Response]) -> _Response:
    """Return the message of one event; a delta becomes one chunk, whatever number of tokens it has."""
    if isinstance(event, Delta):
        return response_type(chunk=_chunk_of(event))
    if isinstance(event, frontend_pb2.Started):
        return response_type(started=event)
    return response_type(finished=event)


def processor_response_of(event: Event) -> processor_pb2.ProcessorGenerateResponse:
    """Return the message of one event for a frontend, which needs to know where each token's text ends."""
    response = response_of(event, processor_pb2.ProcessorGenerateResponse)
    if isinstance(event, Delta) and len(event.pieces) > 1:
        response.pieces.extend(event.pieces)
    return response


def _chunk_of(delta: Delta) -> generation_pb2.Chunk:
    return generation_pb2.Chunk(text="".join(delta.pieces), token_ids=delta.token_ids, logprobs=delta.logprobs)
