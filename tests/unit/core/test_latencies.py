import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.latencies import RecentTimes, quantile


def test_times_older_than_the_window_are_forgotten() -> None:
    times = RecentTimes(window_s=10.0)
    times.add(0.1, now=0.0)
    times.add(0.2, now=4.0)
    times.add(0.3, now=11.0)

    assert times.at(10.0) == [0.1, 0.2, 0.3]
    assert times.at(14.0) == [0.2, 0.3]
    assert times.at(14.1) == [0.3]
    assert times.at(30.0) == []


def test_no_more_than_the_newest_are_kept() -> None:
    times = RecentTimes(max_samples=3)
    for number in range(5):
        times.add(float(number), now=1.0)

    assert times.at(1.0) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.75, 3.0), (0.99, 4.0), (1.0, 4.0)]
)
def test_a_quantile_is_the_least_sample_that_the_share_does_not_exceed(share: float, expected: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], share) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_at_least_the_share_lies_at_or_below_its_quantile_and_no_lower_sample_has_it(
    samples: list[float], share: float
) -> None:
    ordered = sorted(samples)

    found = quantile(ordered, share)

    assert sum(sample <= found for sample in ordered) >= share * len(ordered) - 1e-9
    assert sum(sample < found for sample in ordered) < share * len(ordered) + 1e-9


def test_no_samples_have_no_quantile() -> None:
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)
