import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.remote_prefill import RemotePrefillReason, RemotePrefillRules, decide


@pytest.mark.parametrize(
    ("min_uncached", "min_prompt", "cached", "expected"),
    [
        pytest.param(0, None, 5, RemotePrefillReason.SWITCHED_OFF, id="0 is never remote"),
        pytest.param(5, 20, 0, RemotePrefillReason.SHORT_PROMPT, id="shorter than the minimum prompt"),
        pytest.param(20, None, 0, RemotePrefillReason.FEW_UNCACHED_TOKENS, id="threshold above the prompt"),
        pytest.param(5, 10, 5, RemotePrefillReason.REMOTE, id="both bounds are inclusive"),
        pytest.param(5, None, 8, RemotePrefillReason.FEW_UNCACHED_TOKENS, id="most is cached"),
        pytest.param(5, None, 5, RemotePrefillReason.REMOTE, id="exactly at the threshold"),
        pytest.param(3, None, 2, RemotePrefillReason.REMOTE, id="above the threshold"),
        pytest.param(1, None, 10, RemotePrefillReason.FEW_UNCACHED_TOKENS, id="all is cached"),
        pytest.param(5, None, 0, RemotePrefillReason.REMOTE, id="nothing is cached"),
        pytest.param(5, 0, 0, RemotePrefillReason.REMOTE, id="minimum 0 is no minimum"),
        pytest.param(1, None, 12, RemotePrefillReason.FEW_UNCACHED_TOKENS, id="more cached than the prompt has"),
    ],
)
def test_prefill_of_ten_tokens_goes_remote_by_uncached_tokens(
    min_uncached: int, min_prompt: int | None, cached: int, expected: RemotePrefillReason
) -> None:
    rules = RemotePrefillRules(min_uncached_tokens=min_uncached, min_prompt_tokens=min_prompt)

    decision = decide(rules, prompt_tokens=10, cached_tokens=cached, queue_depth=0, capable_workers=1)

    assert decision.reason is expected
    assert decision.is_remote == (expected is RemotePrefillReason.REMOTE)
    assert decision.text


@pytest.mark.parametrize(
    ("limit", "depth", "is_remote"),
    [
        pytest.param(2, 2, True, id="at the limit"),
        pytest.param(2, 3, False, id="beyond the limit"),
        pytest.param(0, 1, False, id="0 means an empty queue only"),
        pytest.param(None, 10_000, True, id="no limit"),
    ],
)
def test_prefill_stays_local_while_the_queue_is_deeper_than_the_limit(
    limit: int | None, depth: int, *, is_remote: bool
) -> None:
    rules = RemotePrefillRules(min_uncached_tokens=5, max_queue_depth=limit)

    decision = decide(rules, prompt_tokens=10, cached_tokens=0, queue_depth=depth, capable_workers=1)

    assert decision.is_remote == is_remote
    assert is_remote or decision.reason is RemotePrefillReason.DEEP_QUEUE


def test_prefill_stays_local_without_a_capable_worker() -> None:
    rules = RemotePrefillRules(min_uncached_tokens=1)

    decision = decide(rules, prompt_tokens=10, cached_tokens=0, queue_depth=0, capable_workers=0)

    assert decision.reason is RemotePrefillReason.NO_CAPABLE_WORKER


@pytest.mark.parametrize("name", ["min_uncached_tokens", "min_prompt_tokens", "max_queue_depth"])
def test_negative_rule_is_a_config_error_that_names_it(name: str) -> None:
    with pytest.raises(FixRequestError, match=f"{name} is -1") as caught:
        RemotePrefillRules(**{name: -1})

    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.field == name
