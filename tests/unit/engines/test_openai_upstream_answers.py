"""What OpenAI-compatible servers say, as they differ in it."""

import pytest

from kvmesh.core.errors import (
    BackOffError,
    FixRequestError,
    MeshError,
    NotKnownError,
    OutOfTimeError,
    Reason,
    TryElsewhereError,
)
from kvmesh.engines.engine import FinishReason
from kvmesh.engines.openai_upstream_answers import Chunk, EventLines, error_of_status, read_chunk, read_models
from kvmesh.engines.stream_thread import StreamUsage


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1_000])
def test_events_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    stream = ': ping\r\n\r\ndata: {"a": "é\u2028"}\r\n\r\nevent: x\nid: 7\ndata:{"b": 2}\n\ndata: [DONE]\n\n'.encode()
    lines = EventLines()

    payloads = [payload for at in range(0, len(stream), size) for payload in lines.push(stream[at : at + size])]

    assert payloads == ['{"a": "é\u2028"}'.encode(), b'{"b": 2}', b"[DONE]"]


def test_a_line_that_never_ends_is_given_up() -> None:
    lines = EventLines()
    lines.push(b"data: " + b"x" * 4_000_000)

    with pytest.raises(TryElsewhereError, match="a line of over"):
        lines.push(b"x" * 1_000_000)


@pytest.mark.parametrize(
    ("payload", "chunk"),
    [
        pytest.param(b'{"choices": [{"text": " a", "finish_reason": null}]}', Chunk(" a"), id="completion"),
        pytest.param(b'{"choices": [{"delta": {"content": " a"}}]}', Chunk(" a"), id="chat"),
        pytest.param(b'{"choices": [{"delta": {"role": "assistant", "content": null}}]}', Chunk(), id="role"),
        pytest.param(b'{"choices": [{"delta": null}]}', Chunk(), id="no delta"),
        pytest.param(b'{"choices": [{"text": "a", "finish_reason": ""}]}', Chunk("a"), id="an empty finish is none"),
        pytest.param(
            b'{"choices": [{"text": "", "finish_reason": "stop"}]}', Chunk(finish=FinishReason.STOP), id="stop"
        ),
        pytest.param(
            b'{"choices": [{"text": "b", "finish_reason": "length"}]}', Chunk("b", FinishReason.LENGTH), id="length"
        ),
        pytest.param(
            b'{"choices": [{"delta": {}, "finish_reason": "content_filter"}]}',
            Chunk(finish=FinishReason.STOP),
            id="an end that the contract has no word for",
        ),
        pytest.param(
            b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}',
            Chunk(usage=StreamUsage(9, None, 2)),
            id="usage",
        ),
        pytest.param(
            b'{"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}}',
            Chunk(usage=StreamUsage(9, 8)),
            id="usage with what was cached",
        ),
        pytest.param(b'{"choices": [{"text": "b"}], "usage": null}', Chunk("b"), id="usage not yet"),
    ],
)
def test_a_chunk_is_read(payload: bytes, chunk: Chunk) -> None:
    assert read_chunk(payload) == chunk


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"7",
        b'"text"',
        b'{"choices": 7}',
        b'{"choices": [7]}',
        b'{"choices": [{"text": 7}]}',
        b'{"choices": [{"delta": {"content": ["a"]}}]}',
        b'{"choices": [{"text": false}]}',
        b'{"choices": [{"finish_reason": 1}]}',
    ],
)
def test_what_is_no_chunk_is_another_workers_chance(payload: bytes) -> None:
    with pytest.raises(TryElsewhereError, match="no OpenAI answer") as caught:
        read_chunk(payload)

    assert caught.value.reason is Reason.WORKER_LOST


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        pytest.param(
            b'{"message": "m", "type": "server_error", "code": "x"}', TryElsewhereError, Reason.WORKER_LOST, id="server"
        ),
        pytest.param(b'"m"', TryElsewhereError, Reason.WORKER_LOST, id="only text"),
        pytest.param(b'{"message": "m", "code": 400}', FixRequestError, Reason.INVALID_FIELD, id="by code"),
        pytest.param(
            b'{"message": "m", "type": "invalid_request_error"}', FixRequestError, Reason.INVALID_FIELD, id="by type"
        ),
        pytest.param(b'{"message": "m", "type": "rate_limit_error"}', BackOffError, Reason.OVERLOADED, id="rate limit"),
    ],
)
def test_an_error_within_the_stream_is_typed(error: bytes, kind: type[MeshError], reason: Reason) -> None:
    with pytest.raises(kind, match="m") as caught:
        read_chunk(b'{"error": ' + error + b"}")

    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (400, FixRequestError, Reason.INVALID_FIELD),
        (413, FixRequestError, Reason.INVALID_FIELD),
        (422, FixRequestError, Reason.INVALID_FIELD),
        (401, MeshError, Reason.INTERNAL),
        (403, MeshError, Reason.INTERNAL),
        (404, NotKnownError, Reason.UNKNOWN_MODEL),
        (408, OutOfTimeError, Reason.DEADLINE),
        (429, BackOffError, Reason.OVERLOADED),
        (500, TryElsewhereError, Reason.WORKER_LOST),
        (503, TryElsewhereError, Reason.WORKER_LOST),
        (504, OutOfTimeError, Reason.DEADLINE),
        (302, TryElsewhereError, Reason.WORKER_LOST),
    ],
)
def test_a_status_says_what_the_caller_should_do(status: int, kind: type[MeshError], reason: Reason) -> None:
    error = error_of_status(status, b'{"error": {"message": "why", "param": "top_p"}}', url="http://inside:1/v1")

    assert (type(error), error.reason) == (kind, reason)
    assert f"answered {status}: why" in error.message
    assert error.field == {Reason.INVALID_FIELD: "top_p", Reason.UNKNOWN_MODEL: "model"}.get(reason)


@pytest.mark.parametrize("status", [400, 404, 408, 429])
def test_what_strangers_read_does_not_name_the_address(status: int) -> None:
    assert "inside" not in error_of_status(status, b"", url="http://inside:1/v1").message


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [("3", 3.0), ("0.5", 0.5), (None, None), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None), ("1e9", None)],
)
def test_a_full_upstream_says_how_long_to_wait(retry_after: str | None, seconds: float | None) -> None:
    assert error_of_status(429, b"", url="u", retry_after=retry_after).retry_after_s == seconds


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"object": "error", "message": "why", "code": 400}', "answered 400: why"),
        (b'{"detail": "why"}', "answered 400: why"),
        (b'{"error": "why"}', "answered 400: why"),
        (b"why\n", "answered 400: why"),
        (b'["why"]', "answered 400: ['why']"),
        (b"", "answered 400"),
        (b"\xff" * 2_000, "answered 400: " + "\ufffd" * 512),
    ],
)
def test_an_error_body_is_read_in_whatever_shape(body: bytes, words: str) -> None:
    error = error_of_status(400, body, url="u")

    assert error.message.endswith(words)
    assert error.field == "prompt"


def test_models_are_listed_with_the_contexts_that_servers_tell() -> None:
    body = (
        b'{"data": [{"id": "vllm", "max_model_len": 4096}, {"id": "llama.cpp", "meta": {"n_ctx": 2048}},'
        b' {"id": "ollama"}]}'
    )

    assert read_models(body) == {"vllm": 4096, "llama.cpp": 2048, "ollama": 0}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"data": [{}]}', b'{"data": 1}'])
def test_what_is_no_list_of_models_is_refused(body: bytes) -> None:
    with pytest.raises(TryElsewhereError, match="no OpenAI answer"):
        read_models(body)
