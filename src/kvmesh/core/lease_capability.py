"""What a task needs of a prefill worker, what a worker offers, and where the two differ.

The fields are compared in one order, from the coarsest to the finest, so that a refusal names the difference that
matters: a worker of another model is not told that its dtype is wrong too.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capability:
    """What a task requires; an empty field = any. Tasks with equal requirements wait in one line."""

    model: str
    block_size: int
    """Tokens in a block."""
    dtype: str
    layout: str
    """Fingerprint of the KV layout."""
    transports: frozenset[str] = frozenset()
    """Ways in which the submitter can fetch the blocks, one of which suffices."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first field in which a worker falls short, with both values as text."""

    field: str
    required: str
    offered: str


@dataclass(frozen=True, slots=True)
class WorkerCapability:
    """What an attached prefill worker can do; without KV to hand over, only its models are set."""

    models: frozenset[str]
    block_size: int
    dtype: str
    layout: str
    transports: frozenset[str] = frozenset()

    def meets(self, requirement: Capability) -> bool:
        """Tell whether a worker with this capability can do a task with that requirement."""
        return (
            (not requirement.model or requirement.model in self.models)
            and requirement.block_size in (0, self.block_size)
            and requirement.dtype in ("", self.dtype)
            and requirement.layout in ("", self.layout)
            and (not requirement.transports or not requirement.transports.isdisjoint(self.transports))
        )

    def mismatch(self, requirement: Capability) -> Mismatch:
        """Name the first field that differs, in the order of the fields; only asked when `meets` is false."""
        if requirement.model and requirement.model not in self.models:
            return Mismatch("model", requirement.model, _listed(self.models))
        if requirement.block_size not in (0, self.block_size):
            return Mismatch("block_size", str(requirement.block_size), str(self.block_size))
        if requirement.dtype not in ("", self.dtype):
            return Mismatch("dtype", requirement.dtype, self.dtype)
        if requirement.layout not in ("", self.layout):
            return Mismatch("layout", requirement.layout, self.layout)
        return Mismatch("transport", _listed(requirement.transports), _listed(self.transports))


def closest_mismatch(offers: Iterable[WorkerCapability], requirement: Capability) -> Mismatch:
    """Sum up why none of these offers meets the requirement, from the ones that come closest to it.

    `offered` lists the values of all offers that agree up to the named field. `offers` is not empty.
    """
    fields = ("model", "block_size", "dtype", "layout", "transport")
    mismatches = [offer.mismatch(requirement) for offer in offers]
    field = max((mismatch.field for mismatch in mismatches), key=fields.index)
    nearest = [mismatch for mismatch in mismatches if mismatch.field == field]
    return Mismatch(field, nearest[0].required, _listed(mismatch.offered for mismatch in nearest))


def _listed(values: Iterable[str]) -> str:
    return ",".join(sorted(set(values)))
