"""docs/openai.md lists every field that is served, and every one that is not."""

import re
from pathlib import Path

from kvmesh.gateway import openai_unserved
from kvmesh.gateway.openai_schema import ChatRequest, CompletionRequest

ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in (Path(__file__).parents[3] / "docs" / "openai.md").read_text().splitlines()
    if line.startswith("| `")
]
CHAT, COMPLETIONS = 1, 2


def documented(column: int, *, served: bool) -> set[str]:
    """Return the fields of the rows that say something else than "no" for one API, or that say "no"."""
    return {
        name
        for row in ROWS
        if row[column] and (row[column] not in {"no", "ignored"}) == served
        for name in re.findall(r"`(\w+)`", row[0])
    }


def test_every_field_that_is_served_is_listed_under_its_api() -> None:
    assert documented(CHAT, served=True) == set(ChatRequest.model_fields)
    assert documented(COMPLETIONS, served=True) == set(CompletionRequest.model_fields)


def test_every_field_that_is_not_served_is_listed() -> None:
    unserved = openai_unserved.UNSERVED.keys() | openai_unserved.ABOUT_THE_CALLER

    assert documented(CHAT, served=False) == unserved
    assert documented(COMPLETIONS, served=False) == unserved
