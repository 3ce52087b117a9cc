"""DecodeWorker.Exchange over a real stream: what a processor may rely on."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from kvmesh.core.errors import Reason
from kvmesh.engines.echo import EchoEngine, EchoOptions
from kvmesh.engines.simulated import SimulatedEngine
from kvmesh.runtime.worker import Worker
from kvmesh.testing.worker_group import (
    GENEROUS_S,
    SMALL,
    WAITS,
    HeldSimulatedEngine,
    WorkerGroup,
    held,
    request,
    worker_group,
)
from kvmesh.v1 import decode_worker_pb2, generation_pb2, worker_control_pb2
from kvmesh.wire.error_catalog import from_rpc_error, from_status
from kvmesh.wire.validation import duration

SLOW = replace(SMALL, speedup=1.0, step_base_s=0.01)


class Client:
    """One exchange; what arrives is kept by stream id."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.frames: list[decode_worker_pb2.ExchangeResponse] = []
        self.accepted: dict[int, int] = {}
        self.decisions: dict[int, list[str]] = {}
        self.prompt_usage: dict[int, generation_pb2.Usage] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.words: dict[int, list[str]] = {}
        self.finished: dict[int, generation_pb2.Finished] = {}
        self.failed: dict[int, decode_worker_pb2.ExchangeFailed] = {}

    @classmethod
    async def open(
        cls, group: WorkerGroup, worker: Worker, *, processor_id: str = "p", merge_within_s: float = 0.0
    ) -> "Client":
        client = cls(group.decode(worker).Exchange(timeout=GENEROUS_S))
        merge_within = duration(merge_within_s)
        await client.send(open=decode_worker_pb2.ExchangeOpen(processor_id=processor_id, merge_within=merge_within))
        return client

    async def send(self, **command: Any) -> None:
        await self.call.write(decode_worker_pb2.ExchangeRequest(**command))

    async def submit(self, stream_id: int, wanted: decode_worker_pb2.DecodeRequest) -> None:
        await self.send(submit=decode_worker_pb2.ExchangeSubmit(stream_id=stream_id, request=wanted))

    async def cancel(self, stream_id: int) -> None:
        await self.send(cancel=decode_worker_pb2.ExchangeCancel(stream_id=stream_id))

    async def read(self) -> bool:
        """Take one frame in; False at the end of the stream."""
        frame = await self.call.read()
        if frame is grpc.aio.EOF:
            return False
        self.frames.append(frame)
        self.accepted |= {one.stream_id: one.load_sequence for one in frame.accepted}
        for prefill in frame.prefills:
            if prefill.HasField("decision"):
                self.decisions.setdefault(prefill.stream_id, []).append(prefill.decision.reason)
            else:
                self.prompt_usage[prefill.stream_id] = prefill.usage
        at = 0
        for stream_id, count in zip(frame.stream_ids, frame.counts, strict=True):
            if frame.token_ids:
                self.token_ids.setdefault(stream_id, []).extend(frame.token_ids[at : at + count])
            else:
                self.words.setdefault(stream_id, []).extend(frame.words[at : at + count])
            at += count
        self.finished |= {one.stream_id: one.finished for one in frame.finished}
        self.failed |= {one.stream_id: one for one in frame.failed}
        return True

    async def read_until_over(self, *stream_ids: int) -> None:
        while not all(one in self.finished or one in self.failed for one in stream_ids):
            assert await self.read(), "the exchange ended first"

    async def read_to_the_end(self) -> None:
        while await self.read():
            pass


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group() as group:
        yield group


async def test_request_is_accepted_decided_produced_and_finished(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    client = await Client.open(group, worker)

    await client.submit(7, request("r", max_tokens=5))
    await client.read_until_over(7)

    assert client.accepted[7] > 0
    assert client.decisions[7] == ["no_prefill_worker"]
    assert len(client.token_ids[7]) == 5
    assert client.finished[7].reason == generation_pb2.FINISH_REASON_LENGTH
    assert (client.finished[7].usage.prompt_tokens, client.finished[7].usage.completion_tokens) == (18, 5)
    client.call.cancel()
    await group.wait_idle()


async def test_usage_of_the_prompt_arrives_with_its_computation(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    await group.generate(worker, request("before"))
    client = await Client.open(group, worker)

    await client.submit(1, request("r"))
    await client.read_until_over(1)

    usage = client.prompt_usage[1]
    assert (usage.prompt_tokens, usage.cached_tokens, usage.remote_prefill_tokens) == (18, 16, 0)


async def test_usage_of_a_remote_prefill_tells_what_moved(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()
    client = await Client.open(group, await group.add_decode())

    await client.submit(1, request("r"))
    await client.read_until_over(1)

    assert client.decisions[1] == ["remote"]
    usage = client.prompt_usage[1]
    assert (usage.cached_tokens, usage.remote_prefill_tokens, usage.kv_bytes_moved) == (0, 16, 4 * 64)


async def test_many_requests_share_frames_and_get_their_own_tokens(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    alone = {
        number: (await group.generate(worker, request(f"alone{number}", tokens=range(number, number + 9)))).token_ids
        for number in range(1, 6)
    }
    client = await Client.open(group, worker)

    for number in alone:
        await client.submit(number, request(f"r{number}", tokens=range(number, number + 9)))
    await client.read_until_over(*alone)

    assert client.token_ids == alone


async def test_words_keep_their_boundaries(group: WorkerGroup) -> None:
    worker = await group.add_decode(EchoEngine(node_name="n"))
    client = await Client.open(group, worker)
    wanted = decode_worker_pb2.DecodeRequest(
        request_id="r", attempt=1, text="one two three", sampling=generation_pb2.SamplingParams(max_tokens=50)
    )

    await client.submit(1, wanted)
    await client.read_until_over(1)

    assert client.words[1] == ["one ", "two ", "three_GeneratedBy_n"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (request("r", model="other"), Reason.UNKNOWN_MODEL),
        (request("r", tokens=()), Reason.EMPTY_PROMPT),
        (request("r", tokens=(5000,)), Reason.INVALID_FIELD),
        (request("", tokens=(1,)), Reason.INVALID_FIELD),
        (request("r", attempt=0), Reason.INVALID_FIELD),
        (request("r", max_tokens=0), Reason.INVALID_FIELD),
        (request("r", timeout=duration(86_401)), Reason.INVALID_FIELD),
        (decode_worker_pb2.DecodeRequest(request_id="r", attempt=1, text="words"), Reason.INVALID_FIELD),
    ],
)
async def test_bad_request_is_rejected_alone(
    group: WorkerGroup, wanted: decode_worker_pb2.DecodeRequest, reason: Reason
) -> None:
    client = await Client.open(group, await group.add_decode())

    await client.submit(1, wanted)
    await client.submit(2, request("good"))
    await client.read_until_over(1, 2)

    assert client.failed[1].rejected
    assert from_status(client.failed[1].status).reason is reason
    assert 2 in client.finished
    assert 1 not in client.accepted


async def test_key_that_is_running_is_rejected(group: WorkerGroup) -> None:
    client = await Client.open(group, await group.add_decode(HeldSimulatedEngine(SLOW)))

    await client.submit(1, request("r", max_tokens=20))
    await client.submit(2, request("r", max_tokens=20))
    await client.read_until_over(1, 2)

    assert from_status(client.failed[2].status).reason is Reason.ALREADY_EXISTS
    assert len(client.token_ids[1]) == 20


async def test_cancelled_request_ends_and_the_others_go_on(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_decode(engine)
    client = await Client.open(group, worker)
    await client.submit(1, request("one", max_tokens=30))
    await client.submit(2, request("two", max_tokens=5))
    await group.wait_until(worker, lambda info: info.requests == 2)

    await client.cancel(1)
    await client.cancel(1)
    await group.wait_until(worker, lambda info: info.requests == 1)
    engine.held = False
    await client.read_until_over(2)

    assert 1 not in client.token_ids
    assert 1 not in client.finished | client.failed
    assert len(client.token_ids[2]) == 5


@pytest.mark.parametrize("way", ["broken", "half-closed"])
async def test_end_of_the_stream_cancels_all_its_requests(group: WorkerGroup, way: str) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True))
    client = await Client.open(group, worker)
    for number in range(3):
        await client.submit(number, request(f"r{number}"))
    await group.wait_until(worker, lambda info: info.requests == 3)

    if way == "broken":
        client.call.cancel()
    else:
        await client.call.done_writing()

    await group.wait_idle()


async def test_newer_exchange_of_a_processor_supersedes_the_older(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_decode(engine)
    older = await Client.open(group, worker)
    other = await Client.open(group, worker, processor_id="other")
    await older.submit(1, request("r"))
    await other.submit(1, request("untouched"))
    await group.wait_until(worker, lambda info: info.requests == 2)

    newer = await Client.open(group, worker)
    await newer.submit(1, request("r"))  # the very key that the older one had
    await older.read_to_the_end()
    engine.held = False
    await newer.read_until_over(1)
    await other.read_until_over(1)

    assert 1 in newer.finished
    assert 1 in other.finished
    assert not older.finished


async def test_exchange_has_to_open_first(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    call = group.decode(worker).Exchange(timeout=GENEROUS_S)
    await call.write(decode_worker_pb2.ExchangeRequest(cancel=decode_worker_pb2.ExchangeCancel(stream_id=1)))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert from_rpc_error(caught.value).reason is Reason.INVALID_FIELD


async def test_exchange_that_says_nothing_is_ended(group: WorkerGroup) -> None:
    worker = await group.add_decode(waits=replace(WAITS, exchange_write_s=0.1))
    call = group.decode(worker).Exchange(timeout=GENEROUS_S)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert from_rpc_error(caught.value).reason is Reason.DEADLINE


async def test_second_open_breaks_the_exchange(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True))
    client = await Client.open(group, worker)
    await client.submit(1, request("r"))
    await group.wait_until(worker, lambda info: info.requests == 1)
    await client.send(open=decode_worker_pb2.ExchangeOpen(processor_id="p"))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.read_to_the_end()

    assert from_rpc_error(caught.value).reason is Reason.INVALID_FIELD
    await group.wait_idle()


async def test_stream_id_in_use_breaks_the_exchange(group: WorkerGroup) -> None:
    client = await Client.open(group, await group.add_decode(HeldSimulatedEngine(held=True)))
    await client.submit(1, request("one"))
    await client.submit(1, request("two"))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.read_to_the_end()

    assert from_rpc_error(caught.value).reason is Reason.INVALID_FIELD
    await group.wait_idle()


BIG_WORD = "x" * 1_500_000
"""More than a connection takes in from a worker whose client does not read."""


def big_echo(request_id: str, *, words: int) -> decode_worker_pb2.DecodeRequest:
    return decode_worker_pb2.DecodeRequest(
        request_id=request_id, attempt=1, text=" ".join([BIG_WORD] * words),
        sampling=generation_pb2.SamplingParams(max_tokens=100),
    )  # fmt: skip


def echo() -> EchoEngine:
    return EchoEngine(node_name="n", options=EchoOptions(max_context_tokens=2**30))


async def test_frames_merge_while_the_writer_is_behind(group: WorkerGroup) -> None:
    worker = await group.add_decode(echo())
    client = await Client.open(group, worker)
    await client.submit(1, big_echo("big", words=8))
    await client.submit(2, decode_worker_pb2.DecodeRequest(
        request_id="small", attempt=1, text="a b c d e f g h i j",
        sampling=generation_pb2.SamplingParams(max_tokens=100),
    ))  # fmt: skip
    await group.wait_until(worker, lambda info: info.counters["requests"] == 2 and info.requests == 0)

    await client.read_until_over(1, 2)

    assert client.words[2] == ["a ", "b ", "c ", "d ", "e ", "f ", "g ", "h ", "i ", "j_GeneratedBy_n"]
    assert [len(word) for word in client.words[1][:-1]] == [len(BIG_WORD) + 1] * 7
    with_words = [frame for frame in client.frames if frame.words]
    assert len(with_words) < 10, "ten steps, each a frame of its own"
    client.call.cancel()


async def test_writer_that_is_blocked_for_too_long_breaks_the_stream(group: WorkerGroup) -> None:
    worker = await group.add_decode(echo(), waits=replace(WAITS, exchange_write_s=0.3))
    client = await Client.open(group, worker)
    await client.submit(1, big_echo("big", words=20))
    endless = decode_worker_pb2.DecodeRequest(
        request_id="endless", attempt=1, text=" ".join("w" * 100_000),
        sampling=generation_pb2.SamplingParams(max_tokens=10**6),
    )  # fmt: skip
    await client.submit(2, endless)

    await group.wait_until(worker, lambda info: info.counters["requests"] == 2 and info.requests == 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.read_to_the_end()

    assert from_rpc_error(caught.value).reason is Reason.DEADLINE
    assert 2 not in client.finished


async def test_draining_worker_rejects_and_tells_what_it_cancels(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True))
    client = await Client.open(group, worker)
    await client.submit(1, request("running"))
    await group.wait_until(worker, lambda info: info.requests == 1)

    drain = group.control(worker).Drain(worker_control_pb2.DrainRequest(timeout=duration(0.3)), timeout=GENEROUS_S)
    await group.wait_until(worker, lambda info: info.draining)
    await client.submit(2, request("late"))
    await client.read_until_over(1, 2)
    drained = await drain

    assert from_status(client.failed[2].status).reason is Reason.DRAINING
    assert client.failed[2].rejected
    assert from_status(client.failed[1].status).reason is Reason.DRAINING
    assert not client.failed[1].rejected
    assert (drained.finished, drained.cancelled) == (0, 1)
    await group.wait_idle()


async def test_worker_that_stops_tells_its_requests_so_before_the_exchange_ends(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True), waits=replace(WAITS, drain_s=0.1))
    client = await Client.open(group, worker)
    await client.submit(1, request("running"))
    await group.wait_until(worker, lambda info: info.requests == 1)

    group.workers.remove(worker)
    _, reading = await asyncio.gather(worker.stop(), _read_quietly(client))

    assert reading
    assert from_status(client.failed[1].status).reason is Reason.DRAINING


async def _read_quietly(client: Client) -> bool:
    await client.read_to_the_end()
    return True


async def test_deadline_of_a_request_is_kept_by_the_worker(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True))
    client = await Client.open(group, worker)

    await client.submit(1, request("r", timeout=duration(0.1)))
    await client.read_until_over(1)

    assert from_status(client.failed[1].status).reason is Reason.DEADLINE
    assert not client.failed[1].rejected
    await group.wait_until(worker, lambda info: held(info) == (0, 0, 0, 0))


async def test_output_of_many_waits_for_more_save_the_first_and_the_last(group: WorkerGroup) -> None:
    client = await Client.open(group, await group.add_decode(SimulatedEngine(SLOW)), merge_within_s=1.0)
    streams = range(1, 9)

    for number in streams:
        await client.submit(number, request(f"r{number}", tokens=range(number, number + 9), max_tokens=20))
    await client.read_until_over(*streams)

    frames_by_stream = {one: sum(one in frame.stream_ids for frame in client.frames) for one in streams}
    assert max(frames_by_stream.values()) < 10  # 2, and a few while there are not yet, or no longer, many
    assert {one: len(tokens) for one, tokens in client.token_ids.items()} == dict.fromkeys(streams, 20)


async def test_held_output_goes_when_its_time_is_up(group: WorkerGroup) -> None:
    client = await Client.open(group, await group.add_decode(SimulatedEngine(SLOW)), merge_within_s=0.02)
    streams = range(1, 9)

    for number in streams:
        await client.submit(number, request(f"r{number}", tokens=range(number, number + 9), max_tokens=20))
    await client.read_until_over(*streams)

    frames_by_stream = {one: sum(one in frame.stream_ids for frame in client.frames) for one in streams}
    assert min(frames_by_stream.values()) > 2  # more than the first and the last


async def test_output_of_fewer_waits_for_less(group: WorkerGroup) -> None:
    frames = {}
    for count in (8, 48):
        engine = SimulatedEngine(replace(SLOW, total_blocks=1024, max_sequences=64))
        client = await Client.open(group, await group.add_decode(engine), merge_within_s=0.3)
        streams = range(1, count + 1)
        for number in streams:
            await client.submit(number, request(f"r{count}-{number}", tokens=range(number, number + 9), max_tokens=60))
        await client.read_until_over(*streams)
        frames[count] = sum(1 in frame.stream_ids for frame in client.frames)

    assert frames[48] < frames[8] < 60


async def test_output_of_few_never_waits(group: WorkerGroup) -> None:
    client = await Client.open(group, await group.add_decode(SimulatedEngine(SLOW)), merge_within_s=1.0)

    await client.submit(1, request("r", max_tokens=10))
    await client.read_until_over(1)

    assert sum(1 in frame.stream_ids for frame in client.frames) > 2


async def test_longer_merging_than_a_second_is_refused(group: WorkerGroup) -> None:
    client = await Client.open(group, await group.add_decode(), merge_within_s=1.5)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.read()

    assert from_rpc_error(refused.value).reason is Reason.INVALID_FIELD
    assert "open.merge_within" in str(refused.value.details())
