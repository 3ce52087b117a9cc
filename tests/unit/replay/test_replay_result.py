"""What is kept of a request's stream, and the figures made of it."""

import pytest

from kvmesh.replay.outcome import Outcome
from kvmesh.replay.result import Distribution, summarise
from kvmesh.v1 import frontend_pb2, generation_pb2


def started(predicted_cached_tokens: int = 0) -> frontend_pb2.GenerateResponse:
    return frontend_pb2.GenerateResponse(started=frontend_pb2.Started(predicted_cached_tokens=predicted_cached_tokens))


def chunk(tokens: int, text: str = "") -> frontend_pb2.GenerateResponse:
    return frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(token_ids=[65] * tokens, text=text))


def finished(prompt_tokens: int = 100, cached_tokens: int = 0) -> frontend_pb2.GenerateResponse:
    usage = generation_pb2.Usage(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
    return frontend_pb2.GenerateResponse(finished=generation_pb2.Finished(usage=usage))


def outcome_of(
    *arrivals: tuple[float, frontend_pb2.GenerateResponse], max_tokens: int = 3, lag_s: float = 0.0
) -> Outcome:
    """Return a request that was sent at second 10 and has ended."""
    outcome = Outcome(max_tokens=max_tokens, scheduled_at=10.0 - lag_s, sent_at=10.0)
    for now, response in arrivals:
        outcome.receive(response, now=now)
    outcome.end()
    return outcome


def test_a_good_request_is_nothing_but_finished() -> None:
    outcome = outcome_of((10.1, started()), (10.1, chunk(1)), (10.2, chunk(2)), (10.2, finished()))

    result = summarise([outcome], duration_s=1.0)

    assert outcome.is_finished
    assert (result.requests, result.lost, result.duplicated, result.short, result.errors) == (1, 0, 0, 0, 0)


def test_a_stream_that_ends_without_finished_is_lost() -> None:
    result = summarise([outcome_of((10.1, started()), (10.1, chunk(3)))], duration_s=1.0)

    assert (result.requests, result.lost, result.errors) == (1, 1, 0)
    assert result.lost_reasons == {"NOT_FINISHED": 1}
    assert result.hit_rate is None
    assert result.e2e_ms == Distribution()


@pytest.mark.parametrize(
    "arrivals",
    [
        [(10.1, chunk(3)), (10.2, finished()), (10.3, finished())],
        [(10.1, chunk(3)), (10.2, chunk(1)), (10.3, finished())],
        [(10.1, chunk(3)), (10.2, finished()), (10.3, chunk(1))],
    ],
    ids=["finished twice", "a token too many", "a token after the end"],
)
def test_what_comes_twice_is_duplicated(arrivals: list[tuple[float, frontend_pb2.GenerateResponse]]) -> None:
    result = summarise([outcome_of(*arrivals)], duration_s=1.0)

    assert (result.lost, result.duplicated) == (0, 1)


def test_a_request_with_fewer_tokens_than_asked_is_short() -> None:
    result = summarise([outcome_of((10.1, chunk(2)), (10.2, finished()))], duration_s=1.0)

    assert (result.lost, result.duplicated, result.short) == (0, 0, 1)


def test_errors_are_counted_by_reason_and_have_no_part_in_the_hit_rates() -> None:
    failed = Outcome(max_tokens=3, sent_at=10.0)
    failed.receive(started(predicted_cached_tokens=64), now=10.1)
    failed.error = "WORKER_LOST"
    good = outcome_of((10.1, started(32)), (10.2, chunk(3)), (10.3, finished(prompt_tokens=100, cached_tokens=16)))
    fresh = outcome_of((10.1, started(0)), (10.2, chunk(3)), (10.3, finished(prompt_tokens=300)))

    result = summarise([failed, good, failed, fresh], duration_s=1.0)

    assert (result.requests, result.lost, result.errors, result.error_reasons) == (4, 0, 2, {"WORKER_LOST": 2})
    assert result.hit_rate == 16 / 400
    assert result.predicted_hit_rate == 32 / 400


def test_lag_first_token_and_end_are_measured_around_the_moment_of_sending() -> None:
    outcomes = [
        outcome_of((10.0 + step, started()), (10.0 + step, chunk(3)), (11.0 + step, finished()), lag_s=step / 10)
        for step in (0.1, 0.2, 0.3)
    ]

    result = summarise(outcomes, duration_s=1.0)

    assert vars_of(result.schedule_lag_ms) == pytest.approx((20.0, 20.0, 28.0, 29.8))
    assert vars_of(result.ttft_ms) == pytest.approx((200.0, 200.0, 280.0, 298.0))
    assert vars_of(result.e2e_ms) == pytest.approx((1200.0, 1200.0, 1280.0, 1298.0))


def test_the_gap_before_a_chunk_is_divided_over_its_tokens() -> None:
    outcome = outcome_of(
        (10.1, chunk(2)), (10.2, chunk(1)), (10.2, chunk(0, text="held back")), (10.5, chunk(3)), (10.5, finished()),
        max_tokens=6,
    )  # fmt: skip

    result = summarise([outcome], duration_s=1.0)

    assert result.itl_ms.mean == pytest.approx((100 + 100 + 100 + 100) / 4)
    assert vars_of(summarise([outcome, _uneven()], duration_s=1.0).itl_ms) == pytest.approx((80.0, 100.0, 100.0, 100.0))


def _uneven() -> Outcome:
    """Return a request with one gap of 40 ms for two tokens, after its first token."""
    return outcome_of((10.1, chunk(1)), (10.18, chunk(2)), (10.2, finished()))


def vars_of(distribution: Distribution) -> tuple[float | None, ...]:
    return distribution.mean, distribution.p50, distribution.p90, distribution.p99
