"""How a component of the SDK stands in discovery: a worker record whose metadata says which it is."""

from collections.abc import Mapping

from kvmesh.core.roster import WorkerRecord, WorkerRole

_NAMESPACE, _COMPONENT, _CONTRACT, _EVENTS = "sdk.namespace", "sdk.component", "sdk.contract", "sdk.events"
_YES = "1"


def component_metadata(namespace: str, component: str, *, contract: str, says_events: bool) -> Mapping[str, str]:
    """Return the metadata of a component's record; `says_events`: it serves WorkerEvents."""
    found = {_NAMESPACE: namespace, _COMPONENT: component, _CONTRACT: contract}
    return found | ({_EVENTS: _YES} if says_events else {})


def address_of(record: WorkerRecord) -> tuple[str, str]:
    """Return (namespace, component): of the SDK as declared, else the mesh's namespace and the role."""
    if record.role is WorkerRole.COMPONENT:
        return record.metadata.get(_NAMESPACE, ""), record.metadata.get(_COMPONENT, "")
    return record.namespace, record.role.value


def contract_text(record: WorkerRecord) -> str:
    """Return its contract, "" where it has none."""
    return record.metadata.get(_CONTRACT, "")


def says_events(record: WorkerRecord) -> bool:
    """Tell whether it serves WorkerEvents."""
    return record.role.is_worker or record.metadata.get(_EVENTS) == _YES
