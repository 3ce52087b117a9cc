"""The numbers that bound the prefill queue."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The numbers that bound the queue."""

    max_depth: int = 1024
    """Waiting tasks (queued and delayed) beyond which Submit is refused."""
    full_retry_after_s: float = 1.0
    """What a refused submitter is told to wait."""
    lease_ttl_s: float = 10.0
    max_attempts: int = 3
    """Leases of one task, however they end."""
    backoff_base_s: float = 2.0
    """Backoff after the first failed attempt; each further one doubles it."""
    backoff_cap_s: float = 30.0
    max_skips: int = 4
    """Times a task may be passed over for a younger one with a cached prefix; 0 = no affinity."""
    affinity_window: int = 256
    """Oldest tasks of a priority among which a cached prefix is looked for."""
    dead_kept: int = 256
    """Dead letters kept, the latest ones."""
    terminal_kept: int = 4096
    """Ended tasks remembered, the latest ones, so that a repeated Submit or Complete gets the same answer."""
    terminal_kept_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what could never work. Raises: ValueError."""
        for name in ("max_depth", "lease_ttl_s", "max_attempts", "affinity_window"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")

    def backoff_s(self, attempt: int, delay_s: float) -> float:
        """Return the wait after failed attempt number `attempt` whose holder asked for `delay_s`."""
        # The exponent is capped because 2.0 ** 1024 overflows; 2 ** 63 s is for ever already.
        return min(max(delay_s, self.backoff_base_s * 2.0 ** min(attempt - 1, 63)), self.backoff_cap_s)
