"""Everyone who serves a query, eligible or not, each figure of them one array; and those who may be chosen.

Arrays are float64, in which every count is exact, and belong to one decision: whoever keeps them sees later what was
true then. `Candidate` objects are made of them when somebody looks.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from kvmesh.core.candidates import Candidate, Scored, Selection, Terms, by_worker
from kvmesh.core.ids import WorkerRank
from kvmesh.core.lineup import Flags, Lineup, Positions

Column = NDArray[np.float64]


class Field(ABC):
    """Everyone, by worker; columns are indexed by position, and not to be written to."""

    lineup: Lineup
    is_staleness_ignored: bool = False
    draining: Flags | None
    """None = nobody."""

    block_size: Column
    overlap_blocks: Column
    active_prefill_tokens: Column
    active_blocks: Column
    new_blocks: Column
    active_requests: Column
    waiting_requests: Column

    @property
    @abstractmethod
    def total_blocks(self) -> Column:
        """0 = not said."""

    @property
    @abstractmethod
    def max_requests(self) -> Column:
        """0 = not said."""

    @property
    @abstractmethod
    def saturated(self) -> Flags | None:
        """Who gets nothing; None = nobody."""

    @abstractmethod
    def candidate(self, position: int) -> Candidate:
        """Return one of them as an object."""

    def __len__(self) -> int:
        return len(self.lineup)


class ListedField(Field):
    """Candidates that are objects already: a test's, or those of a decision that is taken again."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        """Take them in any order."""
        self._candidates = ordered = by_worker(candidates)
        self.lineup = Lineup([each.worker for each in ordered], [each.labels for each in ordered])
        self.draining = np.array([each.is_draining for each in ordered], np.bool_)
        for name in (
            "block_size",
            "overlap_blocks",
            "active_prefill_tokens",
            "active_blocks",
            "new_blocks",
            "active_requests",
            "waiting_requests",
        ):
            setattr(self, name, self._column(name))

    @property
    def total_blocks(self) -> Column:
        """0 = not said."""
        return self._column("total_blocks")

    @property
    def max_requests(self) -> Column:
        """0 = not said."""
        return self._column("max_requests")

    @property
    def saturated(self) -> Flags | None:
        """Who gets nothing."""
        return np.array([each.is_saturated for each in self._candidates], np.bool_)

    def candidate(self, position: int) -> Candidate:
        """Return one of those given."""
        return self._candidates[position]

    def _column(self, name: str) -> Column:
        return np.array([getattr(each, name) for each in self._candidates], np.float64)


class CandidateColumns(Sequence[Candidate]):
    """Some of a field, in its order; a policy reads them one by one, or as columns of this length."""

    __slots__ = ("field", "positions")

    def __init__(self, field: Field, positions: Positions | None = None) -> None:
        """Take those at these positions, ascending; None = all."""
        self.field = field
        self.positions = positions

    @classmethod
    def of(cls, candidates: Iterable[Candidate]) -> "CandidateColumns":
        """Return candidates as columns: the same if they are."""
        return candidates if isinstance(candidates, cls) else cls(ListedField(candidates))

    @property
    def block_size(self) -> Column:
        """Tokens in a block."""
        return self._of(self.field.block_size)

    @property
    def overlap_blocks(self) -> Column:
        """Leading prompt blocks cached there."""
        return self._of(self.field.overlap_blocks)

    @property
    def active_prefill_tokens(self) -> Column:
        """Prompt tokens still to be computed there."""
        return self._of(self.field.active_prefill_tokens)

    @property
    def active_blocks(self) -> Column:
        """Blocks active there, without this request."""
        return self._of(self.field.active_blocks)

    @property
    def new_blocks(self) -> Column:
        """Prompt blocks not already active there."""
        return self._of(self.field.new_blocks)

    @property
    def active_requests(self) -> Column:
        """Requests there, without this one."""
        return self._of(self.field.active_requests)

    @property
    def waiting_requests(self) -> Column:
        """Requests that wait inside the engine."""
        return self._of(self.field.waiting_requests)

    @property
    def total_blocks(self) -> Column:
        """Blocks in the pool; 0 = not said."""
        return self._of(self.field.total_blocks)

    @property
    def max_requests(self) -> Column:
        """Requests run at once; 0 = not said."""
        return self._of(self.field.max_requests)

    def position(self, index: int) -> int:
        """Return where in the field the candidate at an index is."""
        return index if self.positions is None else int(self.positions[index])

    def worker(self, index: int) -> WorkerRank:
        """Return who the candidate at an index is, and make no object of it."""
        return self.field.lineup.workers[self.position(index)]

    def index_of(self, worker: WorkerRank) -> int | None:
        """Return at which index a rank is, None if it is not among them."""
        position = self.field.lineup.position_of(worker)
        if position is None or self.positions is None:
            return position
        index = int(self.positions.searchsorted(position))
        return index if index < len(self.positions) and self.positions[index] == position else None

    def __len__(self) -> int:
        return len(self.field) if self.positions is None else len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Candidate, ...]: ...
    def __getitem__(self, index: int | slice) -> Candidate | tuple[Candidate, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(len(self))[index])
        return self.field.candidate(self.position(range(len(self))[index]))

    def __repr__(self) -> str:
        return f"CandidateColumns({list(self)!r})"

    def _of(self, column: Column) -> Column:
        return column if self.positions is None else column[self.positions]


@dataclass(frozen=True, slots=True)
class ScoreColumns(Sequence[Scored]):
    """One score per candidate, made when somebody looks."""

    candidates: CandidateColumns
    costs: Column
    terms: Callable[[int], Terms | None] = lambda _index: None
    """Of the candidate at an index."""
    note: Callable[[int], str] = lambda _index: ""
    """Anything beside the cost that decided against it."""

    def __len__(self) -> int:
        return len(self.costs)

    @overload
    def __getitem__(self, index: int) -> Scored: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Scored, ...]: ...
    def __getitem__(self, index: int | slice) -> Scored | tuple[Scored, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(len(self))[index])
        at = range(len(self))[index]
        return Scored(self.candidates.worker(at), float(self.costs[at]), self.terms(at), self.note(at))


def index_of_least(costs: Column, rng: random.Random) -> int:
    """Return where the least cost is, ties uniformly."""
    least = int(costs.argmin())
    ties = costs == costs[least]
    if np.count_nonzero(ties) == 1:
        return least
    return int(rng.choice(ties.nonzero()[0]))


def shortened(selection: Selection, *, limit: int) -> Selection:
    """Return a selection with its `limit` cheapest candidates alone, the chosen one always, and as many excluded.

    What is left out is never made an object of, so of a thousand workers this costs one sort of their costs.
    """
    candidates = CandidateColumns.of(selection.candidates)
    scores = selection.scores
    score_of: Callable[[int], Scored | None]
    if isinstance(scores, ScoreColumns) and scores.candidates is candidates:
        costs, score_of = scores.costs, scores.__getitem__
    else:
        by_rank = {scored.worker: scored for scored in scores}
        listed = [by_rank.get(candidates.worker(at)) for at in range(len(candidates))]
        costs = np.array([np.inf if scored is None else scored.cost for scored in listed], np.float64)
        score_of = listed.__getitem__
    kept = [int(at) for at in costs.argsort(kind="stable")[:limit]]
    chosen = candidates.index_of(selection.worker)
    if chosen is not None and chosen not in kept:
        kept[-1] = chosen
    return replace(
        selection,
        candidates=tuple(candidates[at] for at in kept),
        scores=tuple(scored for at in kept if (scored := score_of(at)) is not None),
        excluded=tuple(islice(selection.excluded, limit)),
    )
