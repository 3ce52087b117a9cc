"""What the documents list is what the code has."""

import re
from pathlib import Path

from kvmesh.core.remote_prefill import RemotePrefillReason
from kvmesh.core.waits import Waits
from kvmesh.wire.error_catalog import CATALOG, HTTP_STATUS

DOCS = Path(__file__).parents[2] / "docs"


def test_errors_lists_every_reason_with_its_codes() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| (\d+) \| `(\w+)` \| (yes|no) \|", (DOCS / "errors.md").read_text(), re.M
    )

    assert rows == [
        (
            reason.value,
            entry.code.name,
            str(HTTP_STATUS[entry.code]),
            entry.openai_code,
            "yes" if entry.retryable else "no",
        )
        for reason, entry in CATALOG.items()
    ]


def test_architecture_lists_every_wait_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `waits\.(\w+)` \| ([\d.]+) s", (DOCS / "architecture.md").read_text(), re.M))

    assert rows == {name: f"{getattr(Waits(), name):g}" for name in Waits.__slots__}


def test_architecture_lists_every_reason_of_a_prefill_decision() -> None:
    text = (DOCS / "architecture.md").read_text()

    assert [reason.name.lower() for reason in RemotePrefillReason if f"`{reason.name.lower()}`" not in text] == []
