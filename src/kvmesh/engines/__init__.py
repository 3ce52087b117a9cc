"""Engines: what computes tokens and keeps a KV cache, each behind the port in `engine.py`."""
