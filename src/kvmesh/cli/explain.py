"""`kvmesh explain`: the decisions of a log, taken again offline."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli import mesh_flags
from kvmesh.cli.given_settings import given_settings
from kvmesh.cli.options import CommandFailed
from kvmesh.cli.running import policy_options

if TYPE_CHECKING:
    from kvmesh.core.decision_log import Decision
    from kvmesh.core.decision_rerun import DecisionRerun, Retaken
    from kvmesh.core.ids import WorkerRank
    from kvmesh.core.policies.policy import Policy
    from kvmesh.runtime.router_settings import RouterSettings
    from kvmesh.runtime.settings import LoadedSettings, Settings

_MAX_SHOWN = 20


class _ReadsPromptsError(CommandFailed):
    """The policy cannot be asked again."""


@dataclass(slots=True)
class _Report:
    """What taking a log again came to."""

    same: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    bad_lines: list[dict[str, Any]] = field(default_factory=list)
    is_faulty: bool = False
    """A decision came out otherwise by its own policy."""
    lines: int = 0
    """Read, blank ones too."""
    as_logged: str = ""
    """Why the line asked for is shown as it was logged, not taken again; "" = it was."""

    @property
    def decisions(self) -> int:
        return self.same + len(self.different)

    def as_mapping(self) -> dict[str, Any]:
        return {
            "decisions": self.decisions,
            "same": self.same,
            "different": self.different,
            "bad_lines": self.bad_lines,
        }


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What router.decision_log wrote.", show_default=False)],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy", help="Ask this policy, with the weights of the settings in force, instead.", metavar="NAME"
        ),
    ] = None,
    policy_option: Annotated[
        list[str] | None,
        typer.Option("--policy-option", help="One option of --policy; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    config: mesh_flags.Config = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Decisions to take again at most.", metavar="N")
    ] = None,
    line: Annotated[
        int | None, typer.Option("--line", min=1, help="Show the decision of this line whole.", metavar="N")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Take the decisions of a log again and say which come out otherwise.

    Exits with 1 if a decision's own policy now decides otherwise, or if a line cannot be read.
    """
    flags = policy_options(policy_option or [])
    if policy is None and (flags or config):
        name = "--policy-option" if flags else "--config"
        raise typer.BadParameter("it is for the policy that --policy names", param_hint=name)
    asked = None if policy is None else given_settings(config, {"router.policy": policy, **flags})
    report = _Report()
    for number, retaken in _retaken(file, asked, report, until=line):
        if line is not None:
            if number == line:
                _show(number, retaken, as_json=json_output, as_logged=report.as_logged)
                raise typer.Exit(1 if asked is None and not retaken.is_same else 0)
            continue
        _note(report, number, retaken, is_own_policy=asked is None)
        if report.decisions == limit:
            break
    if line is not None:
        if report.lines < line:
            raise CommandFailed(f"{file}: no such line: the file has {report.lines}", exit_code=2)
        problem = next((f": {bad['problem']}" for bad in report.bad_lines if bad["line"] == line), "")
        raise CommandFailed(f"{file}, line {line} is no decision{problem}")
    if json_output:
        typer.echo(json.dumps(report.as_mapping()))
    else:
        _print(report)
    if report.bad_lines or report.is_faulty:
        raise typer.Exit(1)


def _retaken(
    file: Path, asked: "LoadedSettings[Settings] | None", report: _Report, *, until: int | None
) -> "Iterator[tuple[int, Retaken]]":
    """Yield each decision with the number of its line; what is no decision goes to the report."""
    from kvmesh.core.decision_rerun import DecisionRerun, Retaken
    from kvmesh.core.errors import FixRequestError

    def make(settings: Mapping[str, Any]) -> "Policy":
        return _make_policy(settings, asked)

    rerun = DecisionRerun(make, asks_another=asked is not None)
    for number, text in _lines(file):
        if until is not None and number > until:
            return
        report.lines = number
        if text.isspace():
            continue
        try:
            decision = _read(text, rerun)
        except FixRequestError as exc:
            report.bad_lines.append({"line": number, "problem": exc.message})
            continue
        if decision is not None:
            try:
                yield number, rerun.take(decision)
            except _ReadsPromptsError as exc:
                if until is None or asked is not None:
                    raise
                if number == until:
                    report.as_logged = exc.message
                    yield number, Retaken(decision, decision.selection)
            except FixRequestError as exc:
                is_of_the_line = asked is None or exc.field == "policy_settings"
                where = f"{file}, line {number}: " if is_of_the_line else ""
                raise CommandFailed(f"{where}{exc.message}", exit_code=2) from exc


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            yield from enumerate(lines, start=1)
    except OSError as exc:
        raise CommandFailed(f"{file} cannot be read: {exc.strerror}", exit_code=2) from exc


def _read(text: str, rerun: "DecisionRerun") -> "Decision | None":
    """Return the decision of a line, or None where a router started. Raises: FixRequestError."""
    from kvmesh.core.decision_log import decision_from_mapping, is_start
    from kvmesh.core.errors import FixRequestError, Reason

    try:
        line = json.loads(text)
    except ValueError as exc:
        raise FixRequestError(Reason.INVALID_FIELD, f"no JSON: {exc}") from exc
    if is_start(line):
        rerun.start_anew()
        return None
    return decision_from_mapping(line)


def _make_policy(settings: Mapping[str, Any], asked: "LoadedSettings[Settings] | None") -> "Policy":
    """Return the policy that a line names, or the one asked for. Raises: FixRequestError, CommandFailed."""
    from pydantic import ValidationError

    from kvmesh.core.errors import FixRequestError, Reason
    from kvmesh.core.policies.policy import name_of
    from kvmesh.runtime.policy_loading import load_policy, reads_prompts
    from kvmesh.runtime.router_settings import RouterSettings

    try:
        wanted = RouterSettings(**settings) if asked is None else _asked_settings(settings, asked)
    except ValidationError as exc:
        problem = f"its policy_settings are not understood: {exc}"
        raise FixRequestError(Reason.INVALID_FIELD, problem, field="policy_settings") from exc
    policy = load_policy(wanted)
    if reads_prompts(policy):
        raise _ReadsPromptsError(
            f"{name_of(policy)} cannot be asked again: it compares what prompts say, which a decision log does not "
            "hold; --policy NAME asks another",
            exit_code=2,
        )
    return policy


def _asked_settings(logged: Mapping[str, Any], asked: "LoadedSettings[Settings]") -> "RouterSettings":
    """Return the settings in force; for the line's own policy they are changes to those of the line."""
    from kvmesh.runtime.router_settings import RouterSettings

    router = asked.settings.router
    if router.policy != logged["policy"]:
        return router
    given = {
        key.split(".")[1] for key, origin in asked.origins.items() if key.startswith("router.") and origin != "default"
    }
    changes = {name: value for name, value in router.of_the_policy().items() if name in given}
    if "policy_options" in changes:
        changes["policy_options"] = {**logged.get("policy_options", {}), **changes["policy_options"]}
    return RouterSettings(**{**logged, **changes})


def _note(report: _Report, number: int, retaken: "Retaken", *, is_own_policy: bool) -> None:
    if retaken.is_same:
        report.same += 1
        return
    report.is_faulty |= is_own_policy
    report.different.append(_outcome(number, retaken))


def _outcome(number: int, retaken: "Retaken") -> dict[str, Any]:
    logged, now = retaken.decision.selection, retaken.explained()
    return {
        "line": number,
        "request_id": retaken.decision.booking.request_id if retaken.decision.booking is not None else None,
        "logged": _name(logged.worker),
        "logged_cost": logged.cost,
        "now": _name(now.worker),
        "now_cost": now.cost,
        "fault": retaken.fault,
    }


def _name(worker: "WorkerRank") -> str:
    return f"{worker.worker_id}#{worker.rank}" if worker.rank else worker.worker_id


def _print(report: _Report) -> None:
    from rich.table import Table
    from rich.text import Text

    from kvmesh.cli.console import output_console

    console = output_console()
    console.print(
        f"{report.decisions} decisions taken again: {report.same} the same, {len(report.different)} otherwise"
    )
    if report.different:
        table = Table("line", "logged", "cost", "now", "cost", "", box=None, pad_edge=False, header_style="dim")
        for row in report.different[:_MAX_SHOWN]:
            costs = ["-" if row[key] is None else f"{row[key]:g}" for key in ("logged_cost", "now_cost")]
            fault = Text(f"the policy {row['fault']}" if row["fault"] else "")
            table.add_row(str(row["line"]), Text(row["logged"]), costs[0], Text(row["now"]), costs[1], fault)
        console.print(table)
        if len(report.different) > _MAX_SHOWN:
            console.print(f"and {len(report.different) - _MAX_SHOWN} more: --json lists all")
    for bad in report.bad_lines[:_MAX_SHOWN]:
        typer.secho(f"line {bad['line']}: {bad['problem']}", fg="red", err=True)
    if len(report.bad_lines) > _MAX_SHOWN:
        typer.secho(f"and {len(report.bad_lines) - _MAX_SHOWN} more bad lines", fg="red", err=True)


def _show(number: int, retaken: "Retaken", *, as_json: bool, as_logged: str) -> None:
    from kvmesh.cli.console import output_console
    from kvmesh.cli.explanation import explanation_view
    from kvmesh.wire.routing_answers import explanation_to_proto

    selection = retaken.explained()
    explanation = explanation_to_proto(selection)
    if as_logged:
        typer.secho(f"shown as it was logged: {as_logged}", fg="yellow", err=True)
    if not as_json:
        console = output_console()
        console.print(explanation_view(explanation, width=console.width))
        return
    from google.protobuf import json_format

    whole = json_format.MessageToDict(
        explanation, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for shown, verdict in zip(whole["candidates"], selection.explain(), strict=True):
        if verdict.cost is None:
            shown["cost"] = None  # the contract has no word for it
    outcome = {**_outcome(number, retaken), "same": retaken.is_same}
    if as_logged:
        outcome |= dict.fromkeys(("now", "now_cost", "same"))
    typer.echo(json.dumps({**outcome, "explanation": whole}, indent=2))
