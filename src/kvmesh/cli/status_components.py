"""Components of the SDK in `kvmesh status`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvmesh.core.roster import WorkerRecord


def components_json(components: Mapping[str, Sequence[WorkerRecord]]) -> list[dict[str, Any]]:
    """Return them as JSON, each with its instances."""
    return [
        {
            "component": name,
            "instances": [
                {"id": one.worker_id, "epoch": one.epoch, "address": one.address, "state": _state(one)}
                for one in instances
            ],
        }
        for name, instances in components.items()
    ]


def components_table(components: Mapping[str, Sequence[WorkerRecord]]) -> RenderableType:
    """Return their table, a line per instance."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("component")
    table.add_column("instance", no_wrap=True)
    table.add_column("address", no_wrap=True)
    table.add_column("state")
    for name, instances in components.items():
        for place, one in enumerate(instances):
            table.add_row(
                Text("" if place else name),
                Text(one.worker_id),
                Text(one.address),
                Text(_state(one), style="yellow" if one.draining else "green"),
            )
    return table


def _state(record: WorkerRecord) -> str:
    return "draining" if record.draining else "ready"
