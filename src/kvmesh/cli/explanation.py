"""A routing decision as a table: every candidate with every term of its cost."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvmesh.v1 import router_pb2


def explanation_view(explanation: router_pb2.Explanation) -> RenderableType:
    """Return the candidates by ascending cost, one column per term, then the workers that were no candidates."""
    terms = sorted({name for candidate in explanation.candidates for name in candidate.terms})
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("worker", no_wrap=True)
    table.add_column("cost", justify="right")
    for name in terms:
        table.add_column(name, justify="right")
    table.add_column("lost because")
    for candidate in explanation.candidates:
        is_chosen = (candidate.worker_id, candidate.rank) == (explanation.worker_id, explanation.rank)
        name = f"{candidate.worker_id}#{candidate.rank}" if candidate.rank else candidate.worker_id
        table.add_row(
            Text(name),
            f"{candidate.cost:g}",
            *(f"{candidate.terms[term]:g}" if term in candidate.terms else "-" for term in terms),
            Text("chosen" if is_chosen else candidate.lost),
            style="bold" if is_chosen else None,
        )
    notes = [f"policy {explanation.policy}, {explanation.prompt_tokens} prompt tokens"]
    notes += [f"no candidate: {worker.worker_id}: {worker.reason}" for worker in explanation.rejected]
    if explanation.staleness_ignored:
        notes.append("most loads were stale, so staleness was ignored")
    if explanation.fallback:
        notes.append(f"the policy failed, the lowest cost was taken: {explanation.fallback}")
    return Group(table, *(Text(note) for note in notes))
