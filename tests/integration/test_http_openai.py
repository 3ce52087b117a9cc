"""The OpenAI API over a real server, called by the official client."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest

from kvmesh.core.errors import BackOffError, MeshError, NotKnownError, Reason, TryElsewhereError
from kvmesh.gateway.app import create_app
from kvmesh.gateway.server import HttpServer
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.generation import Delta, DeltaWriter, Event

CLEANUP_BOUND_S = 5.0
"""Generous: what must happen at once happens in milliseconds."""
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class ScriptedGenerator:
    """A small generator of ours: it serves one model and says what the test writes."""

    deltas: list[list[str]] = field(default_factory=lambda: [["He", "llo"], ["!"]])
    reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_STOP
    error_before: MeshError | None = None
    error_after: MeshError | None = None
    hangs: bool = False
    calls: list[frontend_pb2.GenerateRequest] = field(default_factory=list)
    request_ids: list[str | None] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        self.calls.append(request)
        self.request_ids.append(request_id)
        if request.model != "tiny/llama":
            raise NotKnownError(Reason.UNKNOWN_MODEL, f"model {request.model!r}", field="model")
        if self.error_before:
            raise self.error_before
        try:
            yield frontend_pb2.Started(request_id=request_id or "", model=request.model)
            for pieces in self.deltas:
                yield Delta(pieces, list(range(len(pieces))))
            if self.hangs:
                await asyncio.Event().wait()
            if self.error_after:
                raise self.error_after
            usage = generation_pb2.Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=4)
            yield generation_pb2.Finished(reason=self.reason, usage=usage)
        finally:
            self.closed.set()

    def models(self) -> frontend_pb2.ListModelsResponse:
        return frontend_pb2.ListModelsResponse(models=[frontend_pb2.Model(name="tiny/llama", workers=2)])


@dataclass
class Door:
    """A running server with both kinds of client."""

    generator: ScriptedGenerator
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient


@asynccontextmanager
async def open_door(generator: ScriptedGenerator, *, max_retries: int = 0) -> AsyncIterator[Door]:
    app = create_app(services=[], generator=generator, unready_reason=lambda: None, max_body_bytes=4 * 1024 * 1024)
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    url = f"http://{server.address}"
    async with (
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http,
        openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="unused",
            max_retries=max_retries,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client,
    ):
        yield Door(generator, client, http)
    await server.stop(0)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door(ScriptedGenerator()) as opened:
        yield opened


def events_of(text: str) -> list[str]:
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


async def test_a_chat_streams_chunks_then_usage_then_done(door: Door) -> None:
    stream = await door.client.chat.completions.create(
        model="tiny/llama",
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    *choices, last = chunks
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", "tiny/llama")}
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1
    assert choices[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in choices] == ["", "He", "llo", "!", None]
    assert [chunk.choices[0].finish_reason for chunk in choices] == [None, None, None, None, "stop"]
    assert [chunk.usage for chunk in choices] == [None] * 5
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (7, 3, 10)
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 4


async def test_a_good_stream_ends_with_done_and_carries_usage_only_where_asked(door: Door) -> None:
    body = {"model": "tiny/llama", "messages": HELLO, "stream": True}

    response = await door.http.post("/v1/chat/completions", json=body)

    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(response.text)
    assert last == "[DONE]"
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


async def test_a_chat_in_one_piece(door: Door) -> None:
    reply = await door.client.chat.completions.create(
        model="tiny/llama", messages=[{"role": "user", "content": "hello"}], temperature=0, seed=1, stop=["x"], n=1
    )

    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == "Hello!"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == 10
    sampling = door.generator.calls[0].sampling
    assert (sampling.temperature, sampling.seed, list(sampling.stop)) == (0, 1, ["x"])
    assert sampling.HasField("temperature")


async def test_a_completion_in_one_piece_and_streamed() -> None:
    async with open_door(ScriptedGenerator(reason=generation_pb2.FINISH_REASON_LENGTH)) as door:
        whole = await door.client.completions.create(model="tiny/llama", prompt="hello", max_tokens=3)
        stream = await door.client.completions.create(
            model="tiny/llama", prompt=[1, 2], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]

    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == (
        "text_completion",
        "Hello!",
        "length",
    )
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["He", "llo", "!", ""]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert list(door.generator.calls[1].prompt.token_ids.token_ids) == [1, 2]


async def test_text_that_json_must_escape_arrives_unchanged() -> None:
    pieces = ['"', "\n\n", "data: x", "\\", "日本", "\u2028", "\x00"]
    async with open_door(ScriptedGenerator(deltas=[pieces])) as door:
        stream = await door.client.chat.completions.create(
            model="tiny/llama", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        texts = [chunk.choices[0].delta.content async for chunk in stream]

    assert texts[1:-1] == pieces


async def test_models_are_listed_and_found_by_name(door: Door) -> None:
    listed = [model async for model in door.client.models.list()]
    found = await door.http.get("/v1/models/tiny/llama")

    assert [(model.id, model.object) for model in listed] == [("tiny/llama", "model")]
    assert found.json()["id"] == "tiny/llama"
    with pytest.raises(openai.NotFoundError) as missing:
        await door.client.models.retrieve("other")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_not_found(door: Door, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await door.client.chat.completions.create(
            model="other", messages=[{"role": "user", "content": "hello"}], stream=stream
        )

    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_that_all_fail_before_their_first_output_are_one_status(stream: bool) -> None:
    generator = ScriptedGenerator(error_before=BackOffError(Reason.OVERLOADED, "", retry_after_s=0.02))

    async with open_door(generator) as door:
        with pytest.raises(openai.RateLimitError) as refused:
            await door.client.completions.create(model="tiny/llama", prompt="hello", n=3, stream=stream)

    assert refused.value.response.headers["retry-after-ms"] == "20"
    assert refused.value.request_id in generator.request_ids


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": ""}], [{"role": "user", "content": None}]])
async def test_no_messages_or_none_with_text_are_a_bad_request(door: Door, messages: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await door.client.chat.completions.create(model="tiny/llama", messages=messages)

    assert (refused.value.param, refused.value.code) == ("messages", "empty_prompt")


async def test_message_without_content_beside_one_with_text_is_taken(door: Door) -> None:
    messages: Any = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}]

    answer = await door.client.chat.completions.create(model="tiny/llama", messages=messages)

    assert answer.choices[0].message.content


async def test_what_is_not_served_is_a_bad_request_naming_it(door: Door) -> None:
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: not supported") as refused:
        await door.client.chat.completions.create(
            model="tiny/llama", messages=[{"role": "user", "content": "hello"}], frequency_penalty=1
        )

    assert refused.value.param == "frequency_penalty"
    assert door.generator.calls == []


async def test_overload_is_retried_as_often_as_the_client_was_told() -> None:
    generator = ScriptedGenerator(error_before=BackOffError(Reason.OVERLOADED, "", retry_after_s=0.02))

    async with open_door(generator, max_retries=3) as door:
        with pytest.raises(openai.RateLimitError) as refused:
            await door.client.chat.completions.create(
                model="tiny/llama", messages=[{"role": "user", "content": "hello"}]
            )

    assert refused.value.response.headers["retry-after-ms"] == "20"
    assert refused.value.response.headers["retry-after"] == "1"
    assert len(generator.calls) == 1 + 3


async def test_overload_without_a_time_still_names_one() -> None:
    async with open_door(ScriptedGenerator(error_before=BackOffError(Reason.OVERLOADED, ""))) as door:
        response = await door.http.post("/v1/completions", json={"model": "tiny/llama", "prompt": "x"})

    assert response.status_code == 429
    assert response.headers["retry-after-ms"] == "1000"


async def test_a_worker_that_dies_within_a_stream_is_an_error_in_the_iterator() -> None:
    generator = ScriptedGenerator(error_after=TryElsewhereError(Reason.WORKER_LOST, ""))

    async with open_door(generator) as door:
        stream = await door.client.chat.completions.create(
            model="tiny/llama", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        texts = [(await anext(stream)).choices[0].delta.content for _ in range(4)]
        with pytest.raises(openai.APIError) as failed:
            await anext(stream)
        raw = await door.http.post(
            "/v1/chat/completions", json={"model": "tiny/llama", "messages": HELLO, "stream": True}
        )

    assert texts == ["", "He", "llo", "!"]
    assert failed.value.code == "worker_lost"
    last = json.loads(events_of(raw.text)[-1])
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in raw.text


async def test_a_worker_that_dies_before_its_first_token_is_a_status() -> None:
    generator = ScriptedGenerator(deltas=[], error_after=TryElsewhereError(Reason.WORKER_LOST, ""))

    async with open_door(generator) as door:
        response = await door.http.post(
            "/v1/chat/completions", json={"model": "tiny/llama", "messages": HELLO, "stream": True}
        )

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "worker_lost"


async def test_the_reply_names_the_mesh_id_and_the_client_its_own(door: Door) -> None:
    reply = await door.http.post(
        "/v1/completions", json={"model": "tiny/llama", "prompt": "x"}, headers={"x-request-id": "mine"}
    )
    refused = await door.http.post("/v1/completions", json={})

    request_id = reply.headers["x-request-id"]
    assert door.generator.request_ids == [request_id]
    assert reply.json()["id"] == f"cmpl-{request_id}"
    assert door.generator.calls[0].client_request_id == "mine"
    assert refused.status_code == 400
    assert refused.headers["x-request-id"] not in {"", request_id}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_request(stream: bool) -> None:
    generator = ScriptedGenerator(deltas=[], hangs=True)

    async with open_door(generator) as door:
        with pytest.raises(httpx.ReadTimeout):
            await door.http.post(
                "/v1/completions",
                json={"model": "tiny/llama", "prompt": "x", "stream": stream},
                timeout=httpx.Timeout(10, read=0.2),
            )
        await asyncio.wait_for(generator.closed.wait(), CLEANUP_BOUND_S)


async def test_a_deadline_of_the_client_is_a_timeout() -> None:
    generator = ScriptedGenerator(deltas=[], hangs=True)

    async with open_door(generator) as door:
        response = await door.http.post(
            "/v1/completions", json={"model": "tiny/llama", "prompt": "x"}, headers={"grpc-timeout": "50m"}
        )

    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert generator.closed.is_set()


async def test_unknown_paths_wrong_verbs_and_long_bodies_have_the_apis_errors(door: Door) -> None:
    unknown = await door.http.get("/v1/nothing")
    wrong_verb = await door.http.get("/v1/chat/completions")
    malformed = await door.http.post("/v1/chat/completions", content=b'{"model": ')
    too_long = await door.http.post("/v1/chat/completions", content=b" " * (4 * 1024 * 1024 + 1))

    replies = [unknown, wrong_verb, malformed, too_long]
    assert [reply.status_code for reply in replies] == [404, 405, 400, 413]
    assert all(set(reply.json()["error"]) == {"message", "type", "param", "code"} for reply in replies)
    assert "line 1 column" in malformed.json()["error"]["message"]


async def test_a_long_prompt_is_parsed_off_the_loop_and_arrives_whole(door: Door) -> None:
    prompt = "x" * 1_000_000

    response = await door.http.post("/v1/completions", json={"model": "tiny/llama", "prompt": prompt})

    assert response.status_code == 200
    assert door.generator.calls[0].prompt.text == prompt
