"""Random worlds of workers, caches and bookings: both routers choose alike and say the same of every worker.

Costs are distinct: where our two least are equal, a selection is left out and a reservation is pinned to what we drew.
No prompt is cached to its last token, for the two sides count the overlap of such a prompt differently; see
test_oracle_differences.py.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kvmesh.core.candidates import CostOverrides, RoutingHints, RoutingQuery, Selection
from kvmesh.core.errors import TryElsewhereError
from kvmesh.core.hashing import local_block_hashes
from kvmesh.core.ids import AttemptKey, Epoch, LocalHash, RequestId, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.index_port import IndexMode
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore, RoutingRules

Ask = Callable[[str, list[Any]], list[Any]]

BATCHES, BATCH = 2, 15
PHASES, STEPS = 5, 36
"""Caches change between phases; a phase has so many steps."""
SELECTIONS = 2_000
"""At least so many, over all batches."""
REFUSED = "refused"
EPOCH = Epoch(1)
LABELS = ("big", "near")
STEP_KINDS = (
    ["select"] * 10
    + ["reserve"] * 4
    + ["prefill_complete"] * 2
    + ["release"] * 2
    + ["output_block", "overlaps", "loads", "loads"]
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as both sides are asked about it."""

    tokens: tuple[int, ...]
    block_size: int
    lora: str | None
    cache_namespace: str | None
    local: tuple[int, ...]
    blocks: PromptBlocks

    @staticmethod
    def of(tokens: tuple[int, ...], block_size: int, lora: str | None, cache_namespace: str | None) -> "Prompt":
        array = np.array(tokens, dtype=np.uint32)
        local = local_block_hashes(array, block_size, lora=lora, cache_namespace=cache_namespace)
        blocks = PromptBlocks.of_tokens(array, block_size, lora=lora, cache_namespace=cache_namespace)
        return Prompt(tokens, block_size, lora, cache_namespace, local, blocks)

    @property
    def cacheable(self) -> int:
        """Blocks of it that may be cached and still leave a token to compute."""
        return (len(self.tokens) - 1) // self.block_size

    def for_us(self, **hints: Any) -> RoutingQuery:
        return RoutingQuery(
            model="m",
            prompt_tokens=len(self.tokens),
            block_hashes={self.block_size: self.blocks},
            lora=self.lora,
            cache_namespace=self.cache_namespace,
            hints=RoutingHints(**hints),
        )

    def for_peer(self) -> dict[str, Any]:
        return {
            "model_name": "m",
            "token_ids": list(self.tokens),
            "lora_name": self.lora,
            "cache_salt": self.cache_namespace,
        }


@dataclass
class World:
    """One world, lived through by our router while it is written down for the oracle's."""

    rng: random.Random
    approximate: bool = False
    """Caches are known by what was routed to them, not by events."""
    steps: list[list[Any]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    """Ours, one per step."""
    selections: int = 0
    """Answers that are a choice of several, by cost."""
    held: dict[WorkerRank, set[tuple[SequenceHash, ...]]] = field(default_factory=dict)
    """What each rank has cached: its blocks, each by the sequence hashes up to it."""
    booked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.block_size = rng.choice((4, 16, 64))
        self.knobs = {
            "overlap_credit": rng.choice((0.0, 0.5, 1.0, 1.0, 1.5, rng.random() * 3)),
            "prefill_scale": rng.choice((0.0, 0.7, 1.0, 1.0, 2.0)),
            "request_weight": rng.choice((0.0, 0.0, 3.0, 32.0)),
        }
        self.by_request = rng.random() < 0.5
        """Our knobs come with each request; the policy's own are the default ones."""
        self.locals_known = rng.random() < 0.7
        """KV events come with local hashes."""
        knobs = CostKnobs() if self.by_request else CostKnobs(**self.knobs)
        mode = IndexMode.APPROXIMATE if self.approximate else IndexMode.EVENTS
        self.router = RoutingCore(
            RouterId("ours"), policy=KvAware(knobs), rng=random.Random(1), rules=RoutingRules(index_mode=mode)
        )
        self.workers = [self.add_worker(number) for number in range(1, rng.randint(3, 9))]
        self.prompts = list(self.write_prompts())
        self.live()

    def for_peer(self) -> dict[str, Any]:
        return {
            "workers": self.workers,
            "knobs": self.knobs,
            "events": not self.approximate,
            "steps": self.steps,
        }

    def add_worker(self, number: int) -> dict[str, Any]:
        ranks = self.rng.choice((1, 1, 1, 2, 3))
        labels = [label for label in LABELS if self.rng.random() < 0.5]
        record = WorkerRecord(
            worker_id=WorkerId(str(number)),
            epoch=EPOCH,
            models=("m",),
            block_size=self.block_size,
            ranks=ranks,
            labels=dict.fromkeys(labels, "yes"),
        )
        self.router.put_worker(record, now=0)
        self.held |= {worker: set() for worker in record.worker_ranks}
        return {"worker": number, "ranks": ranks, "labels": labels, "block_size": self.block_size}

    def write_prompts(self) -> Iterator[Prompt]:
        """Prompts that share beginnings, of any length."""
        rng, size = self.rng, self.block_size
        beginnings = [tuple(rng.choices(range(32_000), k=10 * size)) for _ in range(3)]
        for _ in range(14):
            beginning = rng.choice(beginnings)[: rng.randint(0, 10) * size]
            length = rng.randint(1, 4 * size)
            if self.approximate and length % size == 0:
                length += 1
            ending = tuple(rng.choices(range(32_000), k=length))
            lora, namespace = rng.choice((None, None, None, "adapter")), rng.choice((None, None, None, "tenant"))
            yield Prompt.of(beginning + ending, size, lora, namespace)

    def live(self) -> None:
        for worker in sorted(self.held):
            for _ in range(self.rng.randint(1, 3)):
                self.reserve_on(worker, self.rng.choice(self.prompts))
        for _ in range(PHASES):
            if not self.approximate:
                self.note(["events", [event for _ in range(self.rng.randint(1, 12)) for event in self.change_cache()]])
            for _ in range(STEPS):
                self.step()

    def step(self) -> None:
        kind = self.rng.choice(STEP_KINDS)
        if kind == "select":
            self.select()
        elif kind == "reserve":
            self.reserve()
        elif kind in ("overlaps", "loads"):
            self.look(kind)
        elif self.booked:
            self.progress(kind, self.rng.choice(self.booked))

    def note(self, step: list[Any], answer: Any = None) -> None:
        self.steps.append(step)
        self.answers.append(answer)

    def change_cache(self) -> Iterator[list[Any]]:
        """Change what one rank has cached, and yield the events of it."""
        kind = self.rng.choice(("store", "store", "store", "remove", "clear"))
        worker = self.rng.choice(sorted(self.held))
        owner, held = (int(worker.worker_id), worker.rank), self.held[worker]
        if kind == "store":
            prompt = self.rng.choice(self.prompts)
            count = self.rng.randint(0, prompt.cacheable)
            blocks = tuple(prompt.blocks)[:count]
            held.update(blocks[: end + 1] for end in range(count))
            local = [LocalHash(value) for value in prompt.local[:count]] if self.locals_known else None
            self.router.apply_kv_stored(worker, EPOCH, parent=None, block_hashes=blocks, local_hashes=local, now=0)
            yield ["store", *owner, None, list(blocks), list(prompt.local[:count])]
        elif kind == "remove":
            leaves = sorted(chain for chain in held if not any(other[:-1] == chain for other in held))
            for chain in leaves[: self.rng.randint(1, 3)]:
                held.remove(chain)
                self.router.apply_kv_removed(worker, EPOCH, block_hashes=chain[-1:], now=0)
                yield ["remove", *owner, [chain[-1]]]
        else:
            held.clear()
            self.router.apply_kv_cleared(worker, EPOCH, now=0)
            yield ["clear", *owner]

    def select(self) -> None:
        prompt, ours, theirs = self.request()
        try:
            selection = self.router.select(prompt.for_us(**ours), now=0)
        except TryElsewhereError:
            self.note(["select", theirs], REFUSED)
            return
        if not is_tie(selection):
            self.selections += len(selection.candidates) > 1
            self.note(["select", theirs], chosen(prompt, selection.worker, selection.overlap_blocks))

    def reserve(self) -> None:
        prompt, ours, theirs = self.request()
        try:
            what_if = self.router.select(prompt.for_us(**ours), now=0)
        except TryElsewhereError:
            return
        if is_tie(what_if):
            self.reserve_on(self.rng.choice(sorted(self.held)), prompt)
        else:
            self.book(prompt, ours, theirs)

    def reserve_on(self, worker: WorkerRank, prompt: Prompt) -> None:
        pin = {"worker_id": int(worker.worker_id), "dp_rank": worker.rank}
        ours = {"pinned_worker": worker.worker_id, "pinned_rank": worker.rank}
        self.book(prompt, ours, prompt.for_peer() | {"pinned_worker": pin})

    def book(self, prompt: Prompt, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        name = f"booking {len(self.steps)}"
        reservation = self.router.reserve(AttemptKey(RequestId(name), 1), prompt.for_us(**ours), now=0)
        self.booked.append(name)
        self.selections += len(reservation.selection.candidates) > 1
        answer = chosen(prompt, reservation.worker, reservation.overlap_blocks)
        self.note(["reserve", theirs | {"selection_id": name}], answer)

    def request(self) -> tuple[Prompt, dict[str, Any], dict[str, Any]]:
        """Draw a prompt, and what is asked for with it in the words of each side."""
        rng, prompt = self.rng, self.rng.choice(self.prompts)
        ours: dict[str, Any] = {}
        theirs = prompt.for_peer()
        if self.by_request:
            ours["overrides"] = CostOverrides(**self.knobs)
        if rng.random() < 0.2:
            allowed = rng.sample(range(1, 10), k=rng.randint(1, 6))
            ours["allowed_workers"] = frozenset(WorkerId(str(number)) for number in allowed)
            theirs["allowed_worker_ids"] = allowed
        if rng.random() < 0.2:
            required = rng.sample(LABELS, k=rng.randint(1, 2))
            ours["required_labels"] = dict.fromkeys(required, "yes")
            theirs["routing_constraints"] = {"required_taints": required, "preferred_taints": {}}
        return prompt, ours, theirs

    def look(self, kind: str) -> None:
        prompt = self.rng.choice(self.prompts)
        if kind == "overlaps":
            found = self.router.overlaps(prompt.for_us())
            answer = sorted([*numbers(worker), depth] for worker, depth in found.items())
        else:
            loads = self.router.potential_loads(prompt.for_us(), now=0)
            answer = sorted(
                [*numbers(load.worker), load.prefill_tokens, load.decode_blocks, load.active_requests] for load in loads
            )
        self.note([kind, prompt.for_peer()], answer)

    def progress(self, kind: str, name: str) -> None:
        key = AttemptKey(RequestId(name), 1)
        if kind == "release":
            self.booked.remove(name)
            self.router.release(key, now=0)
        elif kind == "prefill_complete":
            self.router.report_progress(key, prefill_complete=True, now=0)
        else:
            self.router.report_progress(key, output_blocks=1, now=0)
        self.note([kind, name])


def is_tie(selection: Selection) -> bool:
    """Tell whether the two least costs cannot be told apart, up to the order in which floats were added."""
    costs = sorted(scored.cost for scored in selection.scores)
    return len(costs) > 1 and costs[1] - costs[0] <= 1e-9 * max(costs[1], 1)


def chosen(prompt: Prompt, worker: WorkerRank, overlap_blocks: int) -> list[int]:
    return [*numbers(worker), len(prompt.tokens) - overlap_blocks * prompt.block_size]


def numbers(worker: WorkerRank) -> tuple[int, int]:
    return int(worker.worker_id), worker.rank


def write_worlds(seed: int, **changes: Any) -> list[World]:
    return [World(random.Random(seed + number), **changes) for number in range(BATCH)]


def assert_agreement(ask: Ask, worlds: list[World]) -> None:
    theirs = ask("worlds", [world.for_peer() for world in worlds])

    for world, answers in zip(worlds, theirs, strict=True):
        for at, (step, ours, expected) in enumerate(zip(world.steps, world.answers, answers, strict=True)):
            said = REFUSED if isinstance(expected, str) else expected
            assert ours == said, f"{world.for_peer() | {'steps': world.steps[:at]}}, then {step}: {expected}"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_routers_choose_alike_and_say_the_same_of_every_worker(ask: Ask, batch: int) -> None:
    worlds = write_worlds(20261121_00 + batch * BATCH)

    assert_agreement(ask, worlds)

    assert sum(world.selections for world in worlds) >= SELECTIONS / BATCHES


def test_routers_that_go_by_what_was_routed_choose_alike(ask: Ask) -> None:
    worlds = write_worlds(77_00, approximate=True)

    assert_agreement(ask, worlds)

    overlaps = [
        depth
        for world in worlds
        for step, answer in zip(world.steps, world.answers, strict=True)
        if step[0] == "overlaps"
        for _, _, depth in answer
    ]
    assert sum(depth > 0 for depth in overlaps) > 50


def test_temperature_draws_with_the_same_odds(ask: Ask) -> None:
    """Costs 0, 3 and 9 above the least: 3,000 draws each, within four standard deviations of 0.4798, 0.3438, 0.1765."""
    draws, odds = 3_000, {1: 0.4798, 2: 0.3438, 3: 0.1765}
    router = RoutingCore(RouterId("ours"), policy=KvAware(CostKnobs(temperature=1.0)), rng=random.Random(3))
    workers = [{"worker": number, "ranks": 1, "labels": [], "block_size": 16} for number in odds]
    steps: list[list[Any]] = []
    for number, blocks in ((1, 0), (2, 3), (3, 9)):
        worker = WorkerId(str(number))
        router.put_worker(WorkerRecord(worker_id=worker, epoch=EPOCH, models=("m",), block_size=16), now=0)
        for block in range(blocks):
            name, prompt = f"{number}/{block}", Prompt.of((1_000 * number + block,) * 16, 16, None, None)
            key = AttemptKey(RequestId(name), 1)
            router.reserve(key, prompt.for_us(pinned_worker=worker), now=0)
            router.report_progress(key, prefill_complete=True, now=0)
            pin = {"worker_id": number, "dp_rank": 0}
            steps.append(["reserve", prompt.for_peer() | {"selection_id": name, "pinned_worker": pin}])
            steps.append(["prefill_complete", name])
    asked = Prompt.of((7,) * 16, 16, None, None)
    steps += [["select", asked.for_peer()]] * draws

    ours = [int(router.select(asked.for_us(), now=0).worker.worker_id) for _ in range(draws)]
    theirs = [
        answer[0]
        for answer in ask("worlds", [{"workers": workers, "knobs": {"temperature": 1.0}, "steps": steps}])[0][-draws:]
    ]

    for drawn in (ours, theirs):
        for number, chance in odds.items():
            deviation = (draws * chance * (1 - chance)) ** 0.5
            assert abs(drawn.count(number) - draws * chance) < 4 * deviation
