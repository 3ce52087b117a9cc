"""`kvmesh model make-tiny`: a model to try engines with."""

import shlex
from pathlib import Path

import pytest

from kvmesh.cli.main import main
from kvmesh.runtime.engine_registry import plan_engine
from kvmesh.runtime.settings import EngineSettings


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["model", "make-tiny", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_folder_it_writes_runs_and_the_command_for_that_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a model" / "tiny"

    assert run(str(folder)) == 0
    assert run(str(folder)) == 0  # again: nothing to refuse

    assert f"kvmesh up --engine numpy_llama --model {shlex.quote(str(folder))}\n" in capsys.readouterr().out
    assert plan_engine(EngineSettings(name="numpy_llama", model=folder)).model_name == "tiny"


def test_a_folder_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")

    assert run(str(tmp_path)) == 1

    assert capsys.readouterr().err == f"error: {tmp_path} holds another model\n"


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")

    assert run(str(file)) == 1

    assert capsys.readouterr().err.startswith(f"error: {file} cannot be written: ")


@pytest.mark.parametrize("command", [["model", "--help"], ["model", "make-tiny", "--help"]])
def test_the_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command)

    assert "kvmesh model make-tiny ./tiny" in capsys.readouterr().out
