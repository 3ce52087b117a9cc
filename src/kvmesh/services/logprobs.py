"""Log probabilities on their way from an engine to a client: beside the output, and only where they were asked for."""

from collections import deque
from collections.abc import Iterable, Sequence

from kvmesh.engines.engine import TokenLogprobs
from kvmesh.tokenizing.tokenizer import Tokenizer
from kvmesh.v1 import generation_pb2


def logprobs_to_proto(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[generation_pb2.TokenLogprobs]:
    """Return what a worker sends of output tokens: ids and numbers; texts are the processor's to add."""
    return [
        generation_pb2.TokenLogprobs(
            token=generation_pb2.Logprob(token_id=token_id, logprob=known.logprob),
            top=[
                generation_pb2.Logprob(token_id=other, logprob=logprob)
                for other, logprob in zip(known.top_token_ids, known.top_logprobs, strict=True)
            ],
        )
        for token_id, known in zip(token_ids, logprobs, strict=True)
    ]


class OutputLogprobs:
    """Those of one request: each gets its texts, and is held back for as long as the text of its token is."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer tokens have no text: their clients read ids."""
        self._tokenizer = tokenizer
        self._held: deque[generation_pb2.TokenLogprobs] = deque()

    def push(self, arrived: Iterable[generation_pb2.TokenLogprobs]) -> None:
        """Take in what belongs to the tokens that arrived, in order."""
        for entry in arrived:
            self._name(entry.token)
            for likely in entry.top:
                self._name(likely)
            self._held.append(entry)

    def take(self, pieces: int) -> list[generation_pb2.TokenLogprobs]:
        """Return the entries of the next `pieces` pieces of output; text left over at the end belongs to no token."""
        return [self._held.popleft() for _ in range(min(pieces, len(self._held)))]

    def _name(self, logprob: generation_pb2.Logprob) -> None:
        if self._tokenizer is None:
            return
        logprob.text, text_bytes = self._tokenizer.token_text(logprob.token_id)
        if text_bytes is not None:
            logprob.output_bytes = text_bytes
