"""A tiny tokenizer folder, made on the spot: what a model's folder has, without downloading one."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS_TOKEN = "<|begin|>"
EOS_TOKEN = "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role not in ['system', 'user', 'assistant'] %}
{{ raise_exception('unknown role: ' + message.role) }}
{% endif %}
{{ '<|' + message.role + '|>' + message.content + eos_token }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

_TRAINING_TEXT = (
    "A request comes in and the router asks which worker already holds the longest part of its prompt.",
    "The prefill worker computes the blocks, pins them and hands them over; the decode worker pulls them.",
    "Every wait is bounded and every decision can be explained.",
    "What is the capital of France? The capital of France is Paris.",
    "Tell me a joke about a queue. It was first in, but it came out last.",
    "Write a short story about a lighthouse keeper who counts the ships that pass in the night.",
    "The weather today is cold and clear, with a light wind from the north.",
    "def add(a, b):\n    return a + b\n",
    "One two three four five six seven eight nine ten eleven twelve.",
    "Grüße aus Köln, déjà vu à Paris, mañana en España.",
)


def write_tiny_tokenizer(folder: Path, *, vocab_size: int = 512, max_context_tokens: int = 4096) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `folder`, always the same; return the folder.

    A byte-level BPE: any text survives encode and decode, and characters may be split between tokens. Ids of the
    special tokens are 0 (begin), 1 (end), 2.. (roles). `vocab_size` is 261 to 555: there the text is used up.
    """
    special_tokens = [BOS_TOKEN, EOS_TOKEN, *ROLE_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, special_tokens.index(BOS_TOKEN))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "model_max_length": max_context_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
