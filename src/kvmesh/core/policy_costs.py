"""Whether what a policy says that its candidates cost can be compared: nothing compares with NaN."""

import math

from kvmesh.core.candidate_columns import ScoreColumns
from kvmesh.core.candidates import Selection


def fault_of_costs(selection: Selection) -> str:
    """Return what is wrong with the scores, after the policy's name; "" = nothing.

    Raises: whatever scores that are none raise.
    """
    scores = selection.scores
    if isinstance(scores, ScoreColumns) and not math.isnan(scores.costs.max()):  # NaN wins every max
        return ""
    for scored in scores:
        if math.isnan(scored.cost):
            return f"gave {scored.worker.worker_id} a cost of nan"
    return ""
