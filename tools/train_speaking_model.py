"""Train the small Llama of src/kvmesh/models/speaks: it answers the questions of speaking_text.py in real sentences.

    OMP_NUM_THREADS=1 .venv/bin/python tools/train_speaking_model.py src/kvmesh/models/speaks

Takes about three minutes of one core, and needs nothing that kvmesh itself does not need: the gradient is written by
hand in llama_training.py. The same seed gives the same bytes on the same processor, numpy and number of BLAS threads;
elsewhere matrix products round differently, and the weights come out different but as good.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from llama_training import AdamW, Floats, Parameters, Rows, Shape, draw_parameters, loss_and_gradient
from safetensors.numpy import save
from speaking_text import DONT_KNOW, SYSTEM_TEXTS, lessons, unknown_wording, vary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvmesh.testing.tiny_tokenizer import BOS_TOKEN, CHAT_TEMPLATE, EOS_TOKEN, ROLE_TOKENS

MAX_CONTEXT_TOKENS = 2_048
VOCAB_SIZE = 512
SHAPE = Shape(vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=320, layers=3, heads=4, kv_heads=2)
ROWS, LENGTH = 15, 128
PEAK_RATE, DECAY = 3e-3, 0.02
WARM_UP_STEPS = 40
UNKNOWN_SHARE = 0.2
"""Of the questions: those that no lesson answers."""
PLAIN_SHARE = 0.25
"""Of the others: those in a wording as it is written, without a variation."""
SHARPNESS = 4
"""The final norm is stored so many times as large, and with it every logit: who samples at a temperature of 1, as most
clients do unasked, then gets sentences too. A power of two: it changes no greedy token."""
WAITING = 24
"""Documents to choose from when the rest of a row is to be filled."""


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt, or a conversation, with its answers."""

    token_ids: list[int]
    is_answer: list[bool]
    """Which of them the model has to say by itself."""


class Lessons:
    """Draws documents as the engine will meet prompts: bare, or through the chat template."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        """Draw from `rng` alone."""
        self._tokenizer = tokenizer
        self._rng = rng
        self._lessons = lessons()
        self._bos, self._eos, self._system, self._user, self._assistant = (
            special_id(tokenizer, token) for token in (BOS_TOKEN, EOS_TOKEN, *ROLE_TOKENS)
        )

    def draw(self) -> Document:
        """Return a bare prompt, a question in a chat, or a chat of several turns."""
        rng = self._rng
        token_ids, is_answer = [self._bos], [False]

        def say(tokens: list[int], *, by_model: bool = False) -> None:
            token_ids.extend(tokens)
            is_answer.extend([by_model] * len(tokens))

        if rng.random() < 0.45:
            question, answer = self._question()
            say(self._encode(question))
            say([*self._encode(answer), self._eos], by_model=True)
            return Document(token_ids, is_answer)
        if rng.random() < 0.3:
            say([self._system, *self._encode(rng.choice(SYSTEM_TEXTS)), self._eos])
        for _ in range(1 if rng.random() < 0.75 else rng.randint(2, 3)):
            question, answer = self._question()
            say([self._user, *self._encode(question), self._eos, self._assistant])
            say([*self._encode(answer), self._eos], by_model=True)
        return Document(token_ids, is_answer)

    def _question(self) -> tuple[str, str]:
        if self._rng.random() < UNKNOWN_SHARE:
            return vary(unknown_wording(self._rng), self._rng), DONT_KNOW
        answer, wordings = self._rng.choice(self._lessons)
        if self._rng.random() < PLAIN_SHARE:  # as it stands, and most often the wording that people copy
            return self._rng.choice((wordings[0], self._rng.choice(wordings))), answer
        return vary(self._rng.choice(wordings), self._rng), answer

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def main() -> None:
    """Train, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write, e.g. src/kvmesh/models/speaks")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=2_026)
    given = parser.parse_args()
    tokenizer = train_tokenizer()
    batches = pack(Lessons(tokenizer, random.Random(given.seed)))
    parameters = draw_parameters(SHAPE, np.random.default_rng(given.seed))
    sys.stderr.write(f"{len(parameters.flat):,} weights\n")
    optimiser = AdamW(parameters, decay=DECAY)
    started, recent = time.process_time(), 0.0
    for step in range(given.steps):
        loss, gradient = loss_and_gradient(SHAPE, parameters, next(batches))
        optimiser.step(gradient, rate=learning_rate(step, given.steps))
        recent = loss if not step else 0.9 * recent + 0.1 * loss
        if step % 25 == 24:
            sys.stderr.write(f"step {step + 1}: loss {recent:.4f}, {time.process_time() - started:.0f} s of CPU\n")
    write_folder(given.folder, tokenizer, parameters)


def learning_rate(step: int, steps: int) -> float:
    """Rise to the peak, then fall along a cosine to a hundredth of it."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    share = (step - WARM_UP_STEPS) / max(steps - WARM_UP_STEPS, 1)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * share)))


def pack(source: Lessons) -> Iterator[Rows]:
    """Yield rows full of documents; what is left of a row is padding that nothing counts."""
    waiting: list[Document] = []
    while True:
        tokens = np.zeros((ROWS, LENGTH), dtype=np.int64)
        documents = np.full((ROWS, LENGTH), -1, dtype=np.int64)
        weights = np.zeros((ROWS, LENGTH), dtype=np.float32)
        for row in range(ROWS):
            used = number = 0
            while document := _take_fitting(waiting, source, LENGTH - used):
                stop = used + len(document.token_ids)
                tokens[row, used:stop] = document.token_ids
                documents[row, used:stop] = number
                weights[row, used : stop - 1] = document.is_answer[1:]
                used, number = stop, number + 1
        yield Rows(tokens, documents, weights)


def _take_fitting(waiting: list[Document], source: Lessons, room: int) -> Document | None:
    """Remove and return the first waiting document that fits, which is one of any kind while a row is empty."""
    while len(waiting) < WAITING:
        document = source.draw()
        if len(document.token_ids) <= LENGTH:
            waiting.append(document)
    for index, document in enumerate(waiting):
        if len(document.token_ids) <= room:
            return waiting.pop(index)
    return None


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE of everything that is taught."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS_TOKEN, EOS_TOKEN, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for answer, wordings in lessons() for text in (answer, answer, *wordings)]
    tokenizer.train_from_iterator([*texts, DONT_KNOW, *SYSTEM_TEXTS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, special_id(tokenizer, BOS_TOKEN))]
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that the tokenizer was trained with."""
    found = tokenizer.token_to_id(token)
    assert found is not None, f"{token} was not given to the trainer"
    return found


def write_folder(folder: Path, tokenizer: Tokenizer, parameters: Parameters) -> None:
    """Write what Hugging Face's libraries and kvmesh read; the weights as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = special_id(tokenizer, BOS_TOKEN), special_id(tokenizer, EOS_TOKEN)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": SHAPE.head_dim,
        "hidden_act": "silu",
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": SHAPE.intermediate_size,
        "max_position_embeddings": MAX_CONTEXT_TOKENS,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": SHAPE.heads,
        "num_hidden_layers": SHAPE.layers,
        "num_key_value_heads": SHAPE.kv_heads,
        "rms_norm_eps": SHAPE.norm_eps,
        "rope_theta": SHAPE.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "vocab_size": SHAPE.vocab_size,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "model_max_length": MAX_CONTEXT_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False}
    for name, content in (
        ("config.json", config), ("tokenizer_config.json", tokenizer_config), ("generation_config.json", generation),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {name: np.ascontiguousarray(tensor, dtype=np.float16) for name, tensor in hugging_face(parameters)}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def hugging_face(parameters: Parameters) -> Iterator[tuple[str, Floats]]:
    """Yield every tensor by the name it has in a Hugging Face folder."""
    q_size, kv_size = SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim
    yield "model.embed_tokens.weight", parameters["embed"]
    yield "model.norm.weight", parameters["norm"] * SHARPNESS
    for layer in range(SHAPE.layers):
        prefix = f"model.layers.{layer}"
        queries, keys, values = np.split(parameters[f"{layer}.qkv"], (q_size, q_size + kv_size))
        gate, up = np.split(parameters[f"{layer}.gate_up"], 2)
        yield from (
            (f"{prefix}.input_layernorm.weight", parameters[f"{layer}.attention_norm"]),
            (f"{prefix}.self_attn.q_proj.weight", queries),
            (f"{prefix}.self_attn.k_proj.weight", keys),
            (f"{prefix}.self_attn.v_proj.weight", values),
            (f"{prefix}.self_attn.o_proj.weight", parameters[f"{layer}.output"]),
            (f"{prefix}.post_attention_layernorm.weight", parameters[f"{layer}.mlp_norm"]),
            (f"{prefix}.mlp.gate_proj.weight", gate),
            (f"{prefix}.mlp.up_proj.weight", up),
            (f"{prefix}.mlp.down_proj.weight", parameters[f"{layer}.down"]),
        )


if __name__ == "__main__":
    main()
