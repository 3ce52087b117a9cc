"""What a class of a user's own that cannot be made is told as."""

from pathlib import Path

from kvmesh.cli.component_failure import failure_of_class

HERE = Path(__file__)


class Fails:
    def __init__(self) -> None:
        self._load()

    def _load(self) -> None:
        open(HERE / "no such file")  # noqa: SIM115  # it never opens


class Inherits(Fails):
    pass


class Demands:
    def __init__(self, size: int) -> None:
        self.size = size


def failure(cls: type) -> Exception:
    try:
        cls()
    except Exception as exc:
        return exc
    raise AssertionError("it was made")


def line_of(text: str) -> int:
    return 1 + next(at for at, line in enumerate(HERE.read_text().splitlines()) if text in line)


def test_the_class_the_error_and_the_line_of_its_own_file_are_named() -> None:
    for cls in (Fails, Inherits):
        said = failure_of_class(failure(cls), [cls])

        assert said is not None
        assert said.startswith(f"{cls.__name__} could not be made: NotADirectoryError: ")
        assert said.endswith(f"test_component_failure.py:{line_of('no such file')})")
        assert "\n" not in said


def test_a_class_that_wants_arguments_is_named_at_its_own_line() -> None:
    said = failure_of_class(failure(Demands), [Fails, Demands])

    assert said is not None
    assert said.startswith("Demands could not be made: TypeError: Demands.__init__() missing 1 required")
    assert said.endswith(f":{line_of('class Demands')})")


def test_an_error_of_ours_is_nobodys_of_the_classes() -> None:
    assert failure_of_class(ValueError("ours"), [Fails, Demands]) is None
