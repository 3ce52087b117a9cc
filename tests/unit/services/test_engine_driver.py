"""The engine driver with real engines: turns, cancellation, crashes, closing."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from kvmesh.core.errors import FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import AttemptKey, RequestId
from kvmesh.engines.echo import EchoEngine
from kvmesh.engines.engine import (
    Engine,
    EngineRequest,
    FinishReason,
    KvEvent,
    Output,
    Pin,
    PoolStats,
    Sampling,
    StepResult,
)
from kvmesh.engines.simulated import SimulatedEngine
from kvmesh.engines.simulated_options import SimulatedOptions
from kvmesh.services.engine_driver import EngineDriver

GENEROUS_S = 20.0
SIZE = 4
FAST = SimulatedOptions(total_blocks=32, block_size=SIZE, block_bytes=16, vocab_size=1000, speedup=0)
NOTHING_HELD = PoolStats(used_blocks=0, pinned_blocks=0, pins=0, imports=0)


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.error: MeshError | None = None
        self.over = asyncio.Event()

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    def output(self, output: Output) -> None:
        assert not self.over.is_set(), "heard after the end"
        self.outputs.append(output)
        if output.finish is not None or output.error is not None:
            self.over.set()

    def failed(self, error: MeshError) -> None:
        assert not self.over.is_set(), "heard after the end"
        self.error = error
        self.over.set()

    async def wait(self) -> "Heard":
        async with asyncio.timeout(GENEROUS_S):
            await self.over.wait()
        return self


class GatedEngine(SimulatedEngine):
    """A simulated engine whose steps wait, on the engine's own thread, until they are let through."""

    def __init__(self, options: SimulatedOptions = FAST) -> None:
        super().__init__(options)
        self._info = replace(self._info, is_brief=False)
        self.in_step = threading.Event()
        self.gate = threading.Event()

    def step(self) -> StepResult:
        self.in_step.set()
        assert self.gate.wait(GENEROUS_S)
        return super().step()


class CrashingEngine(SimulatedEngine):
    """A simulated engine whose step raises once it is told to."""

    broken = False

    def step(self) -> StepResult:
        if self.broken:
            raise RuntimeError("out of memory")
        return super().step()


def request(number: int, *, tokens: int = 9, max_tokens: int = 3, prefill_only: bool = False) -> EngineRequest:
    token_ids = np.arange(number * 20, number * 20 + tokens, dtype=np.uint32)
    local = local_block_hashes(token_ids, SIZE)
    return EngineRequest(
        key=AttemptKey(RequestId(f"r{number}"), 1),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        token_ids=token_ids,
        block_hashes=sequence_hashes(local),
        local_hashes=local,
        prefill_only=prefill_only,
    )


@asynccontextmanager
async def driving(
    engine: Engine, *, on_turn: Callable[[tuple[KvEvent, ...]], None] = lambda events: None, **options: Any
) -> AsyncIterator[EngineDriver]:
    driver = EngineDriver(engine, on_turn=on_turn, name="test", **options)
    driver.start()
    try:
        yield driver
    finally:
        if isinstance(engine, GatedEngine):
            engine.gate.set()
        await driver.aclose()


def _note(order: list[int], number: int, engine: Engine) -> None:
    order.append(number)


async def wait_in_step(engine: GatedEngine) -> None:
    assert await asyncio.to_thread(engine.in_step.wait, GENEROUS_S)


async def test_requests_are_run_to_their_end_and_give_their_blocks_back() -> None:
    async with driving(SimulatedEngine(FAST)) as driver:
        heard = [Heard() for _ in range(5)]
        for number, one in enumerate(heard):
            driver.submit(request(number, max_tokens=number + 1), one)
        for one in heard:
            await one.wait()

        assert [len(one.token_ids) for one in heard] == [1, 2, 3, 4, 5]
        assert all(one.outputs[-1].finish is FinishReason.LENGTH for one in heard)
        stats = await driver.call(lambda engine: engine.pool_stats())
        assert replace(stats, cached_blocks=0) == NOTHING_HELD


async def test_commands_are_applied_in_order_between_steps() -> None:
    engine = GatedEngine()
    async with driving(engine) as driver:
        driver.submit(request(1), Heard())
        await wait_in_step(engine)
        order: list[int] = []
        for number in range(3):
            driver.post(partial(_note, order, number))
        asked = asyncio.ensure_future(driver.call(lambda _: tuple(order)))
        await asyncio.sleep(0)
        applied_during_the_step = tuple(order)
        engine.gate.set()

        assert await asked == (0, 1, 2)
        assert applied_during_the_step == ()


async def test_everything_touches_the_engine_on_one_thread() -> None:
    async with driving(GatedEngine()) as driver:
        threads = {await driver.call(lambda _: threading.get_ident()) for _ in range(5)}

    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_brief_engine_is_called_on_the_loop_and_lets_others_run_between_turns() -> None:
    async with driving(SimulatedEngine(FAST)) as driver:
        thread = await driver.call(lambda _: threading.get_ident())
        heard = Heard()
        driver.submit(request(1, max_tokens=64), heard)
        turns_of_others = 0
        while not heard.over.is_set():
            await asyncio.sleep(0)
            turns_of_others += 1

    assert thread == threading.get_ident()
    assert turns_of_others > 64 // 8  # the steps of one turn


async def test_a_first_token_gets_to_its_client_before_the_next_step() -> None:
    order: list[str] = []

    class NotedEngine(SimulatedEngine):
        def step(self) -> StepResult:
            order.append("step")
            return super().step()

    class Relayed(Heard):
        """As in the mesh, where a frame, its reader and the request's own task stand between engine and client."""

        def output(self, output: Output) -> None:
            super().output(output)
            if len(self.outputs) == 1:
                relays.append(asyncio.ensure_future(self.relay()))

        async def relay(self) -> None:
            for _ in range(2):
                await asyncio.sleep(0)
            order.append("client")

    relays: list[asyncio.Future[None]] = []
    async with driving(NotedEngine(FAST)) as driver:
        heard = Relayed()
        driver.submit(request(1, max_tokens=5), heard)
        await heard.wait()

    assert order[:3] == ["step", "client", "step"]


async def test_commands_apply_while_modelled_time_passes() -> None:
    slow = replace(FAST, speedup=1.0, step_base_s=5.0)
    async with driving(SimulatedEngine(slow)) as driver:
        heard = Heard()
        driver.submit(request(1), heard)
        await driver.call(lambda engine: engine.pool_stats())  # the step's turn, or the one before
        async with asyncio.timeout(2.0):  # the step lasts 5 s
            pin = await driver.call(lambda engine: engine.pin_prefix(()))
            await driver.call(lambda engine: engine.unpin(pin.pin_id))

        assert heard.outputs == []


async def test_outputs_come_no_sooner_than_the_modelled_time() -> None:
    slow = replace(FAST, speedup=1.0, step_base_s=0.05, decode_s_per_sequence=0.0, decode_s_per_block=0.0)
    async with driving(SimulatedEngine(slow)) as driver:
        heard = Heard()
        began = asyncio.get_running_loop().time()
        driver.submit(request(1, max_tokens=4), heard)
        await heard.wait()

        assert asyncio.get_running_loop().time() - began >= 4 * 0.05 - 0.01


async def test_request_that_arrives_while_the_last_step_passes_is_run() -> None:
    # The turn that takes it in makes no step, and the step before left nothing to do: nobody else would wake the loop.
    slow = replace(FAST, speedup=1.0, step_base_s=0.2)
    async with driving(SimulatedEngine(slow)) as driver:
        first, second = Heard(), Heard()
        driver.submit(request(1, max_tokens=1), first)
        await driver.call(lambda engine: None)  # the turn of the first step is over, and its time passes
        driver.submit(request(2, max_tokens=1), second)

        await first.wait()
        await second.wait()

        assert len(second.token_ids) == 1


async def test_refused_request_hears_why_and_no_other_does() -> None:
    async with driving(SimulatedEngine(FAST)) as driver:
        good, bad = Heard(), Heard()
        driver.submit(replace(request(2), block_hashes=()), bad)
        driver.submit(request(1), good)
        await good.wait()
        await bad.wait()

    assert isinstance(bad.error, FixRequestError)
    assert good.error is None


async def test_key_that_is_running_is_refused_and_the_first_goes_on() -> None:
    engine = GatedEngine()
    async with driving(engine) as driver:
        first, second = Heard(), Heard()
        driver.submit(request(1), first)
        driver.submit(request(1), second)
        engine.gate.set()
        await first.wait()

    assert second.error is not None
    assert second.error.reason is Reason.ALREADY_EXISTS
    assert len(first.token_ids) == 3


async def test_cancelled_request_hears_nothing_more_and_frees_its_blocks() -> None:
    engine = GatedEngine()
    async with driving(engine) as driver:
        heard = Heard()
        driver.submit(request(1, max_tokens=50), heard)
        await wait_in_step(engine)
        driver.cancel(request(1).key)
        driver.cancel(request(1).key)
        engine.gate.set()

        stats = await driver.call(lambda engine: engine.pool_stats())

        assert replace(stats, cached_blocks=0) == NOTHING_HELD
        assert heard.outputs == []
        assert heard.error is None


async def test_request_under_a_cancelled_key_hears_only_its_own_output() -> None:
    engine = GatedEngine()
    async with driving(engine) as driver:
        first, second = Heard(), Heard()
        driver.submit(request(1, max_tokens=1), first)
        await wait_in_step(engine)
        driver.cancel(request(1).key)
        driver.submit(replace(request(2, max_tokens=2), key=request(1).key), second)
        engine.gate.set()
        await second.wait()

        alone = Heard()
        driver.submit(request(2, max_tokens=2), alone)
        await alone.wait()

    assert first.outputs == []
    assert second.token_ids == alone.token_ids


async def test_pin_of_a_prefill_that_was_cancelled_in_its_last_step_is_given_back() -> None:
    engine = GatedEngine()
    async with driving(engine) as driver:
        driver.submit(request(1, prefill_only=True), Heard())
        await wait_in_step(engine)
        driver.cancel(request(1).key)
        engine.gate.set()
        await driver.call(lambda engine: None)

        stats = await driver.call(lambda engine: engine.pool_stats())

    assert stats.pins == 0


async def test_what_a_cancelled_waiter_acquired_is_given_back() -> None:
    engine = GatedEngine()
    async with driving(engine) as driver:
        driver.submit(request(1, max_tokens=50), Heard())
        await wait_in_step(engine)
        pins: list[Pin] = []

        def pin(engine: Engine) -> Pin:
            pins.append(engine.pin_prefix(()))
            return pins[-1]

        waiting = asyncio.ensure_future(driver.acquire(pin, undo=lambda engine, held: engine.unpin(held.pin_id)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        engine.gate.set()
        await driver.call(lambda engine: None)
        stats = await driver.call(lambda engine: engine.pool_stats())

    assert waiting.cancelled()
    assert len(pins) == 1
    assert stats.pins == 0


async def test_failure_of_a_command_is_its_callers_alone() -> None:
    async with driving(SimulatedEngine(FAST)) as driver:
        with pytest.raises(MeshError) as caught:
            await driver.call(lambda engine: engine.unpin(99))
        driver.post(lambda engine: engine.unpin(99))
        heard = Heard()
        driver.submit(request(1), heard)
        await heard.wait()

    assert caught.value.reason is Reason.NOT_FOUND
    assert len(heard.token_ids) == 3


async def test_crash_fails_what_runs_and_refuses_what_comes() -> None:
    engine = CrashingEngine(replace(FAST, speedup=1.0, step_base_s=0.01))
    crashes: list[str] = []
    async with driving(engine, on_crash=lambda: crashes.append("told")) as driver:
        running, late = Heard(), Heard()
        driver.submit(request(1, max_tokens=100), running)
        await driver.call(lambda engine: setattr(engine, "broken", True))
        await running.wait()
        driver.submit(request(2), late)
        with pytest.raises(TryElsewhereError) as caught:
            async with asyncio.timeout(GENEROUS_S):
                await driver.call(lambda engine: engine.pool_stats())
        driver.post(lambda engine: engine.unpin(1))

    assert running.error is not None
    assert running.error.reason is Reason.WORKER_LOST
    assert late.error is not None
    assert late.error.reason is Reason.WORKER_LOST
    assert caught.value.reason is Reason.WORKER_LOST
    assert isinstance(driver.crash, RuntimeError)
    assert crashes == ["told"]


async def test_listener_that_raises_ends_the_engine_and_not_in_silence() -> None:
    class Broken(Heard):
        def output(self, output: Output) -> None:
            raise KeyError("no such thing")

    async with driving(SimulatedEngine(replace(FAST, speedup=1.0, step_base_s=0.01))) as driver:
        other = Heard()
        driver.submit(request(2, max_tokens=100), other)
        driver.submit(request(1), Broken())
        await other.wait()

    assert other.error is not None
    assert other.error.reason is Reason.WORKER_LOST


async def test_close_fails_what_runs_and_what_waits() -> None:
    engine = GatedEngine()
    driver = EngineDriver(engine, on_turn=lambda events: None, name="test")
    driver.start()
    running = Heard()
    driver.submit(request(1), running)
    await wait_in_step(engine)
    waiting = asyncio.ensure_future(driver.call(lambda engine: engine.pool_stats()))
    await asyncio.sleep(0)

    closing = asyncio.ensure_future(driver.aclose())
    await running.wait()
    with pytest.raises(TryElsewhereError) as caught:
        await waiting
    engine.gate.set()
    await closing
    await driver.aclose()
    late = Heard()
    driver.submit(request(2), late)

    assert running.error is not None
    assert running.error.reason is Reason.WORKER_LOST
    assert caught.value.reason is Reason.WORKER_LOST
    assert late.error is not None
    with pytest.raises(TryElsewhereError):
        await driver.call(lambda engine: None)


async def test_close_does_not_wait_for_modelled_time() -> None:
    driver = EngineDriver(
        SimulatedEngine(replace(FAST, speedup=1.0, step_base_s=50.0)), on_turn=lambda events: None, name="test"
    )
    driver.start()
    heard = Heard()
    driver.submit(request(1), heard)
    await driver.call(lambda engine: None)

    async with asyncio.timeout(5.0):
        await driver.aclose()

    assert heard.error is not None


async def test_kv_events_and_load_are_told_after_the_turn_that_made_them() -> None:
    events: list[KvEvent] = []
    loads: list[int] = []

    def on_turn(kv_events: tuple[KvEvent, ...]) -> None:
        events.extend(kv_events)
        loads.append(driver.load.active_requests)

    async with driving(SimulatedEngine(FAST), on_turn=on_turn) as driver:
        heard = Heard()
        driver.submit(request(1), heard)
        await heard.wait()
        await driver.call(lambda engine: None)

    stored = [block for event in events for block in getattr(event, "block_hashes", ())]
    assert stored[:2] == list(request(1).block_hashes[:2])
    assert 1 in loads
    assert loads[-1] == 0


async def test_words_of_a_text_engine_pass_through() -> None:
    async with driving(EchoEngine(node_name="n")) as driver:
        heard = Heard()
        key = AttemptKey(RequestId("r"), 1)
        driver.submit(EngineRequest(key=key, sampling=Sampling(max_tokens=9), text="one two"), heard)
        await heard.wait()

    assert [word for output in heard.outputs for word in output.words] == ["one ", "two_GeneratedBy_n"]
