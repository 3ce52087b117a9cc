"""An echo engine that a test holds still: it takes requests in, and steps only as often as it is let."""

from kvmesh.engines.echo import EchoEngine
from kvmesh.engines.engine import Engine, StepResult
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.runtime.engine_registry import EnginePlan

_HELD_STEP_S = 0.01
"""How long a held step lasts: its worker would otherwise ask again at once, and take a core for it."""


class HeldEngine(EchoEngine):
    """Each step that produces one word per request uses up one of `steps_left`."""

    def __init__(self, *, node_name: str, steps: int = 0) -> None:
        """Produce words in the first `steps` steps, then none until more are allowed."""
        super().__init__(node_name=node_name)
        self.steps_left = steps
        self._breaks = False

    def break_down(self) -> None:
        """Make the next step raise, as an engine does whose device is gone."""
        self._breaks = True

    def allow(self, steps: int) -> None:
        """Let it go on; may be called from any thread while a test is the only caller."""
        self.steps_left += steps

    def step(self) -> StepResult:
        """Produce the next word of every request, or nothing while held."""
        if self._breaks:
            raise RuntimeError("this engine was broken by a test")
        if self.steps_left <= 0:
            return StepResult(duration_s=_HELD_STEP_S)
        self.steps_left -= 1
        return super().step()


def held_plan(*, steps: int = 0) -> tuple[EnginePlan, dict[str, HeldEngine]]:
    """Return a plan for `running_mesh` and its engines by node, filled in as the mesh makes them."""
    engines: dict[str, HeldEngine] = {}

    def build(node: str, *, index: int = 0, allocate: Allocate = allocate_here) -> Engine:
        engines[node] = HeldEngine(node_name=node, steps=steps)
        return engines[node]

    return EnginePlan(model_name="held", tokenizer=None, min_uncached_tokens=1, build=build), engines
