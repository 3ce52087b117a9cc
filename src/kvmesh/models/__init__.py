"""The models that kvmesh brings, as folders like Hugging Face's."""

from pathlib import Path

SPEAKS = Path(__file__).parent / "speaks"
"""A very small Llama that answers some sixty questions: what a mesh computes unless it is told otherwise."""
