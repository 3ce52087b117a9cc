"""The simulated engine's batches, times and books; what it shares with every KV engine is in tests/contract."""

import time
from typing import Any

import numpy as np
import pytest

from kvmesh.core.errors import BackOffError, FixRequestError, Reason
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import CacheCleared, EngineRequest, FinishReason, Sampling
from kvmesh.engines.simulated import SimulatedEngine
from kvmesh.engines.simulated_options import SimulatedOptions, parse
from kvmesh.testing.engine_contract import NOTHING_HELD, attempt, held, prompt_tokens, run_all, token_request

SIZE = 4


def make(**changes: Any) -> SimulatedEngine:
    return SimulatedEngine(
        SimulatedOptions(**{"total_blocks": 64, "block_size": SIZE, "vocab_size": 500, "speedup": 0.0, **changes})
    )


def make_request(engine: SimulatedEngine, number: int, *, prompt: int = 10, **changes: Any) -> EngineRequest:
    tokens = prompt_tokens(number, prompt, vocab_size=engine.info.vocab_size)
    return token_request(engine.info, number, tokens, **changes)


def test_defaults_are_in_the_range_of_a_production_engine() -> None:
    info = SimulatedEngine().info

    assert (info.total_blocks, info.block_size, info.max_sequences) == (16_384, 64, 256)
    assert info.layout is not None
    assert info.layout.bytes_per_block == 64


def test_long_prompt_is_computed_in_chunks_beside_decoding_requests() -> None:
    engine = make(max_batched_tokens=8)
    engine.submit(make_request(engine, 1, prompt=5, max_tokens=10))
    engine.step()
    engine.submit(make_request(engine, 2, prompt=20, max_tokens=1))

    steps = [engine.step().outputs for _ in range(3)]

    # 7 of 8 tokens are left beside the decoding request: 20 take three steps
    assert [[output.key for output in outputs] for outputs in steps] == [
        [attempt(1)],
        [attempt(1)],
        [attempt(1), attempt(2)],
    ]


def test_blocks_of_a_chunk_are_cached_before_the_prompt_is_whole() -> None:
    engine = make(max_batched_tokens=8)
    request = make_request(engine, 1, prompt=20)
    engine.submit(request)
    engine.step()

    assert engine.cached_blocks(request.block_hashes) == 2


def test_request_holds_the_blocks_of_its_prompt_from_its_first_chunk_on() -> None:
    engine = make(max_batched_tokens=8)
    engine.submit(make_request(engine, 1, prompt=20))
    engine.step()

    assert engine.load().active_blocks == 5


def test_decoding_takes_a_block_when_the_last_one_is_full() -> None:
    engine = make()
    engine.submit(make_request(engine, 1, prompt=SIZE, max_tokens=7))
    active, cached = [], []
    while engine.has_work():
        engine.step()
        active.append(engine.load().active_blocks)
        cached.append(engine.pool_stats().cached_blocks)

    # the first token comes with the prompt, its KV one step later: tokens 1-4 fill block 2, token 5 begins block 3
    assert active == [1, 2, 2, 2, 2, 3, 0]
    assert cached == [1, 1, 1, 1, 2, 2, 2]


def test_step_time_grows_with_the_batch_and_the_prompt() -> None:
    engine = make(
        speedup=2.0, step_base_s=1.0, decode_s_per_sequence=0.1, decode_s_per_block=0.01, prefill_tokens_per_s=10.0
    )
    engine.submit(make_request(engine, 1, prompt=10, max_tokens=10))
    prefill = engine.step()
    decode = engine.step()
    engine.submit(make_request(engine, 2, prompt=5, max_tokens=10))
    both = engine.step()
    decode_two = engine.step()

    assert prefill.duration_s == pytest.approx((1.0 + 10 / 10) / 2)
    assert decode.duration_s == pytest.approx((1.0 + 0.1 + 3 * 0.01) / 2)
    assert both.duration_s == pytest.approx((1.0 + 0.1 + 3 * 0.01 + 5 / 10) / 2)
    assert decode_two.duration_s == pytest.approx((1.0 + 2 * 0.1 + (4 + 2) * 0.01) / 2)


def test_cached_tokens_cost_no_time() -> None:
    engine = make(speedup=1.0, step_base_s=0.0, prefill_tokens_per_s=1.0)
    engine.submit(make_request(engine, 1, prompt=10, max_tokens=1))
    first = engine.step().duration_s
    engine.submit(make_request(engine, 1, prompt=10, max_tokens=1))

    assert (first, engine.step().duration_s) == (10.0, 2.0)


def test_speedup_0_takes_no_modelled_time() -> None:
    engine = make(speedup=0.0)
    engine.submit(make_request(engine, 1))

    assert engine.step().duration_s == 0.0


def test_output_stays_within_the_given_ids() -> None:
    engine = SimulatedEngine(parse({"output_token_ids": "65-90", "speedup": "0", "vocab_size": "256"}))
    engine.submit(make_request(engine, 1, max_tokens=600))

    answer = run_all(engine).answers[attempt(1)]

    assert set(answer.token_ids) == set(range(65, 91))


def test_sequence_that_ends_by_itself_ends_with_its_end_token() -> None:
    engine = make(eos_token_ids=(7, 8), eos_rate=0.05)
    for number in range(20):
        sampling = Sampling(max_tokens=1_000 // 5, seed=number)
        engine.submit(make_request(engine, number, sampling=sampling))

    answers = run_all(engine).answers.values()
    stopped = [answer for answer in answers if answer.finish is FinishReason.STOP]

    assert len(stopped) > 10
    assert all(answer.token_ids[-1] == 7 and 7 not in answer.token_ids[:-1] for answer in stopped)


def test_ignored_end_tokens_do_not_end_a_sequence() -> None:
    engine = make(eos_token_ids=(7,), eos_rate=1.0)
    for number, ignore_eos in ((1, True), (2, False)):
        engine.submit(make_request(engine, number, sampling=Sampling(max_tokens=5, ignore_eos=ignore_eos)))

    answers = run_all(engine).answers

    assert (answers[attempt(1)].produced, answers[attempt(1)].finish) == (5, FinishReason.LENGTH)
    assert (answers[attempt(2)].token_ids, answers[attempt(2)].finish) == ([7], FinishReason.STOP)


def test_context_is_bounded_by_the_option_and_by_the_pool() -> None:
    assert make(max_context_tokens=100).info.max_context_tokens == 100
    assert make(max_context_tokens=1_000).info.max_context_tokens == 64 * SIZE


def test_output_ends_where_the_context_does() -> None:
    engine = make(max_context_tokens=12)
    engine.submit(make_request(engine, 1, prompt=10, max_tokens=100))
    answer = run_all(engine).answers[attempt(1)]

    assert (answer.produced, answer.finish) == (2, FinishReason.LENGTH)


def test_one_request_may_fill_the_whole_pool() -> None:
    engine = make(total_blocks=3)
    engine.submit(make_request(engine, 1, prompt=1, max_tokens=100))

    run = run_all(engine)

    assert (run.answers[attempt(1)].produced, run.preempted) == (3 * SIZE - 1, 0)
    assert held(engine) == NOTHING_HELD


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param({"token_ids": np.full(10, 500, dtype=np.uint32)}, "token_ids", id="beyond the vocabulary"),
        pytest.param({"sampling": Sampling(max_tokens=0)}, "sampling.max_tokens", id="no output"),
        pytest.param({"block_hashes": ()}, "block_hashes", id="no hashes"),
        pytest.param({"local_hashes": (1, 2, 3)}, "local_hashes", id="hashes of another prompt"),
    ],
)
def test_request_that_can_never_run_is_refused(changes: dict[str, Any], field: str) -> None:
    engine = make()

    with pytest.raises(FixRequestError) as caught:
        engine.submit(make_request(engine, 1, prompt=10, **changes))

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)
    assert not engine.has_work()


def test_prompt_that_leaves_no_room_is_refused() -> None:
    engine = make(max_context_tokens=10)

    with pytest.raises(FixRequestError) as caught:
        engine.submit(make_request(engine, 1, prompt=10))

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "token_ids")


def test_generated_blocks_are_named_like_the_prompt_of_the_next_turn() -> None:
    engine = make()
    request = make_request(engine, 1, prompt=2, max_tokens=9, lora="a", cache_namespace="b")
    engine.submit(request)
    run = run_all(engine)
    tokens = np.array([*prompt_tokens(1, 2, vocab_size=500), *run.answers[attempt(1)].token_ids], dtype=np.uint32)
    local = local_block_hashes(tokens[:8], SIZE, lora="a", cache_namespace="b")

    (event,) = run.kv_events[:1]

    assert getattr(event, "parent", "none") is None
    assert engine.cached_blocks(sequence_hashes(local)) == 2
    assert [h for e in run.kv_events for h in getattr(e, "block_hashes", ())] == list(sequence_hashes(local))
    assert [h for e in run.kv_events for h in getattr(e, "local_hashes", ())] == list(local)


def test_block_memory_is_its_hash_over_and_over() -> None:
    engine = make(block_bytes=24)
    request = make_request(engine, 1, prompt=2 * SIZE)
    engine.submit(request)
    run_all(engine)
    pin = engine.pin_prefix(request.block_hashes)
    memory = engine.kv_memory()

    assert memory is not None
    for block, block_hash in zip(pin.block_ids, request.block_hashes, strict=True):
        assert memory[block].tobytes() == block_hash.to_bytes(8, "little") * 3


def test_import_is_blank_even_where_the_right_bytes_lay_before() -> None:
    engine = make(total_blocks=2)
    request = make_request(engine, 1, prompt=SIZE + 1, max_tokens=1)
    engine.submit(request)
    run_all(engine)
    engine.clear_cache()
    memory = engine.kv_memory()
    assert memory is not None

    opened = engine.begin_import(request.block_hashes, first_block=0)

    assert not memory[list(opened.block_ids)].any()


def test_imports_leave_a_block_so_that_what_they_are_for_can_run() -> None:
    engine = make(total_blocks=8)
    chains = [sequence_hashes(range(10 * number + 1, 10 * number + 5)) for number in range(2)]
    engine.begin_import(chains[0], first_block=0)

    with pytest.raises(BackOffError) as caught:
        engine.begin_import(chains[1], first_block=0)

    assert caught.value.reason is Reason.OVERLOADED
    assert len(engine.begin_import(chains[1][:3], first_block=0).block_ids) == 3


def test_request_whose_blocks_are_pinned_passes_one_that_waits_for_its_unpin() -> None:
    engine = make(total_blocks=8)
    large, small = make_request(engine, 1, prompt=7 * SIZE), make_request(engine, 2, prompt=6 * SIZE + 1, max_tokens=2)
    engine.submit(make_request(engine, 2, prompt=6 * SIZE + 1, prefill_only=True))
    pin = run_all(engine).answers[attempt(2)].outputs[-1].pin
    assert pin is not None
    engine.submit(large)
    engine.submit(small)

    passed = run_all(engine)
    engine.unpin(pin.pin_id)
    then = run_all(engine)

    assert set(passed.answers) == {small.key}
    assert set(then.answers) == {large.key}
    assert held(engine) == NOTHING_HELD


def test_youngest_is_preempted_and_the_oldest_ends_first() -> None:
    engine = make(total_blocks=6, max_sequences=2)
    for number in (1, 2):
        engine.submit(make_request(engine, number, prompt=SIZE, max_tokens=4 * SIZE))
    finished = []
    preempted = 0
    while engine.has_work():
        result = engine.step()
        engine.check_integrity()
        preempted += result.preempted
        finished += [output.key for output in result.outputs if output.finish]

    assert preempted >= 1
    assert finished == [attempt(1), attempt(2)]


def test_cleared_cache_is_an_event_and_the_next_prompt_computes_all() -> None:
    engine = make()
    engine.submit(make_request(engine, 1))
    run_all(engine)
    engine.clear_cache()
    events = engine.drain_kv_events()
    engine.submit(make_request(engine, 1))

    assert events == (CacheCleared(),)
    assert run_all(engine).answers[attempt(1)].prompt_output.cached_tokens == 0


def test_closing_gives_every_block_of_a_request_back() -> None:
    engine = make(max_sequences=2, max_batched_tokens=12)
    for number in range(4):
        engine.submit(make_request(engine, number, prompt=10))
    engine.step()
    engine.close()

    assert held(engine) == NOTHING_HELD
    assert not engine.has_work()


@pytest.mark.parametrize("seed", range(6))
def test_books_balance_at_every_step_of_a_random_life(seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine = make(
        total_blocks=int(rng.integers(12, 30)), block_size=int(rng.choice([1, 2, 4])), max_sequences=4,
        max_batched_tokens=int(rng.integers(4, 20)), eos_token_ids=(1,), eos_rate=0.05,
    )  # fmt: skip
    room = engine.info.max_context_tokens
    pins: list[int] = []
    imports: list[int] = []
    for number in range(150):
        prompt = np.resize(rng.integers(2, 4, size=3), int(rng.integers(1, room // 2))).astype(np.uint32)
        sampling = Sampling(max_tokens=int(rng.integers(1, room)))
        request = token_request(engine.info, number, prompt, sampling=sampling, prefill_only=bool(rng.random() < 0.2))
        engine.submit(request)
        if rng.random() < 0.4:
            engine.cancel(attempt(int(rng.integers(0, number + 1))))
        if rng.random() < 0.2:
            pins.append(engine.pin_prefix(request.block_hashes).pin_id)
        if rng.random() < 0.2:
            try:
                imports.append(engine.begin_import((SequenceHash(number + 1),), first_block=0).import_id)
            except BackOffError:
                engine.check_integrity()
        for _ in range(int(rng.integers(0, 4))):
            outputs = engine.step().outputs
            pins += [output.pin.pin_id for output in outputs if output.pin is not None]
            engine.check_integrity()
        while len(pins) > 2:
            engine.unpin(pins.pop(0))
        while len(imports) > 1:
            engine.abort_import(imports.pop(0))
    for pin_id in pins:
        engine.unpin(pin_id)
    for import_id in imports:
        engine.abort_import(import_id)
    while engine.has_work():
        for pin in [output.pin for output in engine.step().outputs if output.pin is not None]:
            engine.unpin(pin.pin_id)

    engine.check_integrity()
    assert held(engine) == NOTHING_HELD
    assert engine.load().waiting_requests == engine.load().active_requests == 0


def test_decode_steps_of_64_requests_stay_cheap() -> None:
    engine = make(total_blocks=16_384, block_size=64, vocab_size=32_000)
    for number in range(64):
        engine.submit(make_request(engine, number, prompt=500, max_tokens=400))
    for _ in range(10):
        engine.step()

    started_at = time.perf_counter()
    for _ in range(300):
        engine.step()
    step_s = (time.perf_counter() - started_at) / 300

    assert step_s < 2e-3  # about 50 us on an idle machine: the bound catches only a change of order
