"""Is the index right? What was predicted of a worker's cache, against what its requests found there.

    booked -> finished: judged, once the worker has said how much of the prompt it had cached
    booked -> reset:    never judged, the index behind the prediction is gone

Laws:
    - over-predicted are the predicted blocks that were not found, up to the first of them whose removal arrived before
      the request finished: the router could not know, and what follows a removed block is gone with it;
    - a rank drifts when, over its last `window` requests, more than `max_overpredicted` of the predicted blocks are
      over-predicted; that is said once, until `reset`;
    - nothing is computed of a prediction that came true: the hashes of its prompt are read for the others only.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from kvmesh.core.ids import AttemptKey, SequenceHash, WorkerId, WorkerRank


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthRules:
    """When a rank's part of the index counts as wrong."""

    window: int = 100
    """Requests of a rank that are looked at, the latest."""
    max_overpredicted: float = 0.1
    """Share of their predicted blocks."""
    min_predictions: int = 10
    """Requests among them that predicted any block, below which nothing is concluded."""
    max_pending: int = 65_536
    """Requests waited for; beyond that the oldest are not judged."""
    max_removals: int = 65_536
    """Removed blocks remembered per rank while requests run; a request that is older than they reach is not judged."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one finished request says of the index."""

    worker: WorkerRank
    predicted: int
    """Blocks."""
    overpredicted: int
    """Of them."""
    has_drifted: bool
    """The rank's share has passed the bound with this request."""


@dataclass(frozen=True, slots=True)
class _Prediction:
    worker: WorkerRank
    blocks: Sequence[SequenceHash]
    predicted: int
    removals_before: int
    """Number of the first removal that came after it."""


@dataclass(slots=True)
class _Rank:
    judged: deque[tuple[int, int]] = field(default_factory=deque)
    """Predicted and over-predicted blocks of the latest requests."""
    predictions: int = 0
    """Those among `judged` that predicted anything."""
    predicted: int = 0
    overpredicted: int = 0
    has_drifted: bool = False
    removals: deque[Sequence[SequenceHash] | None] = field(default_factory=deque)
    """What arrived while requests were pending, in order; None: everything."""
    removed_blocks: int = 0
    """In all of `removals`."""
    first_removal: int = 0
    """Number of the oldest of `removals`."""
    pending: int = 0
    """Requests that predicted blocks and have not finished."""

    @property
    def next_removal(self) -> int:
        return self.first_removal + len(self.removals)

    def note_removal(self, blocks: Sequence[SequenceHash] | None, *, most: int) -> None:
        self.removals.append(blocks)
        self.removed_blocks += len(blocks or ())
        while self.removed_blocks > most:
            self.removed_blocks -= len(self.removals.popleft() or ())
            self.first_removal += 1

    def drop_removals(self) -> None:
        self.first_removal = self.next_removal
        self.removals.clear()
        self.removed_blocks = 0


class TruthCheck:
    """Judges the predictions of one router; not thread-safe."""

    def __init__(self, rules: TruthRules | None = None) -> None:
        """Start with nothing to judge."""
        self._rules = rules or TruthRules()
        self._pending: OrderedDict[AttemptKey, _Prediction] = OrderedDict()
        self._ranks: dict[WorkerRank, _Rank] = {}

    def booked(
        self, key: AttemptKey, worker: WorkerRank, *, blocks: Sequence[SequenceHash], overlap_blocks: int
    ) -> None:
        """Remember that a request was sent to `worker` for the first `overlap_blocks` of its prompt's blocks.

        Idempotent: the first prediction of a key counts. O(1); `blocks` is kept, and may compute its items when read.
        """
        if key in self._pending:
            return
        rank = self._ranks.setdefault(worker, _Rank())
        rank.pending += overlap_blocks > 0
        self._pending[key] = _Prediction(worker, blocks, overlap_blocks, rank.next_removal)
        if len(self._pending) > self._rules.max_pending:
            self._take(next(iter(self._pending)))

    def worker_of(self, key: AttemptKey) -> WorkerRank | None:
        """Return where a pending request went, or None."""
        prediction = self._pending.get(key)
        return prediction.worker if prediction is not None else None

    def removed(self, worker: WorkerRank, blocks: Sequence[SequenceHash] | None) -> None:
        """Note that a worker said it removed blocks; None: its whole cache. O(1)."""
        rank = self._ranks.get(worker)
        if rank is not None and rank.pending:
            rank.note_removal(blocks, most=self._rules.max_removals)

    def finished(self, key: AttemptKey, *, cached_blocks: int | None) -> Verdict | None:
        """Judge a request of whose prompt the worker had so many leading blocks; None for either: not known.

        A key that is not pending, e.g. one that has been judged, says nothing. O(1) where the prediction came true.
        """
        prediction = self._pending.get(key)
        rank = self._ranks.get(prediction.worker) if prediction is not None else None
        if prediction is None or rank is None or cached_blocks is None:
            self._take(key)
            return None
        overpredicted = _overpredicted(prediction, rank, cached_blocks=cached_blocks)
        self._take(key)
        if overpredicted is None:
            return None
        self._judge(rank, prediction.predicted, overpredicted)
        is_news = not rank.has_drifted and self._drifts(rank)
        rank.has_drifted |= is_news
        return Verdict(prediction.worker, prediction.predicted, overpredicted, is_news)

    def reset(self, worker: WorkerRank) -> None:
        """Begin anew with a rank: its part of the index is replaced. What is pending is not judged. O(pending)."""
        if self._ranks.pop(worker, None) is None:
            return
        for key in [key for key, prediction in self._pending.items() if prediction.worker == worker]:
            del self._pending[key]

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Drop what is held of a worker that is gone. O(ranks + pending)."""
        for worker in [known for known in self._ranks if known.worker_id == worker_id]:
            self.reset(worker)

    def overpredicted_share(self, worker: WorkerRank) -> float:
        """Return the share of over-predicted blocks over the rank's window; 0 where nothing was predicted."""
        rank = self._ranks.get(worker)
        return rank.overpredicted / rank.predicted if rank is not None and rank.predicted else 0.0

    def _take(self, key: AttemptKey) -> None:
        prediction = self._pending.pop(key, None)
        rank = self._ranks.get(prediction.worker) if prediction is not None else None
        if prediction is None or rank is None:
            return
        rank.pending -= prediction.predicted > 0
        if not rank.pending:
            rank.drop_removals()

    def _judge(self, rank: _Rank, predicted: int, overpredicted: int) -> None:
        rank.judged.append((predicted, overpredicted))
        rank.predicted += predicted
        rank.overpredicted += overpredicted
        rank.predictions += predicted > 0
        if len(rank.judged) > self._rules.window:
            old_predicted, old_overpredicted = rank.judged.popleft()
            rank.predicted -= old_predicted
            rank.overpredicted -= old_overpredicted
            rank.predictions -= old_predicted > 0

    def _drifts(self, rank: _Rank) -> bool:
        has_evidence = rank.predictions >= self._rules.min_predictions
        return has_evidence and rank.overpredicted > self._rules.max_overpredicted * rank.predicted


def _overpredicted(prediction: _Prediction, rank: _Rank, *, cached_blocks: int) -> int | None:
    """Count the over-predicted blocks; None if it cannot be told, for want of room for removals."""
    if cached_blocks >= prediction.predicted:
        return 0
    if prediction.removals_before < rank.first_removal:
        return None
    blocks_missing = islice(prediction.blocks, cached_blocks, prediction.predicted)
    missing = {block: at for at, block in enumerate(blocks_missing, start=cached_blocks)}
    first_gone = prediction.predicted
    for number, blocks in enumerate(rank.removals, start=rank.first_removal):
        if number < prediction.removals_before:
            continue
        if blocks is None:
            return 0
        first_gone = min([first_gone, *(missing[block] for block in blocks if block in missing)])
    return first_gone - cached_blocks
