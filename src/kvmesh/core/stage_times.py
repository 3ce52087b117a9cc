"""How long the stages of a decision take, told to whoever measures."""

from collections.abc import Callable


class StageTimes:
    """Laps from `begin` on; nothing at all without a timer."""

    def __init__(self, timer: Callable[[], float] | None, observe: Callable[[str, float], None] | None) -> None:
        """Read `timer`, in seconds, and give each lap to `observe` by the name of the stage; both or neither."""
        assert (timer is None) == (observe is None), "a timer needs an observer, and the other way round"
        self._timer = timer
        self._observe = observe
        self._began = self._last = 0.0

    def begin(self) -> None:
        """Start the first lap."""
        if self._timer is not None:
            self._began = self._last = self._timer()

    def end(self, stage: str) -> None:
        """End the lap of a stage and start the next."""
        if self._timer is not None and self._observe is not None:
            now = self._timer()
            self._observe(stage, now - self._last)
            self._last = now

    def end_all(self) -> None:
        """Tell the time since `begin` as the stage `total`."""
        if self._timer is not None and self._observe is not None:
            self._observe("total", self._timer() - self._began)
