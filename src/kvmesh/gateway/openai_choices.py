"""Replies with more than the text of one choice: several choices, their log probabilities, an echoed prompt.

Each choice is a request of the mesh. They run at the same time, and the failure of one is that of all.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import zip_longest
from typing import Any

from kvmesh.core.errors import MeshError, Reason
from kvmesh.gateway.openai_chunks import Reply, ReplyForm
from kvmesh.gateway.openai_logprobs import chat_logprobs, completion_logprobs
from kvmesh.gateway.openai_schema import OpenAIRequest
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.generation import Delta, Event

ChoiceEvent = tuple[int, Event]
"""An event and the choice that it belongs to."""
_Known = tuple[generation_pb2.TokenLogprobs, int]
"""What is known of one token, and where in its choice's text it begins."""


def cut_short() -> MeshError:
    """Return the error of a generator that broke its contract: Started, Deltas, Finished, or a raised error."""
    return MeshError(Reason.INTERNAL, "the generator ended without Finished")


async def merged(runs: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[ChoiceEvent, None]:
    """Yield the events of all runs as they come, until each is at its end; closing this closes them all.

    Raises: what the first of them to fail raises.
    """
    arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(maxsize=len(runs))
    tasks = OwnedTasks()
    try:
        for index, run in enumerate(runs):
            tasks.start(_forward(run, index, arrived), name="openai.choice")
        running = len(runs)
        while running:
            index, event = await arrived.get()
            if isinstance(event, Exception):
                raise event
            running -= isinstance(event, generation_pb2.Finished)
            yield index, event
    finally:
        await tasks.aclose()


async def _forward(
    run: AsyncGenerator[Event, None], index: int, arrived: "asyncio.Queue[tuple[int, Event | Exception]]"
) -> None:
    try:
        async with aclosing(run):
            async for event in run:
                await arrived.put((index, event))
                if isinstance(event, generation_pb2.Finished):
                    return
        raise cut_short()
    except Exception as error:  # the one who reads the queue raises it
        await arrived.put((index, error))


class Choices:
    """What one reply says of its choices, as their events come."""

    def __init__(self, form: ReplyForm, asked: OpenAIRequest, *, count: int, request_id: str) -> None:
        """Answer `asked` with `count` choices under `request_id`."""
        self._form = form
        self._asked = asked
        self._request_id = request_id
        self._ends: list[generation_pb2.Finished | None] = [None] * count
        self._lengths = [0] * count
        """Characters of each choice so far."""

    async def whole(self, events: AsyncGenerator[ChoiceEvent, None]) -> dict[str, Any]:
        """Return the reply in one piece."""
        reply: Reply | None = None
        texts = [[self._echo_of(index)] for index in range(len(self._ends))]
        known: list[list[_Known]] = [[] for _ in self._ends]
        async for index, event in events:
            match event:
                case frontend_pb2.Started():
                    reply = reply or self._reply(event)
                case Delta():
                    texts[index] += event.pieces
                    known[index] += [(entry, offset) for _, entry, offset in self._placed(index, event) if entry]
                case generation_pb2.Finished():
                    self._ends[index] = event
        if reply is None:
            raise cut_short()
        choices = [
            self._form.choice(
                "".join(texts[index]), end.reason, index=index, logprobs=self._logprobs_json(known[index])
            )
            for index, end in enumerate(self._finished())
        ]
        return reply.whole(choices, self._usage())

    async def chunks(self, events: AsyncGenerator[ChoiceEvent, None]) -> AsyncGenerator[bytes, None]:
        """Yield what is to be written at once; nothing before the first output, whose failure is an HTTP status."""
        reply: Reply | None = None
        is_open = [False] * len(self._ends)
        async with aclosing(events):
            async for index, event in events:
                if isinstance(event, frontend_pb2.Started):
                    reply = reply or self._reply(event)
                    continue
                if reply is None:
                    raise cut_short()
                data = b"" if is_open[index] else self._opening(reply, index)
                is_open[index] = True
                if isinstance(event, Delta):
                    data += self._pieces(reply, index, event)
                else:
                    self._ends[index] = event
                    data += reply.closing(event.reason, index=index)
                if data:
                    yield data
        assert reply is not None
        if usage := reply.ending(self._usage()):
            yield usage

    def _reply(self, started: frontend_pb2.Started) -> Reply:
        of_all = frontend_pb2.Started(request_id=self._request_id, model=started.model)
        return Reply(self._form, of_all, includes_usage=self._asked.includes_usage)

    def _opening(self, reply: Reply, index: int) -> bytes:
        echo = self._echo_of(index)
        self._lengths[index] = len(echo)
        return reply.opening(index=index) + (reply.piece(echo, index=index) if echo else b"")

    def _pieces(self, reply: Reply, index: int, delta: Delta) -> bytes:
        """Return one event per piece of text, each with what is known of its token."""
        return b"".join(
            [
                reply.piece(piece, index=index, logprobs=self._logprobs_json([(entry, offset)]) if entry else None)
                for piece, entry, offset in self._placed(index, delta)
            ]
        )

    def _placed(self, index: int, delta: Delta) -> Iterator[tuple[str, generation_pb2.TokenLogprobs | None, int]]:
        """Yield each piece with what is known of its token, and where in the choice's text it begins."""
        for piece, entry in zip_longest(delta.pieces, delta.logprobs):
            yield piece, entry, self._lengths[index]
            self._lengths[index] += len(piece)

    def _logprobs_json(self, known: Sequence[_Known]) -> dict[str, Any] | None:
        if self._form.is_chat:
            return chat_logprobs([entry for entry, _ in known])
        return completion_logprobs(known)

    def _echo_of(self, index: int) -> str:
        echoed = self._asked.echoed
        return echoed[index // self._asked.choices_per_prompt] if echoed else ""

    def _finished(self) -> list[generation_pb2.Finished]:
        assert None not in self._ends, "a merged stream ends when every choice has"
        return [end for end in self._ends if end is not None]

    def _usage(self) -> generation_pb2.Usage:
        """Return what all choices consumed; a prompt counts once, as its first choice found it."""
        usages = [end.usage for end in self._finished()]
        prompts = usages[:: self._asked.choices_per_prompt]
        return generation_pb2.Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
        )
