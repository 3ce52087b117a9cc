"""Text to tokens and back: tokenizers of model folders, a byte tokenizer, stop strings."""
