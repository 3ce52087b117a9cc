"""Random programs on the prefix index and on the oracle's radix tree: every answer is the same.

In these programs a rank removes the last blocks of its chains first, as its engine evicts them; what the two sides do
otherwise is in test_oracle_differences.py.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle, repeat
from typing import Any

import pytest

from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_index import PrefixIndex, StoreResult
from kvmesh.core.prompt_blocks import PromptBlocks

Ask = Callable[[str, list[Any]], list[Any]]
Path = tuple[int, ...]
"""Local hashes from the first block on: with its prefix, one block."""

BATCHES, BATCH = 10, 1_000
BLOCK_SIZE = 16
LOCALS = (3, 17, 2**64 - 1)
"""A narrow tree of blocks, so that ranks meet each other's and branch off them."""
STEPS = (
    ["store"] * 6
    + ["continue"] * 5
    + ["evict"] * 5
    + ["query"] * 6
    + ["store_again", "store_below_nothing", "remove_unknown", "clear", "remove_worker"]
)


@cache
def blocks_of(path: Path) -> tuple[SequenceHash, ...]:
    return sequence_hashes(path)


def block_of(path: Path) -> SequenceHash:
    return blocks_of(path)[-1]


@dataclass
class Programmer:
    """Writes one random program, and keeps the books of what each rank's engine would hold."""

    rng: random.Random
    held: dict[tuple[int, int], set[Path]] = field(default_factory=dict)
    removes_anywhere: bool = False
    """Also inside chains; such a rank stores nothing from then on."""
    broken: set[tuple[int, int]] = field(default_factory=set)

    def write(self) -> list[list[Any]]:
        ranks = self.rng.choice((1, 1, 2, 3))
        self.held = {(worker, rank): set() for worker in range(self.rng.randint(1, 4)) for rank in range(ranks)}
        steps = [step for _ in range(self.rng.randint(4, 30)) for step in self.step()]
        everything = set().union(*self.held.values())
        leaves = [path for path in everything if not any(other[:-1] == path for other in everything)]
        queries = [["query", [*leaf, self.rng.choice(LOCALS)]] for leaf in sorted(leaves)]
        return [*steps, *queries, *([] if self.removes_anywhere else [["dump"]])]

    def step(self) -> Iterator[list[Any]]:
        kind = self.rng.choice(STEPS)
        owner = self.rng.choice(sorted(self.held))
        if self.removes_anywhere and self.rng.random() < 0.1:
            yield from self.remove_anywhere(owner)
        elif kind == "query":
            yield ["query", list(self.query())]
        elif kind == "clear":
            self.held[owner].clear()
            self.broken.discard(owner)
            yield ["clear", *owner]
        elif kind == "remove_worker":
            for other in self.held:
                if other[0] == owner[0]:
                    self.held[other].clear()
                    self.broken.discard(other)
            yield ["remove_worker", owner[0]]
        elif kind == "remove_unknown":
            yield ["remove", *owner, [block_of((9, self.rng.randrange(9)))]]
        elif owner not in self.broken:
            yield from self.change(kind, owner)

    def change(self, kind: str, owner: tuple[int, int]) -> Iterator[list[Any]]:
        held = self.held[owner]
        if kind == "evict":
            yield from self.evict(owner)
        elif kind == "store_below_nothing":
            path = self.path(self.rng.randint(2, 7))
            if path[:-1] not in held:
                yield self.store(owner, path, len(path) - 1)
        elif kind == "store_again" and held:
            path = self.rng.choice(sorted(held))
            yield self.store(owner, path, self.rng.randrange(len(path)))
        elif kind == "continue" and held:
            path = self.rng.choice(sorted(held))
            longer = path + self.path(self.rng.randint(1, 4))
            yield self.store(owner, longer, len(path))
            held.update(longer[:end] for end in range(len(path) + 1, len(longer) + 1))
        else:
            path = self.path(self.rng.randint(1, 9))
            known = max((end for end in range(1, len(path) + 1) if path[:end] in held), default=0)
            yield self.store(owner, path, self.rng.randint(0, min(known, len(path) - 1)))
            held.update(path[:end] for end in range(1, len(path) + 1))

    def store(self, owner: tuple[int, int], path: Path, known: int) -> list[Any]:
        parent = block_of(path[:known]) if known else None
        return ["store", *owner, parent, list(blocks_of(path)[known:]), list(path[known:])]

    def evict(self, owner: tuple[int, int]) -> Iterator[list[Any]]:
        """Remove the last blocks of some chains, in one event or one by one."""
        held, gone = self.held[owner], []
        for _ in range(self.rng.randint(1, 5)):
            leaves = sorted(path for path in held if not any(other[:-1] == path for other in held))
            if leaves:
                gone.append(self.rng.choice(leaves))
                held.remove(gone[-1])
        if self.rng.random() < 0.5:
            yield ["remove", *owner, [block_of(path) for path in gone]]
        else:
            yield from (["remove", *owner, [block_of(path)]] for path in gone)

    def remove_anywhere(self, owner: tuple[int, int]) -> Iterator[list[Any]]:
        held = self.held[owner]
        if held and owner not in self.broken:
            path = self.rng.choice(sorted(held))
            held.remove(path)
            self.broken.add(owner)
            yield ["remove", *owner, [block_of(path)]]

    def query(self) -> Path:
        everything = sorted(set().union(*self.held.values()))
        if everything and self.rng.random() < 0.7:
            return self.rng.choice(everything) + self.path(self.rng.randint(0, 3))
        return self.path(self.rng.randint(0, 9))

    def path(self, length: int) -> Path:
        return tuple(self.rng.choices(LOCALS, weights=(6, 2, 1), k=length))


def run(program: list[list[Any]], *, local_known: Iterator[bool]) -> list[Any]:
    """Answer as the oracle's adapter does; `local_known` says of each store whether its local hashes come with it."""
    index = PrefixIndex()
    return [answer(index, kind, operands, local_known) for kind, *operands in program]


def answer(index: PrefixIndex, kind: str, operands: list[Any], local_known: Iterator[bool]) -> Any:
    if kind == "query":
        local = operands[0]
        found = index.match(blocks_of(tuple(local)))
        assert index.match(PromptBlocks.of_local(local, BLOCK_SIZE)) == found
        return sorted([int(worker.worker_id), worker.rank, depth] for worker, depth in found.items())
    if kind == "dump":
        return sorted([int(held.worker.worker_id), held.worker.rank, held.block_hash] for held in index.dump())
    if kind == "remove_worker":
        index.remove_worker(WorkerId(str(operands[0])))
        return True
    worker = WorkerRank(WorkerId(str(operands[0])), operands[1])
    if kind == "clear":
        index.clear(worker)
        return True
    if kind == "remove":
        return index.remove(worker, operands[2]) == len(operands[2])
    parent, blocks, local = operands[2:]
    outcome = index.store(worker, parent=parent, block_hashes=blocks, local_hashes=local if next(local_known) else None)
    return outcome.result is StoreResult.STORED


def assert_agreement(ask: Ask, programs: list[list[list[Any]]]) -> None:
    theirs = ask("index_programs", programs)

    for number, (program, expected) in enumerate(zip(programs, theirs, strict=True)):
        assert_same(program, run(program, local_known=repeat(True)), expected)
        if number % 4 == 0:
            assert_same(program, run(program, local_known=repeat(False)), expected)
        if number % 4 == 2:
            assert_same(program, run(program, local_known=cycle((True, True, False))), expected)


def assert_same(program: list[list[Any]], ours: list[Any], theirs: list[Any]) -> None:
    at = next((step for step, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    assert at is None, f"after {program[: at + 1]}: {ours[at]}, the oracle {theirs[at]}"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_programs_of_leaf_first_ranks_answer_alike(ask: Ask, batch: int) -> None:
    rng = random.Random(20261121 + batch)

    assert_agreement(ask, [Programmer(rng).write() for _ in range(BATCH)])


def test_programs_that_remove_inside_chains_answer_alike_until_the_block_returns(ask: Ask) -> None:
    rng = random.Random(77)

    assert_agreement(ask, [Programmer(rng, removes_anywhere=True).write() for _ in range(BATCH)])


def test_a_random_program_has_every_kind_of_step_and_of_answer(ask: Ask) -> None:
    rng = random.Random(5)
    programs = [Programmer(rng).write() for _ in range(200)]
    kinds = {step[0] for program in programs for step in program}

    answers = [answer for answers in ask("index_programs", programs) for answer in answers]

    assert kinds == {"store", "remove", "clear", "remove_worker", "query", "dump"}
    found = [answer for answer in answers if isinstance(answer, list)]
    assert max(depth for answer in found for _, _, depth in answer) >= 10
    assert max(len(answer) for answer in found) >= 6
    assert [] in found
    assert False in answers
