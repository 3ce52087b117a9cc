"""The table of a remote prefill's waits names settings, defaults, reasons, metrics and tests that there are."""

import re
from pathlib import Path

from kvmesh import telemetry
from kvmesh.core.errors import Reason
from kvmesh.runtime.settings import Settings

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| `(\w+)\.(\w+)` \| ([\d.]+) \| [^|]+ \| (\w+) \| `(\w+)` \| `(\w+)` \|$",
    (ROOT / "docs" / "operations.md").read_text(),
    re.M,
)


def test_every_wait_of_the_table_has_its_default() -> None:
    settings = Settings()

    assert len(ROWS) >= 15
    assert [
        (section, name, default)
        for section, name, default, *_ in ROWS
        if f"{getattr(getattr(settings, section), name):g}" != default
    ] == []


def test_every_wait_of_the_table_ends_in_a_known_reason_and_is_counted() -> None:
    metrics = telemetry.exposition().decode()

    assert {reason for *_, reason, _, _ in ROWS} <= set(Reason.__members__)
    assert [metric for *_, metric, _ in ROWS if f"# TYPE {metric} counter" not in metrics] == []


def test_every_wait_of_the_table_has_its_test() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))

    assert [name for *_, name in ROWS if f"def {name}(" not in tests] == []
