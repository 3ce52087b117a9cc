"""The Dockerfile: what it copies is there, what it installs is locked, and who runs in it is nobody."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest


class Instruction(NamedTuple):
    stage: int
    word: str
    rest: str


@pytest.fixture
def instructions(root: Path) -> list[Instruction]:
    """Return the instructions of the Dockerfile, with the stage of each from 0."""
    text = re.sub(r"^#.*\n", "", (root / "deploy/Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line]
    stages = [sum(line.startswith("FROM ") for line in lines[: index + 1]) - 1 for index in range(len(lines))]
    return [Instruction(stage, *line.split(maxsplit=1)) for stage, line in zip(stages, lines, strict=True)]


def rests(instructions: list[Instruction], word: str, *, stage: int | None = None) -> list[str]:
    return [each.rest for each in instructions if each.word == word and stage in (None, each.stage)]


def test_what_is_copied_is_there_and_nothing_else_is_sent(root: Path, instructions: list[Instruction]) -> None:
    copied = [name for rest in rests(instructions, "COPY", stage=0) for name in rest.split()[:-1]]
    ignored, *sent = [
        line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith(("#", "**/"))
    ]

    assert [name for name in copied if not (root / name).exists()] == []
    assert ignored == "*"
    assert sorted(sent) == sorted(f"!{name}" for name in copied)


def test_what_the_package_is_built_of_is_copied(root: Path, instructions: list[Instruction]) -> None:
    copied = {name for rest in rests(instructions, "COPY", stage=0) for name in rest.split()[:-1]}
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = {
        name.partition("/")[0] for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    }

    assert copied == {
        "pyproject.toml",
        "requirements.lock",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *packages,
    }


def test_what_is_installed_is_in_the_lock_file_with_its_hash(instructions: list[Instruction]) -> None:
    installs = [
        shlex.split(command)[1:]
        for rest in rests(instructions, "RUN")
        for command in rest.split("&&")
        if "pip install" in command
    ]

    assert installs == [
        ["install", "--require-hashes", "--only-binary=:all:", "-r", "requirements.lock"],
        ["install", "--no-deps", "."],
    ]


def test_the_image_itself_has_no_build_step_and_runs_as_nobody(root: Path, instructions: list[Instruction]) -> None:
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    (user,) = rests(instructions, "USER", stage=1)

    assert len(rests(instructions, "FROM")) == 2
    assert rests(instructions, "RUN", stage=1) == []
    assert all(int(number) >= 10_000 for number in user.split(":"))
    assert [re.findall(r'"(.+?)"', rest) for rest in rests(instructions, "ENTRYPOINT")] == [[*scripts]]
