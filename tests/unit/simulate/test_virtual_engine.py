"""The virtual engine: closed forms where they are known, and step by step beside the engine that it stands for."""

import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import AttemptKey, RequestId, SequenceHash
from kvmesh.core.kv_events import BlocksRemoved
from kvmesh.core.step_cost import StepCost, StepTimes
from kvmesh.engines.engine import EngineRequest, Sampling
from kvmesh.engines.simulated import SimulatedEngine
from kvmesh.engines.simulated_options import SimulatedOptions
from kvmesh.simulate.engine import EngineLimits, VirtualEngine
from kvmesh.simulate.prompts import OutputHashes
from kvmesh.simulate.request import VirtualRequest

SIZE = 4
Tokens = npt.NDArray[np.uint32]
COST = StepCost(base_s=1.0, decode_s_per_sequence=0.0, decode_s_per_block=0.0, prefill_tokens_per_s=10.0)
"""A decode step takes 1 s, a prefill 1 s and 0.1 s per token."""


def make(cost: StepTimes = COST, *, blocks: int = 64, **limits: int) -> VirtualEngine:
    return VirtualEngine(EngineLimits(total_blocks=blocks, block_size=SIZE, **limits), cost, new_hash=OutputHashes())


def prompt(number: int, tokens: int, *, output: int, shared_blocks: int = 0) -> VirtualRequest:
    """A prompt whose first blocks are those of every other."""
    hashes = [
        SequenceHash(index + 1 if index < shared_blocks else 1000 * (number + 1) + index)
        for index in range(tokens // SIZE)
    ]
    return VirtualRequest(number, tokens, output, hashes)


@dataclass
class Played:
    first_s: dict[int, float]
    end_s: dict[int, float]
    cached: dict[int, int]
    removed: int


def play(engine: VirtualEngine, arrivals: list[tuple[float, VirtualRequest]]) -> Played:
    """Run until nothing is left; an arrival at the end of a step joins the next one."""
    first_s: dict[int, float] = {}
    end_s: dict[int, float] = {}
    cached: dict[int, int] = {}
    coming = list(arrivals)
    now, end, removed = 0.0, None, 0
    while coming or end is not None:
        if end is None or (coming and coming[0][0] < end):
            now, request = coming.pop(0)
            engine.add(request)
            end = engine.plan(now) if end is None else engine.cut(now)
            continue
        now = end
        finished = engine.finish()
        removed += sum(len(event.block_hashes) for event in finished.events if isinstance(event, BlocksRemoved))
        for request in finished.prefilled:
            first_s.setdefault(request.number, now)
        for request in finished.ended:
            end_s[request.number] = now
            cached[request.number] = request.cached_tokens or 0
        while coming and coming[0][0] <= now:
            engine.add(coming.pop(0)[1])
        end = engine.plan(now)
    engine.pool.check_integrity()
    assert engine.pool.active_blocks == 0
    return Played(first_s, end_s, cached, removed)


def test_a_request_alone_takes_its_prefill_and_a_step_per_further_token() -> None:
    played = play(make(), [(0.0, prompt(0, 10, output=5))])

    assert played.first_s == {0: pytest.approx(1 + 1.0)}
    assert played.end_s == {0: pytest.approx(2.0 + 4 * 1.0)}


def test_a_prompt_longer_than_a_step_is_computed_in_chunks() -> None:
    played = play(make(max_batched_tokens=8), [(0.0, prompt(0, 20, output=1))])

    assert played.end_s == {0: pytest.approx(3 * 1.0 + 20 * 0.1)}


def test_two_prompts_share_a_step_and_both_have_their_token_at_its_end() -> None:
    engine = make()
    engine.add(prompt(0, 10, output=1))
    engine.add(prompt(1, 20, output=1))

    end_s = engine.plan(0.0)

    assert end_s == pytest.approx(1 + 30 * 0.1)
    assert [request.number for request in engine.finish().ended] == [0, 1]


def test_an_arrival_joins_after_the_step_in_progress_and_slows_who_decodes() -> None:
    # request 0: first token at 1.4 s, then steps that end at 2.4 and 3.4; request 1 comes during the second
    played = play(make(), [(0.0, prompt(0, 4, output=12)), (2.9, prompt(1, 10, output=1))])

    assert played.first_s[1] == pytest.approx(3.4 + 2.0)
    assert played.end_s[0] == pytest.approx(1.4 + 11 * 1.0 + 1.0)


def test_no_more_requests_run_than_there_are_slots() -> None:
    played = play(make(max_sequences=1), [(0.0, prompt(0, 4, output=3)), (0.0, prompt(1, 4, output=1))])

    assert played.first_s == {0: pytest.approx(1.4), 1: pytest.approx(3.4 + 1.4)}


def test_a_cached_prefix_is_not_computed_again_but_for_one_token_at_least() -> None:
    engine = make()

    played = play(
        engine, [(0.0, prompt(0, 12, output=1, shared_blocks=3)), (9.0, prompt(1, 12, output=1, shared_blocks=3))]
    )

    assert played.cached == {0: 0, 1: 8}
    assert played.end_s[1] == pytest.approx(9.0 + 1 + 4 * 0.1)
    assert engine.totals.uncached_tokens == 12 + 4


@pytest.mark.parametrize(
    ("blocks", "cached", "is_evicting"),
    [
        pytest.param(10, {0: 0, 1: 0, 2: 0, 3: 8, 4: 8}, False, id="there is room for all"),
        pytest.param(6, {0: 0, 1: 0, 2: 0, 3: 8, 4: 0}, True, id="the one that was used longest ago is gone"),
    ],
)
def test_the_least_recently_used_blocks_are_evicted(blocks: int, cached: dict[int, int], is_evicting: bool) -> None:
    same = {3: 1, 4: 0}  # the fourth prompt is the second one again, the fifth the first
    arrivals = [
        (10.0 * number, VirtualRequest(number, 12, 1, prompt(same.get(number, number), 12, output=1).hashes))
        for number in range(5)
    ]

    played = play(make(blocks=blocks), arrivals)

    assert played.cached == cached
    assert bool(played.removed) is is_evicting


def test_output_blocks_fill_the_cache_too() -> None:
    engine = make()

    play(engine, [(0.0, prompt(0, 4, output=9))])

    assert engine.pool.cached_blocks == 3


def test_a_full_pool_preempts_the_youngest_and_everyone_ends_all_the_same() -> None:
    engine = make(blocks=8)

    played = play(engine, [(0.0, prompt(0, 12, output=12)), (0.5, prompt(1, 12, output=12))])

    assert engine.totals.preempted > 0
    assert played.end_s[0] < played.end_s[1]


def test_gaps_count_every_token_but_the_first_ones() -> None:
    engine = make()

    play(engine, [(0.0, prompt(0, 10, output=7)), (1.5, prompt(1, 9, output=30)), (2.5, prompt(2, 6, output=1))])

    assert sum(engine.totals.gap_counts) == 6 + 29


@pytest.mark.parametrize("seed", range(8))
def test_it_takes_the_same_time_as_the_simulated_engine_step_by_step(seed: int) -> None:
    rng = random.Random(seed)
    cost = StepCost(base_s=0.5, decode_s_per_sequence=0.03, decode_s_per_block=0.02, prefill_tokens_per_s=40.0)
    bases = [np.array([rng.randrange(400) for _ in range(60)], dtype=np.uint32) for _ in range(4)]
    jobs = []
    at = 0.0
    for _ in range(30):
        at += rng.expovariate(0.3)
        tokens = np.concatenate([rng.choice(bases)[: rng.randrange(60)], [rng.randrange(400) for _ in range(9)]])
        jobs.append((at, tokens.astype(np.uint32), rng.randrange(1, 25)))

    expected = step_by_step(jobs, cost, blocks=1000, step_tokens=24)
    virtual = play(
        make(cost, blocks=1000, max_batched_tokens=24),
        [
            (at, VirtualRequest(number, len(tokens), output, list(hashes_of(tokens))))
            for number, (at, tokens, output) in enumerate(jobs)
        ],
    )

    assert virtual.cached == expected.cached
    assert virtual.first_s == pytest.approx(expected.first_s)
    assert virtual.end_s == pytest.approx(expected.end_s)


def hashes_of(tokens: Tokens) -> tuple[SequenceHash, ...]:
    return tuple(sequence_hashes(local_block_hashes(tokens, SIZE)))


def step_by_step(jobs: list[tuple[float, Tokens, int]], cost: StepCost, *, blocks: int, step_tokens: int) -> Played:
    """The same requests through the real engine, whose steps end when their modelled time is over."""
    engine = SimulatedEngine(
        SimulatedOptions(
            total_blocks=blocks,
            block_size=SIZE,
            vocab_size=500,
            step_base_s=cost.base_s,
            decode_s_per_sequence=cost.decode_s_per_sequence,
            decode_s_per_block=cost.decode_s_per_block,
            prefill_tokens_per_s=cost.prefill_tokens_per_s,
            max_batched_tokens=step_tokens,
        )
    )
    first_s: dict[int, float] = {}
    end_s: dict[int, float] = {}
    cached: dict[int, int] = defaultdict(int)
    coming = list(enumerate(jobs))
    now = 0.0
    while coming or engine.has_work():
        if not engine.has_work():
            now = max(now, coming[0][1][0])
        while coming and coming[0][1][0] <= now:
            number, (_, tokens, output) = coming.pop(0)
            locals_ = local_block_hashes(tokens, SIZE)
            engine.submit(
                EngineRequest(
                    AttemptKey(RequestId(str(number)), 1),
                    Sampling(max_tokens=output),
                    token_ids=tokens,
                    block_hashes=tuple(sequence_hashes(locals_)),
                    local_hashes=tuple(locals_),
                )
            )
        step = engine.step()
        now += step.duration_s
        for said in step.outputs:
            number = int(said.key.request_id)
            if said.prefill_done:
                first_s[number] = now
                cached[number] = said.cached_tokens or 0
            if said.finish is not None:
                end_s[number] = now
    return Played(first_s, end_s, dict(cached), 0)
