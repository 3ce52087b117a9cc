"""A folder for the life of one process, and the end of those whose process was killed before it removed its own."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "kvmesh-run-"
_LOCK = "owner.lock"


class RunFolder:
    """An empty folder, held by a lock that the kernel frees when this process ends, however it does."""

    def __init__(self, parent: Path | None = None) -> None:
        """Make it in `parent`, by default where the system keeps temporary files, and remove what others left there."""
        parent = parent or Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it and what is in it. Idempotent."""
        _remove(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            fd = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(lock.parent)
            finally:
                os.close(fd)


def _remove(folder: Path) -> None:
    """Remove a folder, its lock last: what a process still writes to stays, and is found by the next one."""
    with contextlib.suppress(OSError):
        for each in folder.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
            elif each.name != _LOCK:
                each.unlink()
        shutil.rmtree(folder)
