"""A model folder that both sides read: a tokenizer in which one word is one token, so that lengths are exact.

It has no weights: both sides simulate the model. Every token but the special ones has text, so that a server that
leaves out events without text still sends one per token.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = [
    "alpha", "beta", "gamma", "delta", "river", "stone", "cloud", "paper", "train", "light", "green", "seven", "table",
    "night", "north", "south", "engine", "token", "block", "cache", "route", "queue", "worker", "prefix", "tensor",
    "stream", "batch", "model", "server", "client", "packet", "signal",
]  # fmt: skip
"""What prompts are made of."""
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
"""Ids 0 to 4."""
TEMPLATE_TOKENS = 2
"""Tokens that the chat template adds to one message of a user."""
VOCAB_SIZE = 32_000
_MAX_CONTEXT_TOKENS = 131_072
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model_folder(folder: Path) -> Path:
    """Write it, always the same; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL_TOKENS, *WORDS]
    words += [f"w{number}" for number in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in _JSON_FILES.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return folder


_JSON_FILES: dict[str, dict[str, object]] = {
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": _MAX_CONTEXT_TOKENS,
        "chat_template": _CHAT_TEMPLATE,
    },
    "config.json": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": _MAX_CONTEXT_TOKENS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    },
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
}
