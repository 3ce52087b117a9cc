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


@pytest.mark.parametrize(("target", "command"), [("run", ".venv/bin/kvmesh up"), ("test", ".venv/bin/pytest")])
def test_a_target_ends_with_its_command(target: str, command: str) -> None:
    planned = make("--dry-run", target).splitlines()

    assert planned[-1] == command
