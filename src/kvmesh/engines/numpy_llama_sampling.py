"""Which token comes next: greedy, or drawn by temperature, top-k and top-p.

A draw is a pure function of logits, seed and position: neither the batch nor a preemption changes it.
"""

import numpy as np
import numpy.typing as npt

from kvmesh.engines.engine import Sampling
from kvmesh.engines.numpy_llama_weights import Floats

_U64_MASK = 2**64 - 1


def pick_token(logits: Floats, sampling: Sampling, *, seed: int, position: int) -> int:
    """Return the token at an output position; `logits` has shape (vocab_size,), `seed` stands for `sampling.seed`."""
    if sampling.temperature <= 0 or sampling.top_k == 1:
        return int(np.argmax(logits))
    order, probabilities = token_probabilities(logits, sampling)
    # The last may be short of 1 by rounding.
    rank = np.searchsorted(np.cumsum(probabilities), _fraction(seed, position), side="right")
    return int(order[min(int(rank), len(order) - 1)])


def token_probabilities(logits: Floats, sampling: Sampling) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Return the tokens that may be drawn, likeliest first, and their probabilities, which sum to 1.

    First the `top_k` likeliest are kept, then of these the fewest whose probabilities reach `top_p`.
    """
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64)
    scaled = (scaled - scaled[0]) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept]
        probabilities /= probabilities.sum()
    return order, probabilities


def _fraction(seed: int, position: int) -> float:
    """Return a number in [0, 1): Philox (Salmon et al., 2011), counted from the position."""
    drawn = np.random.Philox(key=seed & _U64_MASK, counter=position).random_raw()
    return float(int(drawn) >> 11) * 2.0**-53
