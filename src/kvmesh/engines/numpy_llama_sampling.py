"""Which token comes next: greedy, or drawn by temperature, top-k and top-p.

A draw is a pure function of logits, seed and position: neither the batch nor a preemption changes it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.engines.engine import Sampling, TokenLogprobs
from kvmesh.engines.numpy_llama_weights import Floats

_U64_MASK = 2**64 - 1


def pick_tokens(
    logits: Floats, samplings: Sequence[Sampling], *, seeds: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """Return a token for each row of logits (rows, vocab_size), at its output position.

    `seeds` stand for the `sampling.seed` of each: what is drawn for a row depends on nothing of the others.
    """
    tokens: list[int] = logits.argmax(axis=1).tolist()
    drawn = [row for row, sampling in enumerate(samplings) if not _is_greedy(sampling)]
    fractions = {row: _fraction(seeds[row], positions[row]) for row in drawn}
    plain = [row for row in drawn if not _is_cut(samplings[row])]
    if plain:
        picked = _pick_plain(
            logits[plain],
            temperatures=np.array([samplings[row].temperature for row in plain]),
            fractions=np.array([fractions[row] for row in plain]),
        )
        for row, token in zip(plain, picked, strict=True):
            tokens[row] = token
    for row in drawn:
        if _is_cut(samplings[row]):
            tokens[row] = _pick_cut(logits[row], samplings[row], fractions[row])
    return tokens


def token_probabilities(logits: Floats, sampling: Sampling) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Return the tokens that may be drawn, likeliest first, and their probabilities, which sum to 1.

    First the `top_k` likeliest are kept, then of these the fewest whose probabilities reach `top_p`.
    """
    order = _likeliest(logits, sampling.top_k or len(logits))
    scaled = logits[order].astype(np.float64)
    scaled = (scaled - scaled[0]) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept]
        probabilities /= probabilities.sum()
    return order, probabilities


def token_logprobs(logits: Floats, token: int, *, count: int) -> TokenLogprobs:
    """Return how likely `token` was among all (vocab_size,), and the `count` likeliest, of equals the smaller id first.

    Of the logits as they are: how a request cuts and heats the distribution it draws from changes nothing.
    """
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    # In the logits' own precision, as greedy sampling picks: the token it picks is the first here.
    top = _likeliest(logits, min(count, len(logits))) if count else np.empty(0, dtype=np.intp)
    return TokenLogprobs(float(exact[token]), tuple(top.tolist()), tuple(exact[top].tolist()))


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature <= 0 or sampling.top_k == 1


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _pick_plain(
    logits: Floats, *, temperatures: npt.NDArray[np.float64], fractions: npt.NDArray[np.float64]
) -> list[int]:
    """Draw from whole vocabularies: in order of ids, as no order of likelihood is needed to cut them."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled /= temperatures[:, np.newaxis]
    reached = np.cumsum(np.exp(scaled), axis=1)
    ids = np.sum(reached <= (fractions * reached[:, -1])[:, np.newaxis], axis=1)
    tokens: list[int] = np.minimum(ids, logits.shape[1] - 1).tolist()
    return tokens


def _pick_cut(logits: Floats, sampling: Sampling, fraction: float) -> int:
    order, probabilities = token_probabilities(logits, sampling)
    # The last may be short of 1 by rounding.
    rank = np.searchsorted(np.cumsum(probabilities), fraction, side="right")
    return int(order[min(int(rank), len(order) - 1)])


def _likeliest(logits: Floats, count: int) -> npt.NDArray[np.intp]:
    """Return the `count` likeliest tokens, likeliest first, of equals the one with the smaller id."""
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    # Sorting a whole vocabulary costs a hundred times what finding its few largest does.
    last = len(logits) - count
    candidates = np.flatnonzero(logits >= np.partition(logits, last)[last])
    order: npt.NDArray[np.intp] = candidates[np.argsort(-logits[candidates], kind="stable")[:count]]
    return order


def _fraction(seed: int, position: int) -> float:
    """Return a number in [0, 1): Philox (Salmon et al., 2011), counted from the position."""
    drawn = np.random.Philox(key=seed & _U64_MASK, counter=position).random_raw()
    return float(int(drawn) >> 11) * 2.0**-53
