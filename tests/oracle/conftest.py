"""The oracle: NVIDIA Dynamo's router core, in an interpreter of its own, asked in batches."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
WHY_SKIPPED = "the oracle is not installed: `make install-oracle` (Linux on x86-64)"


@pytest.fixture(scope="session")
def ask() -> Iterator[Callable[[str, list[Any]], list[Any]]]:
    """Return `ask(what, cases)`: one answer per case; what there is to ask is at the end of peer.py."""
    if not PYTHON.exists():
        pytest.skip(WHY_SKIPPED)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
    command = [PYTHON, Path(__file__).with_name("peer.py")]
    peer = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    assert peer.stdout is not None
    hears, says = peer.stdin, peer.stdout

    def ask_peer(what: str, cases: list[Any]) -> list[Any]:
        hears.write(json.dumps({"ask": what, "cases": cases}) + "\n")
        hears.flush()
        line = says.readline()
        assert line, "the oracle died: its last words are on stderr"
        answers: list[Any] = json.loads(line)
        assert len(answers) == len(cases)
        return answers

    try:
        if json.loads(says.readline() or "null") is None:
            pytest.skip(WHY_SKIPPED)
        yield ask_peer
    finally:
        hears.close()
        try:
            peer.wait(timeout=5)
        except subprocess.TimeoutExpired:  # a test was ended while it waited for an answer
            peer.kill()
            peer.wait()
        says.close()
