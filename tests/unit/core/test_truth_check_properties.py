"""`TruthCheck` against a naive twin that keeps the whole history, over random programs."""

import random

import pytest

from kvmesh.core.ids import AttemptKey, RequestId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.truth_check import TruthCheck, TruthRules

RANKS = [WorkerRank(WorkerId(name), rank) for name in ("a", "b") for rank in (0, 1)]
RULES = TruthRules(window=6, min_predictions=2, max_overpredicted=0.2)


class NaiveTruthCheck:
    """Everything that ever happened, searched anew for each answer."""

    def __init__(self) -> None:
        self.history: list[tuple[WorkerRank, frozenset[SequenceHash] | None]] = []
        self.booked: dict[AttemptKey, tuple[WorkerRank, tuple[SequenceHash, ...], int]] = {}
        self.judged: dict[WorkerRank, list[tuple[int, int]]] = {rank: [] for rank in RANKS}
        self.alarmed: set[WorkerRank] = set()

    def book(self, key: AttemptKey, rank: WorkerRank, predicted: tuple[SequenceHash, ...]) -> None:
        self.booked.setdefault(key, (rank, predicted, len(self.history)))

    def finish(self, key: AttemptKey, cached: int | None) -> tuple[int, int, bool] | None:
        rank, predicted, since = self.booked.pop(key, (None, (), 0))
        if rank is None or cached is None:
            return None
        removals = [blocks for removed_from, blocks in self.history[since:] if removed_from == rank]
        wrong = 0
        for block in predicted[cached:]:
            if any(blocks is None or block in blocks for blocks in removals):
                break
            wrong += 1
        self.judged[rank].append((len(predicted), wrong))
        latest = self.judged[rank][-RULES.window :]
        total, total_wrong = (sum(line[column] for line in latest) for column in (0, 1))
        has_evidence = sum(line[0] > 0 for line in latest) >= RULES.min_predictions
        drifts = has_evidence and total_wrong > RULES.max_overpredicted * total and rank not in self.alarmed
        if drifts:
            self.alarmed.add(rank)
        return len(predicted), wrong, drifts

    def reset(self, rank: WorkerRank) -> None:
        self.booked = {key: line for key, line in self.booked.items() if line[0] != rank}
        self.judged[rank] = []
        self.alarmed.discard(rank)


@pytest.mark.parametrize("seed", range(40))
def test_verdicts_are_those_of_the_naive_twin(seed: int) -> None:
    rng = random.Random(seed)
    check, twin = TruthCheck(RULES), NaiveTruthCheck()
    judged = drifted = 0

    for number in range(400):
        rank = rng.choice(RANKS)
        key = AttemptKey(RequestId(f"r{rng.randrange(number + 1)}"), 1)
        match rng.choices(("book", "finish", "remove", "clear", "reset"), (40, 40, 15, 1, 1))[0]:
            case "book":
                blocks = tuple(map(SequenceHash, rng.sample(range(30), rng.randrange(8))))
                predicted = rng.randint(0, len(blocks))
                check.booked(key, rank, blocks=blocks, overlap_blocks=predicted)
                twin.book(key, rank, blocks[:predicted])
            case "finish":
                key = rng.choice([*twin.booked, key])
                cached = rng.choice((None, 0, 1, 3, 8))
                verdict, expected = check.finished(key, cached_blocks=cached), twin.finish(key, cached)
                assert (verdict and (verdict.predicted, verdict.overpredicted, verdict.has_drifted)) == expected
                judged += expected is not None
                drifted += expected is not None and expected[2]
            case "remove":
                removed = frozenset(map(SequenceHash, rng.sample(range(30), 2)))
                check.removed(rank, tuple(removed))
                twin.history.append((rank, removed))
            case "clear":
                check.removed(rank, None)
                twin.history.append((rank, None))
            case _:
                check.reset(rank)
                twin.reset(rank)

    assert judged > 10
    assert drifted > 0
