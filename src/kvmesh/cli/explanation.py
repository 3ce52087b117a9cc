"""A routing decision as a table: every candidate with every term of its cost, and what the decision rested on."""

from collections.abc import Iterator, Mapping, Sequence

from google.protobuf import duration_pb2
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvmesh.v1 import router_pb2

_WIDEST = 120
"""Columns that a table takes at most with every term's name on one line, however wide the terminal is."""

_MEASURING = Console(width=10_000)
"""Prints nothing: tables are measured as on a terminal without an edge."""

_TERMS = (
    "prefill_blocks", "credit_blocks", "prefill_cost", "decode_cost", "request_cost",
    "overlap_blocks", "decode_blocks", "active_requests",
)  # fmt: skip
"""In the order of the formula, then the facts; what a later mesh adds comes behind them."""


def explanation_view(explanation: router_pb2.Explanation, *, width: int = _WIDEST) -> RenderableType:
    """Return the candidates by ascending cost, one column per term that tells them apart, those that were none, notes.

    Terms that are alike for all candidates are one line below; they decide nothing.
    """
    terms = sorted({name for candidate in explanation.candidates for name in candidate.terms}, key=_place)
    alike = {term: value for term in terms if (value := _common(explanation, term)) is not None}
    shown = [term for term in terms if term not in alike]
    table = _candidate_table(explanation, shown)
    if Measurement.get(_MEASURING, _MEASURING.options, table).maximum > min(width, _WIDEST):
        table = _candidate_table(explanation, shown, is_narrow=True)
    parts: list[RenderableType] = [table]
    if alike:
        parts.append(Text(f"alike for all: {', '.join(f'{name} {value:g}' for name, value in alike.items())}"))
    if explanation.rejected:
        parts.append(_rejected_table(explanation))
    return Group(*parts, *(Text(note) for note in _notes(explanation)))


def _candidate_table(explanation: router_pb2.Explanation, terms: Sequence[str], *, is_narrow: bool = False) -> Table:
    names = [name.replace("_", "\n") for name in terms] if is_narrow else terms
    table = _table("worker", "cost", *names, "load age", "kv age", last="lost because")
    table.collapse_padding = is_narrow
    for candidate in explanation.candidates:
        is_chosen = (candidate.worker_id, candidate.rank) == (explanation.worker_id, explanation.rank)
        table.add_row(
            Text(_name(candidate.worker_id, candidate.rank)),
            f"{candidate.cost:g}" if _has_cost(explanation, candidate) else "-",
            *(f"{candidate.terms[term]:g}" if term in candidate.terms else "-" for term in terms),
            _age(candidate, "load_age"),
            "degraded" if candidate.index_degraded else _age(candidate, "kv_age"),
            Text("chosen" if is_chosen else candidate.lost),
            style="bold" if is_chosen else None,
        )
    return table


def _place(term: str) -> tuple[int, str]:
    return (_TERMS.index(term) if term in _TERMS else len(_TERMS), term)


def _common(explanation: router_pb2.Explanation, term: str) -> float | None:
    """Return what all candidates have of a term; of one alone, nothing but 0 is worth no column."""
    values = {candidate.terms.get(term) for candidate in explanation.candidates}
    value = values.pop()
    return None if values or (value and len(explanation.candidates) == 1) else value


def _has_cost(explanation: router_pb2.Explanation, candidate: router_pb2.CandidateExplanation) -> bool:
    """Tell whether the policy said a cost, for which the contract has no word but what else it says.

    A policy without costs gives the others no other reason than that it did not choose them, and nobody its terms.
    """
    if candidate.cost or "prefill_cost" in candidate.terms:
        return True
    reasons = {other.lost for other in explanation.candidates if other.lost}
    unscored = f"not chosen by {explanation.policy}"
    return candidate.lost != unscored if candidate.lost else bool(reasons - {unscored})


def _rejected_table(explanation: router_pb2.Explanation) -> Table:
    table = _table("no candidate", "load age", "kv age", last="because")
    for worker in explanation.rejected:
        name = _name(worker.worker_id, worker.rank)
        table.add_row(Text(name), _age(worker, "load_age"), _age(worker, "kv_age"), Text(worker.reason))
    return table


def _notes(explanation: router_pb2.Explanation) -> Iterator[str]:
    knobs = f" ({_listed(explanation.knobs)})" if explanation.knobs else ""
    said = f": {explanation.note}" if explanation.note else ""
    yield f"policy {explanation.policy}{knobs}{said}"
    yield f"{explanation.prompt_tokens} prompt tokens, seed {explanation.seed}"
    if explanation.HasField("prefill"):
        is_remote = explanation.prefill.remote
        yield "prefill expected remote" if is_remote else f"prefill expected local: {explanation.prefill.reason}"
    if explanation.staleness_ignored:
        yield "most loads were stale, so staleness was ignored"
    if explanation.fallback:
        yield f"the policy failed, the lowest cost was taken: {explanation.fallback}"


def _table(first: str, *figures: str, last: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right")
    table.add_column(last)
    return table


def _name(worker_id: str, rank: int) -> str:
    return f"{worker_id}#{rank}" if rank else worker_id


def _age(message: router_pb2.CandidateExplanation | router_pb2.RejectedWorker, field: str) -> str:
    if not message.HasField(field):  # type: ignore[arg-type]  # the stubs list the names of each message by themselves
        return "-"
    age: duration_pb2.Duration = getattr(message, field)
    return f"{age.seconds + age.nanos / 1e9:.3f} s"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sorted(values.items()))
