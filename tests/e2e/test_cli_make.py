"""`make` tells what it does, and `make run` and `make test` do what they say."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> str:
    # These tests may themselves run under make, whose variables would make this one a part of it.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=True
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("arguments", [(), ("help",)], ids=["no target", "help"])
def test_make_lists_every_target_with_what_it_does(arguments: tuple[str, ...]) -> None:
    listed = dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", make(*arguments), re.MULTILINE))

    assert listed.keys() >= {"help", "install", "run", "test", "check", "protos", "clean"}


def test_run_starts_a_mesh() -> None:
    assert make("--dry-run", "run").splitlines()[-1] == ".venv/bin/kvmesh up"


def test_test_runs_every_test_in_as_many_processes_as_it_is_told() -> None:
    program, *flags = make("--dry-run", "test", "TEST_PROCESSES=3").splitlines()[-1].split()

    assert program == ".venv/bin/pytest"
    assert flags == ["--numprocesses", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
