"""A worker of a simulation: an engine that goes from step to step in virtual time."""

from collections.abc import Callable

from kvmesh.core.ids import WorkerRank
from kvmesh.simulate.clock import VirtualTime
from kvmesh.simulate.engine import Finished, VirtualEngine
from kvmesh.simulate.request import VirtualRequest


class VirtualWorker:
    """Runs its engine whenever there is something to do, and tells of every step or run of steps."""

    def __init__(
        self,
        rank: WorkerRank,
        engine: VirtualEngine,
        time: VirtualTime,
        *,
        on_finish: Callable[["VirtualWorker", Finished, float], None],
    ) -> None:
        """Start idle; `on_finish` hears, at its end, of each step or run and may add requests."""
        self.rank = rank
        self.engine = engine
        self._time = time
        self._on_finish = on_finish
        self._plans = 0
        self._is_between_steps = False

    def add(self, request: VirtualRequest, *, now: float) -> None:
        """Take a request in: it joins with the next step."""
        self.engine.add(request)
        if self.engine.is_busy:
            self._end_at(self.engine.cut(now))
        elif not self._is_between_steps:
            self._begin(now)

    def _begin(self, now: float) -> None:
        end_s = self.engine.plan(now)
        if end_s is not None:
            self._end_at(end_s)

    def _end_at(self, end_s: float) -> None:
        self._plans += 1
        plan = self._plans
        self._time.at(end_s, lambda now: self._finish(plan, now))

    def _finish(self, plan: int, now: float) -> None:
        if plan != self._plans:
            return  # the run was cut: it ended earlier
        finished = self.engine.finish()
        self._is_between_steps = True
        self._on_finish(self, finished, now)
        self._is_between_steps = False
        self._begin(now)
