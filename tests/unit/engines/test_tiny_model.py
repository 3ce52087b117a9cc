"""The tiny model is the same byte for byte on every machine, and nobody's own model is overwritten by it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from xxhash import xxh3_64_hexdigest

from kvmesh.core.errors import FixRequestError
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.tokenizing.folder_tokenizer import FolderTokenizer

WEIGHTS_DIGEST = "a2a27863adcad8ec"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_folder_has_what_a_downloaded_one_has(tmp_path: Path) -> None:
    files = contents(write_tiny_model(tmp_path / "new" / "tiny"))

    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert 400_000 < sum(map(len, files.values())) < 700_000
    assert "chat_template" in json.loads(files["tokenizer_config.json"])


def test_weights_are_the_pinned_ones(tmp_path: Path) -> None:
    files = contents(write_tiny_model(tmp_path))

    assert xxh3_64_hexdigest(files["model.safetensors"]) == WEIGHTS_DIGEST


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from kvmesh.testing.tiny_model import write_tiny_model;"
        "write_tiny_model(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], check=True, timeout=50)

    assert contents(tmp_path / "there") == contents(write_tiny_model(tmp_path / "here"))


def test_weights_spread_as_the_config_says(tmp_path: Path) -> None:
    stored = load_file(str(write_tiny_model(tmp_path) / "model.safetensors"))

    for name, tensor in stored.items():
        if tensor.ndim == 2:
            assert tensor.std() == pytest.approx(0.25, rel=0.05), name
            assert abs(tensor.mean()) < 0.02, name


def test_tokenizer_and_model_agree(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer.load(write_tiny_model(tmp_path))
    prompt = tokenizer.render_chat([("user", "Grüße, and a joke please")])
    tokens = tokenizer.encode(prompt, add_special_tokens=False)

    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.max_context_tokens) == (512, (1,), 4_096)
    assert tokens[0] == 0
    assert tokens.max() < 512


def test_writing_it_again_changes_nothing(tmp_path: Path) -> None:
    first = contents(write_tiny_model(tmp_path))

    assert contents(write_tiny_model(tmp_path)) == first


def test_other_seed_is_another_model(tmp_path: Path) -> None:
    one, two = (contents(write_tiny_model(tmp_path / str(seed), seed=seed)) for seed in (1, 2))

    assert one["model.safetensors"] != two["model.safetensors"]
    assert one["tokenizer.json"] == two["tokenizer.json"]


@pytest.mark.parametrize("present", ["config.json", "model.safetensors", "tokenizer.json"])
def test_another_model_is_never_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_bytes(b"precious")

    with pytest.raises(FixRequestError, match="holds another model"):
        write_tiny_model(tmp_path)

    assert contents(tmp_path) == {present: b"precious"}


def test_interrupted_write_is_made_good(tmp_path: Path) -> None:
    whole = contents(write_tiny_model(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole["model.safetensors"][:1000])
    (tmp_path / "generation_config.json").unlink()

    assert contents(write_tiny_model(tmp_path)) == whole
