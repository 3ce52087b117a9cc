"""Disaggregation by every transport that the machine can run: the same tokens, never a wrong one, nothing left held."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from kvmesh import telemetry
from kvmesh.core.errors import Reason
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.engines.engine import Engine, Sampling
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_weights import LlamaWeights, load_weights
from kvmesh.runtime.transport_registry import allocator
from kvmesh.runtime.worker import Worker
from kvmesh.testing.engine_contract import attempt, run_all, token_request
from kvmesh.testing.held_transport import HeldPulls
from kvmesh.testing.remote_prefills import BLOCKS, HAND, HandWorker, decisions, local_answer
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.testing.worker_group import (
    BLOCK_BYTES,
    GENEROUS_S,
    SMALL,
    WAITS,
    Answer,
    HeldSimulatedEngine,
    WorkerGroup,
    eventually,
    request,
)
from kvmesh.transports import nixl_library
from kvmesh.transports.blocks import failed
from kvmesh.transports.memory import MemoryTransport
from kvmesh.transports.nixl import NixlTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.transport import Transport
from kvmesh.v1 import decode_worker_pb2, generation_pb2
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.layout import layout_to_wire

needs_nixl = pytest.mark.skipif(not nixl_library.is_installed(), reason=f"needs NIXL: {nixl_library.INSTALL}")
KINDS = ["memory", "shared_memory", "tcp", pytest.param("nixl", marks=needs_nixl)]

LLAMA_BLOCK = 16
PROMPT_TOKENS, CAP_TOKENS = 300, 288
HELD_TOKENS = 96
OUTPUT_TOKENS = 64
LONG_ENOUGH = RemotePrefillRules(min_uncached_tokens=128)

MakeTransport = Callable[[], Transport]


def tokens_of(seed: int, count: int = PROMPT_TOKENS) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(5, 512, count).tolist()
    return tokens


HELD = tokens_of(2, HELD_TOKENS + 4)
"""So short that decode computes it, and holds it alone."""
PROMPTS = (
    first_prompt := tokens_of(1),
    [*HELD[:HELD_TOKENS], *tokens_of(4, PROMPT_TOKENS - HELD_TOKENS)],
    [*first_prompt[:CAP_TOKENS], *tokens_of(5, 200)],
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str, group: WorkerGroup, tmp_path: Path) -> MakeTransport:
    makers: dict[str, MakeTransport] = {
        "memory": lambda: MemoryTransport(group.network),
        "shared_memory": lambda: SharedMemoryTransport(tmp_path),
        "tcp": TcpTransport,
        "nixl": NixlTransport,
    }
    return makers[kind]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> LlamaWeights:
    return load_weights(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"), dtype="float64")


def llama(weights: LlamaWeights, transport: Transport | None = None) -> Engine:
    options = NumpyLlamaOptions(total_blocks=256, block_size=LLAMA_BLOCK, dtype="float64")
    return NumpyLlamaEngine(weights, options, allocate=allocator([transport] if transport is not None else []))


@pytest.fixture(scope="module")
def alone(weights: LlamaWeights) -> list[list[int]]:
    """What one engine by itself answers to each of PROMPTS, each in an engine of its own."""
    answers = []
    for prompt in PROMPTS:
        engine = llama(weights)
        sampling = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        engine.submit(token_request(engine.info, 1, np.array(prompt, dtype=np.uint32), sampling=sampling))
        answers.append(list(run_all(engine).answers[attempt(1)].token_ids))
    return answers


def simulated(transport: Transport, *, held: bool = False, step_s: float = 0.0) -> HeldSimulatedEngine:
    options = replace(SMALL, speedup=1.0, step_base_s=step_s) if step_s else SMALL
    return HeldSimulatedEngine(options, held=held, allocate=allocator([transport]))


async def add_prefill(group: WorkerGroup, transport: Transport, **changes: float) -> Worker:
    return await group.add_prefill(simulated(transport), transport=transport, waits=replace(WAITS, **changes))


async def add_decode(group: WorkerGroup, transport: Transport, **changes: float) -> Worker:
    return await group.add_decode(simulated(transport), transport=transport, waits=replace(WAITS, **changes))


async def test_tokens_are_those_of_one_engine_with_the_prefix_reused_on_either_side(
    group: WorkerGroup, make: MakeTransport, weights: LlamaWeights, alone: list[list[int]]
) -> None:
    prompt, with_held_prefix, same_prefix = PROMPTS
    await group.add_queue()
    serving = make()
    prefill = await group.add_prefill(llama(weights, serving), transport=serving)
    pulling, other = make(), make()
    decode = await group.add_decode(llama(weights, pulling), transport=pulling, rules=LONG_ENOUGH)
    second_decode = await group.add_decode(llama(weights, other), transport=other, rules=LONG_ENOUGH)

    async def ask(worker: Worker, name: str, tokens: list[int], max_tokens: int = OUTPUT_TOKENS) -> Answer:
        return await group.generate(worker, request(name, tokens=tokens, max_tokens=max_tokens))

    first = await ask(decode, "first", prompt)
    await ask(decode, "held", HELD, max_tokens=1)  # below the threshold: decode alone holds it
    before = (await group.info(prefill)).counters
    second = await ask(decode, "second", with_held_prefix)
    after = (await group.info(prefill)).counters
    third = await ask(second_decode, "third", same_prefix)
    last = (await group.info(prefill)).counters

    assert [answer.token_ids for answer in (first, second, third)] == alone
    assert [decisions(answer) for answer in (first, second, third)] == [[(True, "remote")]] * 3
    assert (first.usage.cached_tokens, second.usage.cached_tokens, third.usage.cached_tokens) == (0, HELD_TOKENS, 0)
    assert after["prefix_tokens"] - before["prefix_tokens"] == HELD_TOKENS
    assert after["computed_tokens"] - before["computed_tokens"] == CAP_TOKENS - HELD_TOKENS
    third_cap = (len(same_prefix) - 1) // LLAMA_BLOCK * LLAMA_BLOCK
    assert last["computed_tokens"] - after["computed_tokens"] == third_cap - CAP_TOKENS
    await group.wait_idle()


@pytest.mark.parametrize("is_noticed", [False, True], ids=["all but one number zero", "all zero"])
async def test_spoiled_block_changes_the_tokens_unless_it_is_noticed(
    group: WorkerGroup, make: MakeTransport, weights: LlamaWeights, alone: list[list[int]], is_noticed: bool
) -> None:
    def spoil(block: npt.NDArray[np.uint8]) -> None:
        block[: None if is_noticed else -8] = 0

    await group.add_queue()
    serving, pulling = make(), HeldPulls(make(), spoil=spoil)
    await group.add_prefill(llama(weights, serving), transport=serving)
    decode = await group.add_decode(llama(weights, pulling), transport=pulling)

    answer = await group.generate(decode, request("r", tokens=PROMPTS[0], max_tokens=OUTPUT_TOKENS))

    assert decisions(answer)[0] == (True, "remote")
    assert (decisions(answer)[1:] == [(False, "fallback_kv_transfer_failed")]) == is_noticed
    assert (answer.token_ids == alone[0]) == is_noticed
    await group.wait_idle()


async def test_nothing_is_decoded_before_the_handoff_is_whole(group: WorkerGroup, make: MakeTransport) -> None:
    await group.add_queue()
    await add_prefill(group, make())
    pulling = HeldPulls(make())
    pulling.end.clear()
    decode = await add_decode(group, pulling)

    running = asyncio.ensure_future(group.generate(decode, request("r")))
    async with asyncio.timeout(GENEROUS_S):
        await pulling.arrived.wait()
    meanwhile = await group.info(decode)
    pulling.end.set()
    answer = await running

    assert (meanwhile.imports, meanwhile.cached_blocks, meanwhile.counters["remote_prefills"]) == (1, 0, 0)
    assert decisions(answer) == [(True, "remote")]
    assert answer.usage.kv_bytes_moved == BLOCKS * BLOCK_BYTES
    assert answer.token_ids == (await local_answer()).token_ids
    await group.wait_idle()


@pytest.mark.parametrize("when", ["before the transfer", "after the transfer"])
async def test_prefill_worker_that_dies_leaves_a_correct_local_answer(
    group: WorkerGroup, make: MakeTransport, when: str
) -> None:
    await group.add_queue()
    prefill = await add_prefill(group, make())
    pulling = HeldPulls(make())
    (pulling.begin if when == "before the transfer" else pulling.end).clear()
    decode = await add_decode(group, pulling)

    running = asyncio.ensure_future(group.generate(decode, request("r")))
    async with asyncio.timeout(GENEROUS_S):
        await (pulling.reached if when == "before the transfer" else pulling.arrived).wait()
    group.workers.remove(prefill)
    await prefill.aclose()  # as one that is killed: its record stays
    pulling.begin.set()
    pulling.end.set()
    answer = await running

    assert [remote for remote, _ in decisions(answer)] == [True, False]
    assert decisions(answer)[1][1].startswith("fallback_")
    assert answer.usage.kv_bytes_moved == 0
    assert answer.token_ids == (await local_answer()).token_ids
    await group.wait_idle()


async def test_transfer_that_stalls_is_left_within_its_bound(group: WorkerGroup, make: MakeTransport) -> None:
    await group.add_queue()
    await add_prefill(group, make())
    pulling = HeldPulls(make())
    pulling.begin.clear()
    decode = await add_decode(group, pulling, kv_transfer_s=0.2)

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_kv_transfer_failed")]
    assert answer.token_ids == (await local_answer()).token_ids
    await group.wait_idle()


async def test_prefill_worker_that_came_back_under_its_id_does_not_make_the_old_handoff_good(
    group: WorkerGroup, make: MakeTransport
) -> None:
    await group.add_queue()
    pulling = HeldPulls(make())
    pulling.begin.clear()
    decode = await add_decode(group, pulling)
    prefill = await add_prefill(group, make())
    running = asyncio.ensure_future(group.generate(decode, request("r")))
    async with asyncio.timeout(GENEROUS_S):
        await pulling.reached.wait()

    group.workers.remove(prefill)
    await prefill.aclose()
    again = await add_prefill(group, make())
    pulling.begin.set()
    answer = await running
    later = await group.generate(decode, request("later", tokens=range(200, 218)))

    assert again.identity.worker_id == prefill.identity.worker_id
    assert again.identity.epoch > prefill.identity.epoch
    assert [remote for remote, _ in decisions(answer)] == [True, False]
    assert answer.token_ids == (await local_answer()).token_ids
    assert decisions(later) == [(True, "remote")]
    await group.wait_idle()


async def test_decode_worker_that_dies_among_its_transfer_leaves_nothing_pinned(
    group: WorkerGroup, make: MakeTransport
) -> None:
    await group.add_queue()
    prefill = await add_prefill(group, make(), pin_s=1.0)
    pulling = HeldPulls(make())
    pulling.begin.clear()
    decode = await add_decode(group, pulling)
    running = asyncio.ensure_future(group.generate(decode, request("r")))
    async with asyncio.timeout(GENEROUS_S):
        await pulling.reached.wait()
    held = (await group.info(prefill)).pins

    group.workers.remove(decode)
    await decode.aclose()
    with suppress(grpc.aio.AioRpcError):
        await running
    await group.wait_idle()
    again = await add_decode(group, make())
    repeated = await group.generate(again, request("r"))
    retried = await group.generate(again, request("r", tokens=range(100, 118), attempt=2))

    assert held == 1
    assert decisions(repeated) == [(True, "remote"), (False, "fallback_pin_expired")]  # what was handed over is void
    assert repeated.token_ids == (await local_answer()).token_ids
    assert decisions(retried) == [(True, "remote")]
    await group.wait_idle()


async def test_lease_that_ends_behind_a_stalled_holder_goes_to_another_whose_handoff_is_used(
    group: WorkerGroup, make: MakeTransport
) -> None:
    queue = await group.add_queue(QueueLimits(lease_ttl_s=0.5))
    serving = make()
    layout = simulated(make()).info.layout
    assert layout is not None
    stalled = await HandWorker.attach(group, layout=layout_to_wire(layout), transports=[serving.reach])
    decode = await add_decode(group, make())
    running = asyncio.ensure_future(group.generate(decode, request("r")))
    leased = await stalled.lease()
    second = await add_prefill(group, serving)
    answer = await running
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stalled.complete(leased, generation_pb2.KvHandoff(worker_id=HAND, epoch=1))

    assert from_rpc_error(refused.value).reason is Reason.LEASE_LOST
    assert decisions(answer) == [(True, "remote")]
    assert answer.usage.kv_bytes_moved == BLOCKS * BLOCK_BYTES
    assert answer.token_ids == (await local_answer()).token_ids
    assert (await group.info(second)).counters["tasks"] == 1
    await eventually(lambda: queue.queue.stats().leased == 0)
    stalled.leave()
    await group.wait_idle()


@pytest.mark.timeout(120)
async def test_storms_of_cancellations_leave_the_baseline_and_the_next_request_is_answered_at_once(
    group: WorkerGroup, kind: str, make: MakeTransport
) -> None:
    rounds, at_once = (4, 300) if kind == "tcp" else (1, 60)
    await group.add_queue()
    serving, pulling = make(), make()
    await group.add_prefill(simulated(serving, step_s=0.001), transport=serving)
    decode = await group.add_decode(simulated(pulling, step_s=0.001), transport=pulling)
    rng = np.random.default_rng(3)

    async def cancelled_after(name: str, reads: int) -> None:
        tokens = rng.integers(0, 1000, 18).tolist()
        call = group.decode(decode).Generate(
            decode_worker_pb2.DecodeWorkerGenerateRequest(request=request(name, tokens=tokens, max_tokens=20)),
            timeout=GENEROUS_S * 2,
        )
        with suppress(grpc.aio.AioRpcError):  # OVERLOADED is an answer too
            for _ in range(reads):
                if await call.read() is grpc.aio.EOF:
                    break
        call.cancel()

    for number in range(rounds):
        reads = rng.integers(0, 5, at_once).tolist()
        await asyncio.gather(*(cancelled_after(f"{number}-{index}", count) for index, count in enumerate(reads)))
        await group.wait_idle()
    began = asyncio.get_running_loop().time()
    probe = await group.generate(decode, request("probe"))
    took_s = asyncio.get_running_loop().time() - began

    assert probe.finished is not None
    assert took_s < 5.0
    await group.wait_idle()


@pytest.mark.parametrize("fails", [True, False], ids=["first transport fails", "first transport works"])
async def test_pull_that_fails_goes_on_by_the_next_transport_that_both_have(
    group: WorkerGroup, tmp_path: Path, fails: bool
) -> None:
    class Failing(SharedMemoryTransport):
        async def pull(self, agent_name: str, **pull: object) -> int:
            raise failed("NIXL_ERR_BACKEND")

    await group.add_queue()
    shared = SharedMemoryTransport(tmp_path)
    await group.add_prefill(simulated(shared), transport=[shared, TcpTransport()])
    first = Failing(tmp_path) if fails else SharedMemoryTransport(tmp_path)
    decode = await group.add_decode(transport=[first, TcpTransport()])
    failures = telemetry.KV_PULLS_FAILED.labels(transport="shared_memory")
    by_tcp = telemetry.KV_BYTES_MOVED.labels(transport="tcp")
    before = failures._value.get(), by_tcp._value.get()

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote")]
    assert answer.usage.kv_bytes_moved == BLOCKS * BLOCK_BYTES
    assert answer.token_ids == (await local_answer()).token_ids
    assert failures._value.get() - before[0] == (1 if fails else 0)
    assert by_tcp._value.get() - before[1] == (BLOCKS * BLOCK_BYTES if fails else 0)
    await group.wait_idle()


async def test_connection_that_cannot_be_made_early_is_counted_and_left_to_the_first_pull(group: WorkerGroup) -> None:
    class Cold(MemoryTransport):
        hangs = False

        async def warm_up(self, agent_name: str, target: npt.NDArray[np.uint8]) -> None:
            if self.hangs:
                await asyncio.Event().wait()
            raise failed("nobody there yet")

    class Hanging(Cold):
        hangs = True

    not_warm = telemetry.KV_WARM_UPS.labels(outcome="failed")
    before = not_warm._value.get()
    await group.add_queue()
    refused, hanging = Cold(group.network), Hanging(group.network)
    await group.add_prefill(transport=refused)
    decode = await group.add_decode(transport=hanging, waits=replace(WAITS, connect_s=0.2))

    await eventually(lambda: not_warm._value.get() - before == 2)
    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote")]
    await group.wait_idle()


@needs_nixl
async def test_workers_are_connected_before_their_first_pull(group: WorkerGroup) -> None:
    done = telemetry.KV_WARM_UPS.labels(outcome="done")
    before = done._value.get()
    await group.add_queue()
    serving, pulling = NixlTransport(), NixlTransport()

    await add_prefill(group, serving)
    await add_decode(group, pulling)

    await eventually(lambda: done._value.get() - before == 2)  # each way: prefixes move to the prefill worker
