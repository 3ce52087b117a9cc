"""The settings of the router: how it chooses, whom it spares, how long it lets a request wait, what it writes down."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from kvmesh.core.admission import AdmissionOrder
from kvmesh.core.index_port import IndexMode
from kvmesh.runtime.settings_section import Seconds, Section, Weight, scalars_as_text

_OF_THE_POLICY = frozenset(
    {
        "policy", "policy_options", "overlap_credit", "prefill_scale", "request_weight", "temperature",
        "imbalance_absolute", "imbalance_relative",
    }
)  # fmt: skip


class RouterSettings(Section):
    """How the router chooses and books."""

    policy: str = Field(default="least_work", min_length=1)
    """Name of a policy that comes with the mesh or with an installed package, or MODULE:CLASS."""
    policy_options: dict[str, str] = Field(default_factory=dict)
    """Keyword arguments, as text: of a policy of your own, or knobs that only the chosen policy has."""
    overlap_credit: Weight | None = None
    """Blocks of prefill that one overlapping block saves; None, here and below = the policy's own."""
    prefill_scale: Weight | None = None
    """Weight of prefill blocks against decode blocks."""
    request_weight: Weight | None = None
    """Blocks that one active request weighs."""
    temperature: float | None = Field(default=None, ge=0, le=1_000)
    """0 = the lowest cost wins; above 0 = softmax over the range-normalised costs."""
    imbalance_absolute: int | None = Field(default=None, ge=0, le=1_000_000)
    """Active requests beyond the least busy worker's from which on one is barred; None = no guard."""
    imbalance_relative: float = Field(default=2.0, ge=1, le=1_000_000)
    """Times the least busy worker's active requests; both bounds must be passed to be barred."""
    max_block_usage: float | None = Field(default=None, ge=0, le=1_000)
    """Blocks active with the request, over a worker's total, above which it is overloaded; None = no such rule."""
    max_prefill_tokens: int | None = Field(default=None, ge=0, le=1_000_000_000)
    """Prompt tokens still to compute on a worker above which it is overloaded; None = no such rule."""
    max_requests_per_slot: float | None = Field(default=None, ge=0, le=1_000)
    """Active requests with this one, over what it runs at once, above which it is overloaded; None = no such rule."""
    max_waiting_requests: int | None = Field(default=None, ge=0, le=1_000_000)
    """Requests waiting inside a worker's engine above which it is overloaded; None = no such rule."""
    admission_wait_s: float = Field(default=0.0, ge=0, le=86_400)
    """How long Reserve waits while every eligible worker is overloaded; 0 = it refuses at once."""
    admission_order: AdmissionOrder = AdmissionOrder.FCFS
    """Who of those that wait goes first."""
    admission_max_waiting: int = Field(default=1_024, ge=1, le=100_000)
    """Requests that may wait; the next is refused at once."""
    admission_ageing_s: Seconds = 10.0
    """Under `priority`: so long a wait makes a request one priority more urgent."""
    session_ttl_s: Seconds = 600.0
    """How long after its last request a session still prefers its worker."""
    stale_after_s: Seconds = 3.0
    """Age of a worker's last load report from which on it counts as saturated."""
    reservation_ttl_s: Seconds = 30.0
    """How long a reservation lives that no report shows."""
    index: IndexMode = IndexMode.EVENTS
    """What a worker's cache is known by: its own events, what was routed to it, or nothing."""
    approximate_ttl_s: Seconds = 120.0
    """How long a routed prompt counts as cached under `index = approximate`."""
    index_max_pairs: int = Field(default=20_000_000, ge=1, le=1_000_000_000)
    """(worker rank, block) pairs that the index holds at most."""
    decision_log: Path | None = None
    """File to which every decision is written, one JSON line each; None = none."""
    decision_log_max_mb: float = Field(default=64.0, ge=0.01, le=100_000)
    """Size at which the file becomes FILE.1, in place of the one before."""
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Makes the picks repeatable; None = drawn at the start."""

    @field_validator("policy_options", mode="before")
    @classmethod
    def _write_scalars_as_text(cls, value: object) -> object:
        return scalars_as_text(value)

    def of_the_policy(self) -> dict[str, Any]:
        """Return the settings that the policy is made of, so that it can be made again elsewhere."""
        return self.model_dump(mode="json", include=set(_OF_THE_POLICY))
