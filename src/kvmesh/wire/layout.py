"""KV layouts on the wire."""

from typing import Protocol

from kvmesh.v1 import generation_pb2


class Layout(Protocol):
    """The fields of an engine's KvLayout."""

    @property
    def dtype(self) -> str:
        """Element type."""

    @property
    def layers(self) -> int:
        """Layers of the model."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def kv_heads(self) -> int:
        """KV heads per layer."""

    @property
    def head_dim(self) -> int:
        """Elements per head."""

    @property
    def order(self) -> str:
        """Order of the axes within a block."""

    @property
    def model_fingerprint(self) -> str:
        """What makes two models' KV interchangeable."""

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""


def layout_to_wire(layout: Layout) -> generation_pb2.KvLayout:
    """Return the contract's KvLayout; equal layouts give equal messages."""
    return generation_pb2.KvLayout(
        dtype=layout.dtype,
        layers=layout.layers,
        block_size=layout.block_size,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        order=layout.order,
        model_fingerprint=layout.model_fingerprint,
        bytes_per_block=layout.bytes_per_block,
    )


def describe_layout_difference(wanted: generation_pb2.KvLayout, offered: generation_pb2.KvLayout) -> str:
    """Name each field in which two layouts differ, with both values."""
    names = (field.name for field in generation_pb2.KvLayout.DESCRIPTOR.fields)
    values = ((name, getattr(wanted, name), getattr(offered, name)) for name in names)
    return "; ".join(
        f"{name} {ours!r} is wanted, {theirs!r} offered" for name, ours, theirs in values if ours != theirs
    )
