"""What happens to a mesh under test: processes are killed, or stopped and continued; connections are cut, or stall.

Mostly one of a pair is left alone until the other answers again, so that there is somebody to be saved by.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import suppress

from kvmesh import telemetry
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.testing.chaos_mesh import ETCD, GATEWAY, ChaosMesh

log = telemetry.logger(__name__)

_KINDS = {"kill": 3, "stop": 3, "cut": 3, "stall": 1}
"""How often each is drawn."""
_LASTS_S = (0.05, 5.0)
"""Of all but kills; shorter than the shortest wait that a worker's silence ends, and longer."""
_BOTH_SHARE = 0.1
"""Of the disturbances that may meet the second of a pair while the first one is not back."""
_BACK_S = 20.0
_LOOK_AGAIN_S = 0.2
_WEIGHTS = {ETCD: 1, GATEWAY: 1}
_USUAL_WEIGHT = 3


class Disturbances:
    """Disturbs one part at a time or several, never one that is disturbed already; drawn from a seed."""

    def __init__(self, mesh: ChaosMesh, *, rng: random.Random, mean_gap_s: float) -> None:
        """Begin one every `mean_gap_s` on average, from `start` on."""
        self.counts: Counter[str] = Counter()
        """By kind and victim, e.g. "kill prefill-0"."""
        self._mesh = mesh
        self._rng = rng
        self._mean_gap_s = mean_gap_s
        self._victims = [ETCD, *(role.name for role in mesh.roles)]
        self._busy: set[str] = set()
        self._running = OwnedTasks()
        self._begun = OwnedTasks()

    def start(self) -> None:
        """Begin to disturb."""
        self._running.start(self._run(), name="disturbances")

    async def aclose(self) -> None:
        """Begin no more, and make everything well again."""
        await self._running.aclose()
        await self._begun.aclose()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / self._mean_gap_s))
            free = self._choosable()
            if not free:
                continue
            victim = self._rng.choices(free, [_WEIGHTS.get(name, _USUAL_WEIGHT) for name in free])[0]
            (kind,) = self._rng.choices(list(_KINDS), list(_KINDS.values()))
            if victim == ETCD and kind in ("cut", "stall"):
                kind = "stop"
            self._busy.add(victim)
            self.counts[f"{kind} {victim}"] += 1
            lasts_s = self._rng.uniform(*_LASTS_S)
            log.warning("chaos.disturbed", kind=kind, victim=victim, seconds=round(lasts_s, 2))
            task = self._begun.start(self._disturb(kind, victim, lasts_s), name=f"{kind}-{victim}")
            task.add_done_callback(lambda _, name=victim: self._busy.discard(name))  # type: ignore[misc]  # bound now

    def _choosable(self) -> list[str]:
        free = [victim for victim in self._victims if victim not in self._busy]
        if self._rng.random() < _BOTH_SHARE:
            return free
        pairs = {_pair(victim) for victim in self._busy}
        return [victim for victim in free if _pair(victim) not in pairs]

    async def _disturb(self, kind: str, victim: str, lasts_s: float) -> None:
        if victim == ETCD:
            await self._disturb_etcd(kind, lasts_s)
        elif kind == "kill":
            killed = self._mesh.pid(victim)
            _signal(killed, signal.SIGKILL)
            await self._wait_back(victim, killed)
        elif kind == "stop":
            await self._stop(victim, lasts_s)
        else:
            proxy = self._mesh.proxies[victim]
            try:
                if kind == "cut":
                    await proxy.cut()
                else:
                    proxy.stall()
                await asyncio.sleep(lasts_s)
            finally:
                proxy.restore()

    async def _wait_back(self, victim: str, killed: int | None) -> None:
        """Wait until another process answers in the place of the killed one; a bound, because more may befall it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_BACK_S):
                while True:
                    await asyncio.sleep(_LOOK_AGAIN_S)
                    if self._mesh.pid(victim) not in (None, killed) and await self._mesh.answers(victim):
                        return

    async def _stop(self, victim: str, lasts_s: float) -> None:
        pid = self._mesh.pid(victim)
        _signal(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(lasts_s)
        finally:
            _signal(pid, signal.SIGCONT)

    async def _disturb_etcd(self, kind: str, lasts_s: float) -> None:
        etcd = self._mesh.etcd
        if kind == "kill":
            await asyncio.shield(asyncio.to_thread(etcd.restart))
            return
        etcd.pause()
        try:
            await asyncio.sleep(lasts_s)
        finally:
            etcd.resume()


def _signal(pid: int | None, number: signal.Signals) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _pair(victim: str) -> str:
    """Return what the two of a pair have in common."""
    return victim.split("-", maxsplit=1)[0]
