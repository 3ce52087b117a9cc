"""The soak in short: after churn, disconnections and restarts the index is right, exactly."""

import pytest

from kvmesh.testing.event_soak import SoakPlan, soak


@pytest.mark.timeout(120)
async def test_index_equals_the_workers_own_blocks_after_churn() -> None:
    plan = SoakPlan(seconds=15.0, workers=16, blocks=256, steps_per_s=40.0, ring=128, resync_s=2.0, seed=3)

    report = await soak(plan)

    assert (report.missing, report.extra) == (0, 0)
    assert (report.restarted_missing, report.restarted_extra) == (0, 0)
    assert report.is_exact
    assert min(report.restarts, report.disconnects, report.bursts, report.recoveries) > 0  # it was not idle
