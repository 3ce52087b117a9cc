"""A layout on the wire has every field of the layout, under the same name."""

import dataclasses

from kvmesh.engines.engine import KvLayout
from kvmesh.v1 import generation_pb2
from kvmesh.wire.layout import describe_layout_difference, layout_to_wire

LAYOUT = KvLayout(
    dtype="float16",
    layers=2,
    block_size=16,
    kv_heads=4,
    head_dim=64,
    order="layer,kv,token,head,dim",
    model_fingerprint="f00d",
    bytes_per_block=32_768,
)


def test_layout_on_the_wire_has_every_field() -> None:
    message = layout_to_wire(LAYOUT)

    fields = {field.name: getattr(message, field.name) for field in generation_pb2.KvLayout.DESCRIPTOR.fields}
    assert fields == dataclasses.asdict(LAYOUT)


def test_layouts_that_differ_in_one_field_differ_on_the_wire() -> None:
    other = dataclasses.replace(LAYOUT, model_fingerprint="beef")

    assert layout_to_wire(LAYOUT) == layout_to_wire(dataclasses.replace(LAYOUT))
    assert layout_to_wire(LAYOUT) != layout_to_wire(other)


def test_difference_names_each_field_with_both_values() -> None:
    other = dataclasses.replace(LAYOUT, order="layer,kv,head,token,dim", model_fingerprint="beef")

    said = describe_layout_difference(layout_to_wire(LAYOUT), layout_to_wire(other))

    assert said == (
        "order 'layer,kv,token,head,dim' is wanted, 'layer,kv,head,token,dim' offered; "
        "model_fingerprint 'f00d' is wanted, 'beef' offered"
    )
