"""docs/sdk.md and docs/first-hour.md as a newcomer follows them: files written, commands run, answers compared."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from itertools import pairwise
from pathlib import Path

import pytest

from kvmesh.testing.mesh_process import PROGRAM, WAIT_S, LoggingProcess, MeshProcess, clean_environment

ROOT = Path(__file__).parents[2]
BUF = ROOT / "node_modules" / ".bin" / "buf"


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of every block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)


def commands_of(page: str) -> list[object]:
    """Return the commands of a page with the answers that stand under them."""
    return [
        pytest.param(kind, command, answer, id=command.split(" -d")[0].strip()[:60])
        for (kind, command), (_, answer) in pairwise(blocks_of(page))
        if kind in ("sh", "buf")
    ]


def write_files(page: str, folder: Path) -> None:
    """Write the files of a page, each named by its first line."""
    for kind, text in blocks_of(page):
        if kind == "python":
            (folder / text.split("\n", 1)[0].removeprefix("# ")).write_text(text)


def served_command(page: str, beginning: str) -> tuple[str, ...]:
    """Return the arguments of the command of a page that serves."""
    (command,) = [text for kind, text in blocks_of(page) if kind == "" and text.startswith(beginning)]
    return tuple(command.split()[2:])


class Component(LoggingProcess):
    """`kvmesh serve module:Class` on free ports."""

    def __init__(self, *arguments: str) -> None:
        ports = ("--http-port", "0", "--grpc-port", "0")
        super().__init__("serve", *arguments, *ports, ready_event="role.started")

    @property
    def http_url(self) -> str:
        return str(self._ready["http"])


@pytest.fixture(scope="module")
def sdk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdk")
    write_files("sdk.md", folder)
    return folder


@pytest.fixture(scope="module")
def component(sdk_folder: Path) -> Iterator[Component]:
    with chdir(sdk_folder), Component(*served_command("sdk.md", "kvmesh serve")) as process:
        for path in sdk_folder.glob("*.py"):
            path.write_text(path.read_text().replace("127.0.0.1:50051", process.grpc_address))
        yield process


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcess]:
    folder = tmp_path_factory.mktemp("hour")
    write_files("first-hour.md", folder)
    with chdir(folder), MeshProcess(*served_command("first-hour.md", "kvmesh up --engine")) as process:
        yield process


def answer_to(kind: str, command: str, *, http_url: str, grpc_address: str, folder: Path) -> str:
    """Run a command of a page against what is served here."""
    if kind == "buf" and not BUF.exists():
        pytest.skip("node_modules/.bin/buf is not installed: make proto-lint")
    here = command.replace("127.0.0.1:8000", http_url.removeprefix("http://")).replace("127.0.0.1:50051", grpc_address)
    path = os.pathsep.join((str(BUF.parent), str(Path(PROGRAM).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["sh", "-c", here],
        cwd=folder,
        env=clean_environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("kind", "command", "answer"), commands_of("sdk.md"))
def test_a_command_of_the_guide_answers_as_it_says(
    component: Component, sdk_folder: Path, kind: str, command: str, answer: str
) -> None:
    found = answer_to(
        kind, command, http_url=component.http_url, grpc_address=component.grpc_address, folder=sdk_folder
    )

    assert found == answer.strip()


@pytest.mark.parametrize(("kind", "command", "answer"), commands_of("first-hour.md"))
def test_a_command_of_the_first_hour_answers_as_it_says(
    mesh: MeshProcess, tmp_path: Path, kind: str, command: str, answer: str
) -> None:
    found = answer_to(kind, command, http_url=mesh.http_url, grpc_address=mesh.grpc_address, folder=tmp_path)

    assert found == answer.strip()


def test_the_tests_of_the_guide_pass(sdk_folder: Path) -> None:
    flags = ("-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--rootdir", str(sdk_folder))

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, "test_hello.py"],
        cwd=sdk_folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
