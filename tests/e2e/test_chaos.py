"""A short run of `make chaos`: parts of the mesh are killed, stopped and cut off, and no answer is wrong for it."""

from pathlib import Path

import pytest

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.chaos import ChaosPlan, run_chaos

pytestmark = [
    pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH"),
    pytest.mark.timeout(420),
]


async def test_no_answer_is_wrong_or_late_and_nothing_stays_held_while_parts_of_the_mesh_die(tmp_path: Path) -> None:
    plan = ChaosPlan(requests=36, seed=3, rate=8.0, mean_gap_s=0.5)

    result = await run_chaos(plan, folder=tmp_path)

    assert result.details == []
    assert (result.wrong, result.hung, result.unexpected, result.leaked) == (0, 0, 0, 0)
    assert sum(result.outcomes.values()) == result.requests == plan.requests
    assert result.disturbances.total() >= 3
    assert result.outcomes["finished_remote"] + result.outcomes["finished_fallback"] > 0
