"""What log lines and metrics look like to those who read them."""

import io
import json
from collections.abc import Iterator

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from kvmesh import telemetry


@pytest.fixture(autouse=True)
def _default_logging_afterwards() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fail_with_a_prompt_at_hand() -> None:
    prompt = "".join(["dear", " diary"])
    raise ValueError(len(prompt))


def test_line_is_one_json_object_with_its_context() -> None:
    out = io.StringIO()
    telemetry.configure_logging(stream=out)
    structlog.contextvars.bind_contextvars(request_id="r-1")

    telemetry.logger("kvmesh.somewhere").warning("lease.lost", attempt=2)

    (line,) = [json.loads(text) for text in out.getvalue().splitlines()]
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "lease.lost",
        "level": "warning",
        "module": "kvmesh.somewhere",
        "request_id": "r-1",
        "attempt": 2,
    }


def test_logger_obeys_a_configuration_that_comes_after_it() -> None:
    early = telemetry.logger("kvmesh.early")
    first, second = io.StringIO(), io.StringIO()

    telemetry.configure_logging(stream=first)
    early.info("thing.done")
    telemetry.configure_logging(stream=second)
    early.info("thing.done")

    assert len(first.getvalue().splitlines()) == len(second.getvalue().splitlines()) == 1


def test_lines_below_the_level_are_not_written() -> None:
    out = io.StringIO()
    telemetry.configure_logging(level="warning", stream=out)

    log = telemetry.logger("kvmesh.somewhere")
    log.info("thing.done")
    log.error("thing.failed")

    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["thing.failed"]


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_format_follows_the_terminal_unless_it_is_said(log_format: str, stream: io.StringIO, is_json: bool) -> None:
    telemetry.configure_logging(log_format=log_format, stream=stream)

    telemetry.logger("kvmesh.somewhere").info("thing.done")

    assert stream.getvalue().startswith("{") is is_json
    assert "thing.done" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_traceback_shows_lines_and_no_values(log_format: str) -> None:
    out = io.StringIO()
    telemetry.configure_logging(log_format=log_format, stream=out)

    try:
        fail_with_a_prompt_at_hand()
    except ValueError as exc:
        telemetry.logger("kvmesh.somewhere").error("thing.failed", exc_info=exc)

    assert "fail_with_a_prompt_at_hand" in out.getvalue()
    assert "ValueError" in out.getvalue()
    assert "dear diary" not in out.getvalue()


def test_exposition_parses_and_shows_what_was_counted() -> None:
    telemetry.WAIT_ENDED.labels("test_telemetry").inc(3)

    families = {family.name: family for family in text_string_to_metric_families(telemetry.exposition().decode())}

    samples = {tuple(sample.labels.items()): sample.value for sample in families["kvmesh_wait_ended"].samples}
    assert samples[(("wait", "test_telemetry"),)] == 3


def test_metrics_of_the_mesh_are_documented_and_named_alike() -> None:
    ours = [
        family
        for family in text_string_to_metric_families(telemetry.exposition().decode())
        if not family.name.startswith(("python_", "process_"))
    ]

    assert len(ours) > 20
    assert [family.name for family in ours if not family.name.startswith("kvmesh_")] == []
    assert [family.name for family in ours if not family.documentation.endswith(".")] == []


def test_labels_are_of_low_cardinality() -> None:
    allowed = {
        "service", "method", "code", "le", "route", "status", "outcome", "wait", "policy", "reason", "remote",
        "transport", "quantile", "process", "cause", "mode", "stage", "part",
    }  # fmt: skip

    families = text_string_to_metric_families(telemetry.exposition().decode())

    labels = {
        label
        for family in families
        if family.name.startswith("kvmesh_")
        for sample in family.samples
        for label in sample.labels
    }
    assert labels <= allowed
