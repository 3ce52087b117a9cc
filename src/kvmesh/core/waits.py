"""Every bounded wait of the mesh, in seconds, with its default and what happens when it ends."""

from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Waits:
    """The bounds; each is a setting (`waits.*`), a typed outcome and a metric (`kvmesh_wait_ended_total`)."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    route_s: float = 2.0
    """No eligible worker yet -> NO_WORKERS."""
    router_s: float = 0.2
    """Router unreachable, or slow and silent for as long again -> round robin over discovery, unbooked."""
    connect_s: float = 2.0
    """Connect to a worker -> the next worker."""
    prefill_s: float = 5.0
    """Queue unreachable, or nobody leases the task -> local prefill; also at most a quarter of what remains."""
    kv_transfer_s: float = 2.0
    """KV transfer, plus size / 100 MiB/s -> local prefill."""
    pin_s: float = 30.0
    """A pin nobody released -> PIN_EXPIRED."""
    first_token_s: float = 30.0
    """Accepted, no token yet -> WORKER_LOST, one retry elsewhere."""
    token_gap_s: float = 10.0
    """Between two tokens -> WORKER_LOST."""
    drain_s: float = 30.0
    """Draining -> the rest is cancelled with DRAINING."""
    request_s: float = 300.0
    """A client that sets no deadline -> DEADLINE."""
    exchange_write_s: float = 10.0
    """A blocked write on an exchange -> the stream is broken."""
    client_write_s: float = 30.0
    """A write to a client that does not read, on gRPC or HTTP -> SLOW_CONSUMER."""

    def __post_init__(self) -> None:
        """Refuse waits that never end or never begin. Raises: ValueError naming the field and the range."""
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value <= 86_400:
                raise ValueError(f"waits.{item.name} = {value} is out of range: above 0 and up to 86400 seconds")
