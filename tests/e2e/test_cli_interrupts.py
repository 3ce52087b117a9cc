"""Ctrl-C before there is a mesh: while the program's modules load."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvmesh.testing.mesh_process import WAIT_S, clean_environment

ROOT = Path(__file__).parents[2]
INTERRUPTED_IMPORT = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
raise ImportError("the signal was lost")
"""


@pytest.mark.parametrize("module", ["typer", "uvloop"], ids=["of the command line", "of the mesh"])
def test_ctrl_c_during_the_imports_ends_quietly_with_130(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(INTERRUPTED_IMPORT)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entry_module, _, function = scripts["kvmesh"].partition(":")
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    program = f"import sys; sys.path[:0] = {path!r}; from {entry_module} import {function}; {function}()"

    ended = subprocess.run(
        [sys.executable, "-c", program, "up", "--http-port", "0", "--grpc-port", "0"],
        env=clean_environment(), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip

    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, "", "")
