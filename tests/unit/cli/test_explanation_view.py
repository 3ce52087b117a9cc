"""An explanation as a table."""

from io import StringIO

from rich.console import Console

from kvmesh.cli.explanation import explanation_view
from kvmesh.v1 import router_pb2

TERMS = {
    "active_requests": 2.0, "credit_blocks": 7.0, "decode_blocks": 31.0, "decode_cost": 0.62, "overlap_blocks": 7.0,
    "prefill_blocks": 31.25, "prefill_cost": 24.25, "request_cost": 3.5,
}  # fmt: skip


def candidate(name: str, cost: float, lost: str = "", /, **terms: float) -> router_pb2.CandidateExplanation:
    return router_pb2.CandidateExplanation(worker_id=name, cost=cost, lost=lost, terms=terms)


def printed(*candidates: router_pb2.CandidateExplanation, policy: str = "p", width: int = 240) -> list[str]:
    explanation = router_pb2.Explanation(policy=policy, worker_id=candidates[0].worker_id, candidates=candidates)
    console = Console(file=StringIO(), width=width)
    console.print(explanation_view(explanation, width=width))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO of above
    return [line.rstrip() for line in text.splitlines()]


def test_terms_stand_in_the_order_of_the_formula_with_what_is_unknown_behind() -> None:
    lines = printed(
        candidate("a", 1, prefill_cost=1, overlap_blocks=2, another=3, prefill_blocks=4),
        candidate("b", 2, "cost 2 is above 1", prefill_cost=2, overlap_blocks=3, another=4, prefill_blocks=5),
    )

    assert lines[0].split()[:6] == ["worker", "cost", "prefill_blocks", "prefill_cost", "overlap_blocks", "another"]
    assert lines[1].split()[:6] == ["a", "1", "4", "1", "2", "3"]


def test_what_is_alike_for_all_is_one_line() -> None:
    lines = printed(
        candidate("a", 1, prefill_cost=1, request_cost=0, decode_cost=0.5),
        candidate("b", 2, "cost 2 is above 1", prefill_cost=2, request_cost=0, decode_cost=0.5),
    )

    assert lines[0].split()[:3] == ["worker", "cost", "prefill_cost"]
    assert lines[3] == "alike for all: decode_cost 0.5, request_cost 0"


def test_one_candidate_alone_keeps_its_terms() -> None:
    lines = printed(candidate("a", 1, prefill_cost=1, request_cost=0))

    assert lines[1].split()[:3] == ["a", "1", "1"]
    assert lines[2] == "alike for all: request_cost 0"


def test_a_table_with_every_term_is_not_much_wider_than_120_columns_on_a_wide_terminal() -> None:
    others = {name: value + 1 for name, value in TERMS.items()}

    lines = printed(candidate("NODE1/decode/0", 1, **TERMS), candidate("NODE2/decode/1", 2, "cost 2 > 1", **others))

    assert max(map(len, lines)) <= 120
    assert [line.split()[:2] for line in lines[2:4]] == [["NODE1/decode/0", "1"], ["NODE2/decode/1", "2"]]


def test_0_is_a_cost_and_none_is_a_dash() -> None:
    scored = printed(candidate("a", 0), candidate("b", 0, "tie, not drawn"), candidate("c", 2, "cost 2 is above 0"))
    unscored = printed(candidate("a", 0), candidate("b", 0, "not chosen by p"))

    assert [line.split()[1] for line in scored[1:4]] == ["0", "0", "2"]
    assert [line.split()[1] for line in unscored[1:3]] == ["-", "-"]
