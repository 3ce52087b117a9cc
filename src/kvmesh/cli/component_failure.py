"""What a class of a user's own raised while it was made, in one line; the traceback is for who asks for it."""

import inspect
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType

from kvmesh import telemetry

_log = telemetry.logger(__name__)


def failure_of_class(error: BaseException, classes: Sequence[type]) -> str | None:
    """Return which of the classes failed, how, and where in its file; None where none of them had a part in it."""
    frames = list(_frames(error))
    for cls in classes:
        within = [at for at, (code, _) in enumerate(frames) if _is_of(cls, code)]
        if within:
            code, _ = frames[within[0]]
            own = [line for other, line in frames[within[0] :] if other.co_filename == code.co_filename]
            where = f"{_short(code.co_filename)}:{own[-1]}"
        elif isinstance(error, TypeError) and str(error).startswith(f"{cls.__qualname__}."):  # it was not even entered
            where = f"{_short(inspect.getfile(cls))}:{inspect.getsourcelines(cls)[1]}"
        else:
            continue
        _log.debug("component.failed", component=cls.__name__, exc_info=error)
        return f"{cls.__name__} could not be made: {_line(error)} ({where})"
    return None


def _frames(error: BaseException) -> Iterator[tuple[CodeType, int]]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        yield frame.f_code, line


def _is_of(cls: type, code: CodeType) -> bool:
    """Tell whether this is code of a method of the class, or of one it inherits from."""
    owner = code.co_qualname.rpartition(".")[0]
    return any(base.__qualname__ == owner and _file_of(base) == code.co_filename for base in cls.__mro__)


def _file_of(cls: type) -> str | None:
    try:
        return inspect.getfile(cls)
    except (TypeError, OSError):  # a class that is not written in Python
        return None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
