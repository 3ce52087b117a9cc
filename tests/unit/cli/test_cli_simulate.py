"""`kvmesh simulate`, from its flags to its output."""

import json
import os
import sys
from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner

from kvmesh.cli.options import CommandFailed
from kvmesh.cli.simulate import simulate

ROWS = [
    {"timestamp": 0, "input_length": 1_000, "output_length": 5, "hash_ids": [1, 2]},
    {"timestamp": 400, "input_length": 1_100, "output_length": 5, "hash_ids": [1, 3, 4]},
    {"timestamp": 900, "input_length": 1_000, "output_length": 5, "hash_ids": [1, 2]},
]
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(simulate)


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, ROWS)))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def failure(*arguments: object) -> CommandFailed:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False)
    assert isinstance(result.exception, CommandFailed), result.output
    return result.exception


def test_json_has_the_figures_of_every_policy_in_the_order_asked(trace: Path) -> None:
    (least_work, turns) = json.loads(
        run(trace, "--json", "--workers", 2, "--policy", "least_work", "--policy", "round_robin")
    )

    assert (least_work["policy"], turns["policy"]) == ("least_work", "round_robin")
    # the second prompt shares 8 blocks of 64 with the first, the third all its 15 full ones
    assert least_work["reuse"] == pytest.approx((512 + 960) / 3_100, abs=1e-6)
    assert turns["reuse"] == pytest.approx(960 / 3_100, abs=1e-6)
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        assert set(least_work[name]) == {"mean", "p50", "p90", "p99"}
    assert least_work["balance"] >= 1


def test_the_table_has_a_line_per_policy(trace: Path) -> None:
    lines = run(trace, "--policy", "random", "--policy", "least_loaded").splitlines()

    assert lines[0].split()[:3] == ["policy", "reuse", "balance"]
    assert [line.split()[0] for line in lines[1:3]] == ["random", "least_loaded"]


def test_file_order_counts_the_blocks_of_the_trace(trace: Path) -> None:
    (figures,) = json.loads(
        run(
            trace,
            "--json",
            "--workers",
            1,
            "--blocks",
            "unbounded",
            "--block-size",
            512,
            "--order",
            "file",
            "--policy",
            "kv_aware",
        )
    )

    assert figures["reuse"] == pytest.approx(3 / 7, abs=1e-6)
    assert figures["uncached"] == [4]


def test_the_same_seed_prints_the_same(trace: Path) -> None:
    arguments = (trace, "--json", "--policy", "random", "--seed", 5)

    assert run(*arguments) == run(*arguments)


def test_limit_takes_the_first_requests(trace: Path) -> None:
    (figures,) = json.loads(run(trace, "--json", "--limit", 1, "--policy", "kv_aware"))

    assert (figures["requests"], figures["reuse"]) == (1, 0)


def test_a_plot_is_written_beside_the_figures(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    run(trace, "--policy", "kv_aware", "--plot", tmp_path / "plot.png")

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "none.jsonl")])

    assert result.exit_code == 2
    assert "none.jsonl" in result.output


def test_a_bad_row_is_named_by_its_line(trace: Path) -> None:
    trace.write_bytes(trace.read_bytes() + b"\n" + orjson.dumps({**ROWS[0], "timestamp": 950, "input_length": 5_000}))

    failed = failure(trace)

    assert failed.exit_code == 2
    assert "line 4: hash_ids" in failed.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--policy", "least_wrok"], "least_work", id="an unknown policy, with a close name"),
        pytest.param(["--block-size", "100"], "does not divide", id="a block size that does not fit the trace's"),
        pytest.param(["--blocks", "4"], "request 1 of the trace needs 16 blocks", id="a pool too small for a request"),
        pytest.param(["--order", "file", "--prefill", "1"], "order time", id="prefill workers where nothing queues"),
        pytest.param(["--plot", "figure.txt"], ".png, .svg or .pdf", id="a plot of no known format"),
        pytest.param(["--plot", "no/such/folder/figure.png"], "no folder", id="a plot into nowhere"),
    ],
)
def test_what_cannot_be_is_said(trace: Path, arguments: list[str], said: str) -> None:
    pytest.importorskip("matplotlib")

    failed = failure(trace, *arguments)

    assert failed.exit_code == 2
    assert said in failed.message


def test_a_number_of_blocks_that_is_none_is_refused(trace: Path) -> None:
    result = CliRunner().invoke(app, [str(trace), "--blocks", "many"])

    assert result.exit_code == 2
    assert "unbounded" in result.output


@pytest.mark.parametrize(
    ("flag", "value", "range_"),
    [
        ("--workers", 0, "1 to 10000"),
        ("--workers", 100_000_000, "1 to 10000"),
        ("--prefill", 10_001, "0 to 10000"),
        ("--speed", "inf", "0.001 to 1000000"),
        ("--speed", "nan", "0.001 to 1000000"),
    ],
)
def test_a_number_out_of_range_is_refused_at_once(trace: Path, flag: str, value: object, range_: str) -> None:
    result = CliRunner().invoke(app, [str(trace), flag, str(value)])

    assert result.exit_code == 2
    assert f"{value} is out of range: {range_}" in result.output


def test_a_policy_of_ones_own_is_simulated(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_worker.py").write_text(
        "class First:\n    def select(self, query, candidates, rng):\n        return candidates[0].worker\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    (figures,) = json.loads(run(trace, "--json", "--workers", 2, "--policy", "first_worker:First"))

    assert figures["uncached"][1] == 0
    assert figures["fallbacks"] == 0


POLICIES = """
class First:
    def __init__(self, weight):
        self.name = f"first {weight}"

    def select(self, query, candidates, rng):
        return candidates[0].worker


class Raises:
    def select(self, query, candidates, rng):
        raise RuntimeError("no idea")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with policies of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "simulated_policies", raising=False)
    (tmp_path / "simulated_policies.py").write_text(POLICIES)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_a_policy_that_raises_is_warned_of(trace: Path) -> None:
    result = CliRunner().invoke(app, [str(trace), "--json", "--policy", "simulated_policies:Raises"])

    assert json.loads(result.stdout)[0]["fallbacks"] == 3
    assert "3 of 3 requests went by least cost" in result.stderr
    assert "no idea" in result.stderr


@pytest.mark.usefixtures("folder")
def test_an_option_goes_to_the_policies_that_have_it(trace: Path) -> None:
    policies = ("--policy", "round_robin", "--policy", "simulated_policies:First", "--policy", "least_work")

    found = json.loads(
        run(trace, "--json", *policies, "--policy-option", "weight=7", "--policy-option", "crowd_weight=0.5")
    )

    assert [figures["policy"] for figures in found] == ["round_robin", "first 7", "least_work"]


def test_the_weights_are_the_settings(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (trace, "--json", "--workers", 4, "--policy", "kv_aware", "--seed")
    usual = {json.loads(run(*arguments, seed))[0]["reuse"] for seed in range(3)}
    monkeypatch.setenv("KVMESH_ROUTER__OVERLAP_CREDIT", "0")

    blind = {json.loads(run(*arguments, seed))[0]["reuse"] for seed in range(3)}

    # nothing runs any more when the next request comes: without a credit all cost the same, and the draw decides
    assert usual == {round((512 + 960) / 3_100, 6)}
    assert min(blind) < min(usual)


def test_the_policy_of_the_settings_is_simulated_where_no_flag_names_one(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = json.loads(run(trace, "--json"))
    monkeypatch.setenv("KVMESH_ROUTER__POLICY", "random")

    (figures,) = json.loads(run(trace, "--json"))

    assert [each["policy"] for each in usual] == ["round_robin", "kv_aware", "least_work"]
    assert figures["policy"] == "random"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KVMESH_ROUTER__OVERLAP_CREDIT", "much", "router.overlap_credit = 'much'"),
        ("KVMESH_ROUTER__OVERLAP_CREDITS", "1", "KVMESH_ROUTER__OVERLAP_CREDIT"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    trace: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)

    failed = failure(trace)

    assert failed.exit_code == 2
    assert said in failed.message


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        (("kv_aware",), "kv_aware has no option 'nothing'"),
        (("kv_aware", "random"), "none of kv_aware, random has an option 'nothing'"),
    ],
)
def test_an_option_that_no_policy_has_is_refused(trace: Path, policies: tuple[str, ...], said: str) -> None:
    flags = [flag for policy in policies for flag in ("--policy", policy)]

    failed = failure(trace, *flags, "--policy-option", "nothing=1")

    assert failed.exit_code == 2
    assert said in failed.message


def test_a_policy_that_reads_prompts_is_refused(trace: Path) -> None:
    failed = failure(trace, "--policy", "kv_aware", "--policy", "prompt_similarity")

    assert failed.exit_code == 2
    assert "prompt_similarity compares what prompts say" in failed.message


def test_plots_without_matplotlib_name_the_extra(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert "kvmesh[plot]" in failure(trace, "--plot", "figure.png").message
