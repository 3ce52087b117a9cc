"""KV layouts on the wire."""

from typing import Protocol

from kvmesh.v1 import generation_pb2


class Layout(Protocol):
    """The fields of an engine's KvLayout."""

    @property
    def dtype(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def order(self) -> str: ...
    @property
    def model_fingerprint(self) -> str: ...
    @property
    def bytes_per_block(self) -> int: ...


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
