"""What the router answered to each Reserve that is still booked, so that asking again gives the same answer.

Explanations are large (every candidate of every decision, and the prompt), so full ones are kept apart, only the
latest, bounded by their size. The bookings themselves are the load table's.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvmesh.core.candidates import RoutingQuery, Selection
from kvmesh.core.errors import ConflictError, NotKnownError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, WorkerRank


@dataclass(frozen=True, slots=True)
class Reservation:
    """A booked choice."""

    key: AttemptKey
    reservation_id: int
    """The worker's load reports show it by this number."""
    selection: Selection

    @property
    def worker(self) -> WorkerRank:
        """Where the request goes."""
        return self.selection.worker

    @property
    def epoch(self) -> Epoch:
        """The incarnation it is booked on."""
        return self.selection.epoch

    @property
    def overlap_blocks(self) -> int:
        """Leading prompt blocks expected in its cache."""
        return self.selection.overlap_blocks


_HASHES_PER_CANDIDATE = 16
_CHARACTERS_PER_CANDIDATE = 512
"""What takes about as much memory as one candidate."""


class Reservations:
    """Answers by key, and the latest explanations."""

    def __init__(self, *, max_explained: int) -> None:
        """Keep explanations of at most `max_explained` candidates in all; prompts count as candidates by size."""
        self._max_explained = max_explained
        self._answers: dict[AttemptKey, Reservation] = {}
        self._explained: OrderedDict[AttemptKey, tuple[Selection, int]] = OrderedDict()
        """Each with its size."""
        self._explained_candidates = 0

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, key: AttemptKey, query: RoutingQuery) -> Reservation | None:
        """Return the answer given before. Raises: ConflictError(ALREADY_EXISTS) if it was to another query."""
        answer = self._answers.get(key)
        if answer is not None and not is_same_query(answer.selection.query, query):
            raise ConflictError(Reason.ALREADY_EXISTS, f"{key}: reserved with other content")
        return answer

    def put(self, reservation: Reservation) -> None:
        """Keep an answer until `forget`, and its explanation while there is room."""
        selection = reservation.selection
        self._answers[reservation.key] = Reservation(
            reservation.key, reservation.reservation_id, selection.without_candidates()
        )
        before = self._explained.pop(reservation.key, None)  # a key is free again long after its booking ended
        size = _size(selection)
        self._explained_candidates += size - (before[1] if before is not None else 0)
        self._explained[reservation.key] = (selection, size)
        while self._explained_candidates > self._max_explained:
            _, (_, oldest_size) = self._explained.popitem(last=False)
            self._explained_candidates -= oldest_size

    def forget(self, keys: Iterable[AttemptKey]) -> None:
        """Drop the answers of bookings that ended; explanations stay while there is room."""
        for key in keys:
            self._answers.pop(key, None)

    def explain(self, key: AttemptKey) -> Selection:
        """Return the full selection behind a lately booked answer. Raises: NotKnownError(NOT_FOUND)."""
        kept = self._explained.get(key)
        if kept is None:
            raise NotKnownError(Reason.NOT_FOUND, f"no explanation of {key} is kept")
        return kept[0]


def _size(selection: Selection) -> int:
    size = len(selection.candidates) + len(selection.excluded)
    if selection.query is not None:
        size += sum(map(len, selection.query.block_hashes.values())) // _HASHES_PER_CANDIDATE
        size += len(selection.query.prompt_text or "") // _CHARACTERS_PER_CANDIDATE
    return size


def is_same_query(before: RoutingQuery | None, query: RoutingQuery) -> bool:
    """Compare as the caller would: for which block sizes a prompt was hashed depends on the workers alive then."""
    if before is None or replace(before, block_hashes={}) != replace(query, block_hashes={}):
        return False
    shared_sizes = before.block_hashes.keys() & query.block_hashes.keys()
    return all(before.block_hashes[size] == query.block_hashes[size] for size in shared_sizes)
