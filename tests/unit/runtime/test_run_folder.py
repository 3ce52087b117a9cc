"""Folders of processes: removed by their owner, or by the next one where the owner was killed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmesh.runtime.run_folder import RunFolder

HOLD = "import sys, pathlib; from kvmesh.runtime.run_folder import RunFolder; f = RunFolder(pathlib.Path(sys.argv[1]));"


def test_a_folder_is_there_until_it_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.path / "settings.json").write_text("{}")
    existed = folder.path.is_dir()

    folder.remove()
    folder.remove()

    assert existed
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_process_that_lives_stays(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)

    second = RunFolder(tmp_path)

    assert first.path.is_dir()
    assert first.path != second.path
    first.remove()
    second.remove()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD} print(f.path, flush=True); sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with killed:
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        existed = left.is_dir()
        killed.kill()

    folder = RunFolder(tmp_path)

    assert existed
    assert not left.exists()
    assert list(tmp_path.iterdir()) == [folder.path]
    folder.remove()


def test_what_could_not_be_removed_whole_is_tried_again_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "kvmesh-run-left"
    (left / "etcd").mkdir(parents=True)
    (left / "owner.lock").touch()

    with monkeypatch.context() as busy:
        busy.setattr(os, "rmdir", _refuse)  # as while another process still writes there
        RunFolder(tmp_path).remove()
    remained = left.exists()
    last = RunFolder(tmp_path)

    assert remained
    assert list(tmp_path.glob("kvmesh-run-left")) == []
    last.remove()


def _refuse(*args: object, **named: object) -> None:
    raise OSError(errno.ENOTEMPTY, "Directory not empty")
