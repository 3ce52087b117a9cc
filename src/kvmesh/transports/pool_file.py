"""The file in which a KV pool lies in shared memory: a page of header, then the blocks. See `shared_memory`.

header    magic, version, blocks, block_bytes (little-endian), the rest of the page zero
blocks    blocks x block_bytes, in order of their ids
"""

import contextlib
import fcntl
import mmap
import os
import struct
import uuid
from hashlib import blake2b
from pathlib import Path
from urllib.parse import quote

import numpy as np

from kvmesh.transports.blocks import Pool, failed

PREFIX = "kvmesh-pool-"
_HEADER = struct.Struct("<8sIxxxxQQ")
_MAGIC = b"kvmesh\0p"
_VERSION = 1
_PAGE_BYTES = 4096
_STAT_BLOCK_BYTES = 512
_NAME_BYTES = 255
_MODE = 0o600


class OwnedPool:
    """A pool file of this process, locked as long as it is open."""

    def __init__(self, path: Path, fd: int, blocks: int, block_bytes: int) -> None:
        """Own an open, locked file; see `create`."""
        self._path = path
        self._fd = fd
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._is_published = False

    @classmethod
    def create(cls, directory: Path, blocks: int, block_bytes: int) -> "OwnedPool":
        """Make a sparse file under a name of its own. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
        size = _PAGE_BYTES + blocks * block_bytes
        try:
            path, fd = _create_locked(directory)
            try:
                os.ftruncate(fd, size)
                os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, blocks, block_bytes), 0)
                # Own file included: of two workers that allocate at once, each counts the other.
                missing = _promised_bytes(directory) - _free_bytes(directory)
                if missing > 0:
                    raise failed(f"{directory} lacks {missing} bytes for a pool of {size}")
            except BaseException:
                path.unlink(missing_ok=True)
                os.close(fd)
                raise
        except OSError as exc:
            raise failed(f"no pool of {size} bytes in {directory}: {exc}") from exc
        return cls(path, fd, blocks, block_bytes)

    def map(self) -> Pool:
        """Return the blocks, to be read and written; valid after `close` too."""
        return _map(self._fd, self._blocks, self._block_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def publish(self, agent_name: str) -> None:
        """Give the file the name by which others find it; it replaces none that is alive."""
        assert not self._is_published, "a pool is served under one name"
        path = self._path.with_name(file_name(agent_name))
        try:
            self._path.rename(path)
        except OSError as exc:
            raise failed(f"{path} cannot be served: {exc}") from exc
        self._path = path
        self._is_published = True

    def close(self) -> None:
        """Remove the file: nobody new finds it."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


class MappedPool:
    """Another process's pool, read-only."""

    def __init__(self, path: Path, fd: int, memory: Pool) -> None:
        """Hold an open file and its mapping; see `open`."""
        self.memory = memory
        self._path = path
        self._fd = fd
        self._inode = os.fstat(fd).st_ino

    @classmethod
    def open(cls, directory: Path, agent_name: str) -> "MappedPool":
        """Map what a live worker serves. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
        path = directory / file_name(agent_name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:
            raise failed(f"nobody serves KV blocks as {agent_name}: {exc}") from exc
        try:
            pool = cls(path, fd, _map(fd, *_read_header(fd, path), prot=mmap.PROT_READ))
            if not pool.is_live():
                raise failed(f"{agent_name} is dead")
        except BaseException:
            os.close(fd)
            raise
        return pool

    def is_live(self) -> bool:
        """Tell whether its owner still serves it, and it is not closed here."""
        if self._fd < 0:
            return False
        try:
            is_there = self._path.stat().st_ino == self._inode
        except OSError:
            return False
        return is_there and not _is_abandoned(self._fd)

    def close(self) -> None:
        """Forget the file; the mapping goes with the last array of it."""
        os.close(self._fd)
        self._fd = -1  # a pull that still copies asks once more whether it is live


def file_name(agent_name: str) -> str:
    """Return the name of the file of what `agent_name` serves; distinct names give distinct files."""
    name = f"{PREFIX}{quote(agent_name, safe='@')}"
    if len(name) <= _NAME_BYTES:
        return name
    digest = blake2b(agent_name.encode(), digest_size=16).hexdigest()
    return f"{name[: _NAME_BYTES - len(digest) - 1]}~{digest}"


def remove_dead(directory: Path) -> None:
    """Remove the pool files whose owners have ended without doing so."""
    for path in directory.glob(f"{PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone by now, or another user's
        try:
            if _try_lock(fd, fcntl.LOCK_EX):
                path.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _create_locked(directory: Path) -> tuple[Path, int]:
    """Create a file and lock it, again if `remove_dead` of another process came in between."""
    while True:
        path = directory / f"{PREFIX}+{uuid.uuid4().hex}"  # no file name of a served pool has a '+'
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        if _try_lock(fd, fcntl.LOCK_EX) and os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)


def _map(fd: int, blocks: int, block_bytes: int, *, prot: int) -> Pool:
    mapped = mmap.mmap(fd, _PAGE_BYTES + blocks * block_bytes, flags=mmap.MAP_SHARED, prot=prot)
    return np.frombuffer(mapped, dtype=np.uint8, offset=_PAGE_BYTES).reshape(blocks, block_bytes)


def _read_header(fd: int, path: Path) -> tuple[int, int]:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) == _HEADER.size:
        magic, version, blocks, block_bytes = _HEADER.unpack(header)
        size = _PAGE_BYTES + blocks * block_bytes
        if (magic, version) == (_MAGIC, _VERSION) and os.fstat(fd).st_size == size:
            return blocks, block_bytes
    raise failed(f"{path} is no pool of version {_VERSION}")


def _is_abandoned(fd: int) -> bool:
    """Tell whether no process holds the owner's lock."""
    if not _try_lock(fd, fcntl.LOCK_SH):
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _promised_bytes(directory: Path) -> int:
    """Count the bytes that the pools in `directory` may yet come to take."""
    promised = 0
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            promised += max(found.st_size - found.st_blocks * _STAT_BLOCK_BYTES, 0)
    return promised


def _free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
