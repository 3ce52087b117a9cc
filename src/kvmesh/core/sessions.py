"""Which worker served a session last."""

from collections import OrderedDict

from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.ids import WorkerRank
from kvmesh.core.roster import WorkerRole

_Session = tuple[WorkerRole, str, str]
"""Role, model and session_id: one session may use several."""


class Sessions:
    """The latest bookings of sessions, bounded by age and number; not thread-safe."""

    def __init__(self, *, ttl_s: float, max_sessions: int) -> None:
        """Forget a session `ttl_s` after its last booking, and the least recently booked of too many."""
        self._ttl_s = ttl_s
        self._max_sessions = max_sessions
        self._last: OrderedDict[_Session, tuple[WorkerRank, float]] = OrderedDict()  # the longest ago first

    def __len__(self) -> int:
        return len(self._last)

    def worker_of(self, query: RoutingQuery, *, now: float) -> WorkerRank | None:
        """Return where the query's session was booked last, None if it has none or that was too long ago."""
        session = _session_of(query)
        if session is None:
            return None
        worker, booked_at = self._last.get(session, (None, 0.0))
        return worker if now - booked_at <= self._ttl_s else None

    def note(self, query: RoutingQuery, worker: WorkerRank, *, now: float) -> None:
        """Note that the query's session, if it has one, was booked here."""
        session = _session_of(query)
        if session is None:
            return
        self._last[session] = (worker, now)
        self._last.move_to_end(session)
        while len(self._last) > self._max_sessions or now - next(iter(self._last.values()))[1] > self._ttl_s:
            self._last.popitem(last=False)


def _session_of(query: RoutingQuery) -> _Session | None:
    session_id = query.hints.session_id
    return None if session_id is None else (query.role, query.model, session_id)
