"""The OpenAI API over the mesh's Generator: chat completions, completions and models."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from kvmesh.core.errors import NotKnownError, Reason
from kvmesh.gateway import sse
from kvmesh.gateway.body_writer import BODY_WRITER_KEY
from kvmesh.gateway.json_messages import load_json
from kvmesh.gateway.openai_choices import Choices, cut_short, merged
from kvmesh.gateway.openai_chunks import CHAT, COMPLETION, Reply, ReplyForm, model_json
from kvmesh.gateway.openai_schema import ChatRequest, CompletionRequest, OpenAIRequest, parse_body
from kvmesh.gateway.request_frame import client_request_id_of, request_id_of
from kvmesh.gateway.request_io import (
    StreamedReply,
    deadline,
    read_body,
    send_json,
    stream,
    timeout_of,
    until_disconnect,
)
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.field_names import fields_named
from kvmesh.wire.generation import Delta, Event, Generator

_LARGE_BODY_BYTES = 512 * 1024
"""From here on (milliseconds of parsing) a body is parsed off the loop."""


def openai_routes(generator: Generator, *, max_body_bytes: int, client_write_s: float) -> list[BaseRoute]:
    """Return the routes of the OpenAI API."""
    chat = Completions(generator, CHAT, ChatRequest, max_body_bytes=max_body_bytes, client_write_s=client_write_s)
    completions = Completions(
        generator, COMPLETION, CompletionRequest, max_body_bytes=max_body_bytes, client_write_s=client_write_s
    )
    models = Models(generator)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", models, methods=["GET"]),
    ]


class Models:
    """What the mesh serves, all of it or one by its name."""

    def __init__(self, generator: Generator) -> None:
        """`generator` is asked at every request."""
        self._generator = generator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises: NotKnownError(UNKNOWN_MODEL)."""
        models = [model_json(model) for model in self._generator.models().models]
        name = scope["path_params"].get("model")
        if name is None:
            await send_json(send, {"object": "list", "data": models})
            return
        found = next((model for model in models if model["id"] == name), None)
        if found is None:
            raise NotKnownError(Reason.UNKNOWN_MODEL, "", field="model")
        await send_json(send, found)


class Completions:
    """One of the two kinds of completion."""

    def __init__(
        self,
        generator: Generator,
        form: ReplyForm,
        kind: type[OpenAIRequest],
        *,
        max_body_bytes: int,
        client_write_s: float,
    ) -> None:
        """`kind` is what the body must be."""
        self._generator = generator
        self._form = form
        self._kind = kind
        self._max_body_bytes = max_body_bytes
        self._client_write_s = client_write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises: MeshError until the reply has begun."""
        timeout_s = timeout_of(scope)
        body = await read_body(scope, receive, max_bytes=self._max_body_bytes)
        client_request_id = client_request_id_of(scope)
        if len(body) < _LARGE_BODY_BYTES:
            asked, requests = self._parse(body, client_request_id)
        else:
            asked, requests = await asyncio.to_thread(self._parse, body, client_request_id)
        with fields_named(asked.mesh_fields):
            if asked.is_plain and len(requests) == 1:
                await self._answer(scope, receive, send, asked=asked, request=requests[0], timeout_s=timeout_s)
            else:
                await self._answer_choices(scope, receive, send, asked=asked, requests=requests, timeout_s=timeout_s)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        asked: OpenAIRequest,
        request: frontend_pb2.GenerateRequest,
        timeout_s: float | None,
    ) -> None:
        request_id = request_id_of(scope)
        if asked.stream:
            tokens = _TokenWriter(
                StreamedReply(
                    send, content_type=sse.CONTENT_TYPE, last=sse.DONE, body_writer=scope.get(BODY_WRITER_KEY)
                )
            )
            events = self._generator.generate(request, timeout_s=timeout_s, request_id=request_id, writer=tokens)
            await stream(
                tokens.streamed,
                self._chunks(events, tokens, includes_usage=asked.includes_usage),
                receive=receive,
                timeout_s=timeout_s,
                client_write_s=self._client_write_s,
                tell=lambda failure: sse.event(failure.openai_body()),
            )
            return
        events = self._generator.generate(request, timeout_s=timeout_s, request_id=request_id)
        async with until_disconnect(receive):
            async with deadline(timeout_s), aclosing(events):
                value = await self._whole(events)
            await send_json(send, value)

    async def _answer_choices(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        asked: OpenAIRequest,
        requests: Sequence[frontend_pb2.GenerateRequest],
        timeout_s: float | None,
    ) -> None:
        """Answer with more than the text of one choice; the first choice's request has the reply's id."""
        request_id = request_id_of(scope)
        events = merged(
            [
                self._generator.generate(request, timeout_s=timeout_s, request_id=None if index else request_id)
                for index, request in enumerate(requests)
            ]
        )
        choices = Choices(self._form, asked, count=len(requests), request_id=request_id)
        if asked.stream:
            streamed = StreamedReply(send, content_type=sse.CONTENT_TYPE, last=sse.DONE)
            await stream(
                streamed,
                choices.chunks(events),
                receive=receive,
                timeout_s=timeout_s,
                client_write_s=self._client_write_s,
                tell=lambda failure: sse.event(failure.openai_body()),
            )
            return
        async with until_disconnect(receive):
            async with deadline(timeout_s), aclosing(events):
                value = await choices.whole(events)
            await send_json(send, value)

    def _parse(self, body: bytes, client_request_id: str) -> tuple[OpenAIRequest, list[frontend_pb2.GenerateRequest]]:
        asked = parse_body(load_json(body), self._kind)
        return asked, asked.to_generate_requests(client_request_id=client_request_id)

    async def _whole(self, events: AsyncIterator[Event]) -> dict[str, object]:
        reply: Reply | None = None
        pieces: list[str] = []
        async for event in events:
            match event:
                case frontend_pb2.Started():
                    reply = Reply(self._form, event)
                case Delta():
                    pieces += event.pieces
                case generation_pb2.Finished() if reply is not None:
                    return reply.whole([self._form.choice("".join(pieces), event.reason)], event.usage)
        raise cut_short()

    async def _chunks(
        self, events: AsyncGenerator[Event, None], tokens: "_TokenWriter", *, includes_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Yield what is to be written at once; nothing before the first output, whose failure is an HTTP status."""
        async with aclosing(events):
            started = await anext(events, None)
            if not isinstance(started, frontend_pb2.Started):
                raise cut_short()
            reply = tokens.reply = Reply(self._form, started, includes_usage=includes_usage)
            unsent = reply.opening()
            async for event in events:
                if isinstance(event, Delta):
                    yield unsent + reply.tokens(event.pieces)
                    unsent = b""
                elif isinstance(event, generation_pb2.Finished):
                    tokens.streamed.last = unsent + reply.closing(event.reason) + reply.ending(event.usage) + sse.DONE
                    return
            raise cut_short()


class _TokenWriter:
    """Writes the tokens of one stream where they arrive; see `DeltaWriter`."""

    def __init__(self, streamed: StreamedReply) -> None:
        self.streamed = streamed
        self.reply: Reply | None = None
        """Set before the first output."""

    @property
    def is_writable(self) -> bool:
        at_once = self.streamed.at_once
        return at_once is not None and at_once.is_writable

    def write(self, delta: Delta) -> None:
        assert self.reply is not None
        assert self.streamed.at_once is not None
        if data := self.reply.tokens(delta.pieces):
            self.streamed.at_once.write(data)
