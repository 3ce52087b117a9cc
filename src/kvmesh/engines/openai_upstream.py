"""The openai_upstream engine: any OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama ...) as one worker.

The server does everything, its prompt caching too; this engine streams each request from it. Prompts arrive here
rendered, so they go to `/completions` as they are; with `api=chat` each is one user message, for servers that must
apply their own template. Stop strings stay the processor's. KV cannot be handed over, so a prefill-only request is over
at once, and the mesh never sends one: prefill stays with the server.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import httpx
import orjson

from kvmesh.core.errors import FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.engines.engine import EngineInfo, EngineLoad, EngineRequest, FinishReason, PromptForm
from kvmesh.engines.openai_upstream_answers import (
    DONE,
    Chunk,
    EventLines,
    error_of_status,
    read_chunk,
)
from kvmesh.engines.openai_upstream_breaker import Breaker
from kvmesh.engines.openai_upstream_models import (
    MODELS_S,
    check_listed,
    choose_model,
    headers_of,
    nobody_answers,
    read_listed,
)
from kvmesh.engines.openai_upstream_options import OpenAiUpstreamOptions
from kvmesh.engines.stream_thread import Piece, Publish, StreamUsage
from kvmesh.engines.streamed_engine import StreamedEngine

T = TypeVar("T")

_AFTER_FINISH_S = 1.0
"""Longest wait, once the answer is whole, for the usage that may follow it."""
_MAX_ERROR_BYTES = 64 * 1024


class KvEventSource(Protocol):
    """Tells what the upstream's prefix cache holds. Its methods are called on one event loop."""

    def start(self) -> None:
        """Begin to follow."""

    async def aclose(self) -> None:
        """Stop following."""


OpenEvents = Callable[[Publish], KvEventSource]
"""Makes the source that hands events on; called on the event loop that runs it."""


class OpenAiUpstreamEngine(StreamedEngine):
    """Streams every request from one server."""

    def __init__(
        self,
        options: OpenAiUpstreamOptions,
        *,
        url: str,
        api_key: str | None = None,
        vocab_size: int = 0,
        open_events: OpenEvents | None = None,
    ) -> None:
        """Ask `url` for its models, and take requests for one of them from now on.

        `vocab_size` is that of the tokenizer, where prompts are tokens. Raises: MeshError if nothing usable answers.
        """
        model, context_tokens = choose_model(options, url=url, api_key=api_key)
        is_tokens = options.accepts is PromptForm.TOKENS
        info = EngineInfo(
            name="openai_upstream",
            accepts=frozenset({options.accepts}),
            block_size=options.block_size,
            total_blocks=0,
            max_sequences=options.max_sequences,
            max_context_tokens=options.max_context_tokens or (context_tokens if is_tokens else 0),
            vocab_size=vocab_size if is_tokens else 0,
            layout=None,
            keeps_formats=True,
        )
        streams = _UpstreamStreams(options, url=url, model=model, api_key=api_key, open_events=open_events)
        super().__init__(info, streams, has_events=open_events is not None, where=url)


class _UpstreamStreams:
    """The streams of one server, by HTTP."""

    def __init__(
        self,
        options: OpenAiUpstreamOptions,
        *,
        url: str,
        model: str,
        api_key: str | None,
        open_events: OpenEvents | None,
    ) -> None:
        self._options = options
        self._url = url
        self._path = f"{url}/chat/completions" if options.api == "chat" else f"{url}/completions"
        self._model = model
        self._headers = {
            **headers_of(api_key),
            "content-type": "application/json",
            "accept": "text/event-stream",
            "accept-encoding": "identity",  # what compresses a stream also holds it back
        }
        self._open_events = open_events
        self._events: KvEventSource | None = None
        self._client: httpx.AsyncClient | None = None
        self._breaker = Breaker(self._probe)

    async def open(self, publish: Publish) -> None:
        self._client = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=self._options.connect_s),  # the other waits are bounded here
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._options.max_sequences),
            trust_env=False,  # a proxy meant for the internet is no way to an upstream
        )
        if self._open_events is not None:
            self._events = self._open_events(publish)
            self._events.start()

    def figures(self, counted: EngineLoad) -> EngineLoad:
        return replace(counted, out_of_service=self._breaker.out_of_service)

    async def aclose(self) -> None:
        await self._breaker.aclose()
        if self._events is not None:
            await self._events.aclose()
        if self._client is not None:
            await self._client.aclose()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        if request.prefill_only:
            yield Piece(finish=FinishReason.PREFILLED)
            return
        if request.lora is not None:
            raise FixRequestError(Reason.INVALID_FIELD, "lora: the upstream serves adapters as models", field="lora")
        try:
            async with aclosing(self._answer(request)) as pieces:
                async for piece in pieces:
                    if piece.finish is not None:
                        self._breaker.succeeded()
                    yield piece
        except MeshError as error:
            cause = error.__cause__
            self._breaker.failed(error, is_unreachable=isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout))
            raise

    async def _answer(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        response = await self._send(request)
        try:
            async for piece in self._read(response):
                yield piece
        finally:
            await response.aclose()

    async def _probe(self) -> None:
        """Raises: MeshError unless the upstream has the model."""
        assert self._client is not None
        try:
            response = await self._within(MODELS_S, self._client.get(f"{self._url}/models"), "list of models")
        except httpx.HTTPError as exc:
            raise nobody_answers(self._url, exc) from exc
        models = read_listed(response, url=self._url, is_needed=not self._options.model)
        check_listed(self._model, models, url=self._url)

    async def _send(self, request: EngineRequest) -> httpx.Response:
        """Return the response once its answer may begin. Raises: MeshError."""
        assert self._client is not None
        sent = self._client.build_request("POST", self._path, content=orjson.dumps(self._body(request)))
        wait_s = self._options.first_token_s
        try:
            response = await self._within(wait_s, self._client.send(sent, stream=True), "headers")
        except httpx.HTTPError as exc:
            raise nobody_answers(self._url, exc) from exc
        if response.status_code == httpx.codes.OK:
            return response
        try:
            body = b""
            with suppress(httpx.HTTPError, TryElsewhereError):
                body = await self._within(wait_s, _read_some(response.aiter_bytes()), "error")
            raise error_of_status(
                response.status_code, body, url=self._path, retry_after=response.headers.get("retry-after")
            )
        finally:
            await response.aclose()

    async def _read(self, response: httpx.Response) -> AsyncIterator[Piece]:
        """Yield the answer, its finish last; what follows a finish is only waited for a moment."""
        lines, data = EventLines(), response.aiter_bytes()
        finish: FinishReason | None = None
        usage: StreamUsage | None = None
        wait_s, is_done, has_words = self._options.first_token_s, False, False
        while not is_done:
            try:
                received = await self._within(wait_s if finish is None else _AFTER_FINISH_S, anext(data, b""), "event")
                payloads = lines.push(received)
                is_done = not received or DONE in payloads
                chunks = [read_chunk(payload) for payload in payloads if payload and payload != DONE]
            except (httpx.HTTPError, MeshError) as exc:
                if finish is not None:
                    break  # the answer was whole
                if isinstance(exc, MeshError):
                    raise
                raise TryElsewhereError(Reason.WORKER_LOST, f"{self._path} broke off: {exc!r}") from exc
            if chunks:
                wait_s = self._options.token_gap_s
            finish = next((chunk.finish for chunk in chunks if chunk.finish is not None), finish)
            usage = next((chunk.usage for chunk in reversed(chunks) if chunk.usage is not None), usage)
            if words := _words(chunks):
                has_words = True
                yield Piece(words=words, usage=usage)
            if DONE in payloads and finish is None and has_words:
                finish = FinishReason.STOP  # some servers say no more than that it is over
        if finish is None:
            raise TryElsewhereError(Reason.WORKER_LOST, f"{self._path} ended its stream before the answer did")
        yield Piece(finish=finish, usage=usage)

    async def _within(self, wait_s: float, work: Awaitable[T], what: str) -> T:
        """Raises: TryElsewhereError(WORKER_LOST) after `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                return await work
        except TimeoutError as exc:
            raise TryElsewhereError(Reason.WORKER_LOST, f"{self._path}: no {what} within {wait_s:g} s") from exc

    def _body(self, request: EngineRequest) -> dict[str, Any]:
        sampling = request.sampling
        prompt = request.text if request.token_ids is None else request.token_ids.tolist()
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._options.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.response_format:
            body["response_format"] = orjson.loads(sampling.response_format)
        # No part of the OpenAI API, though most servers have them: sent only where they were asked for.
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.ignore_eos:
            body["ignore_eos"] = True
        if request.cache_namespace is not None:
            body["cache_salt"] = request.cache_namespace
        return body


def _words(chunks: list[Chunk]) -> tuple[str, ...]:
    return tuple(chunk.text for chunk in chunks if chunk.text)


async def _read_some(data: AsyncIterator[bytes]) -> bytes:
    body = b""
    async for part in data:
        body += part
        if len(body) >= _MAX_ERROR_BYTES:
            break
    return body
