"""The models that live decode workers serve, as clients are told."""

from kvmesh.core.roster import Roster, WorkerRecord, WorkerRole
from kvmesh.v1 import frontend_pb2


def served_models(roster: Roster) -> frontend_pb2.ListModelsResponse:
    """List the models of the live decode workers, sorted by name; a context is that of the least of its workers."""
    found: dict[str, frontend_pb2.Model] = {}
    for record in roster.records(WorkerRole.DECODE):
        context = context_tokens(record)
        for name in record.models:
            model = found.setdefault(name, frontend_pb2.Model(name=name, max_context_tokens=context))
            model.workers += 1
            model.max_context_tokens = min(model.max_context_tokens, context)
    return frontend_pb2.ListModelsResponse(models=[found[name] for name in sorted(found)])


def context_tokens(record: WorkerRecord) -> int:
    """Return the longest context of a worker in tokens; 0 = it does not say."""
    return int(record.metadata.get("max_context_tokens", 0))
