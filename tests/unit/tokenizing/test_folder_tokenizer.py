"""Tokenizers of model folders: what they read, what they write, and what they say of a folder that is broken."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.testing.tiny_tokenizer import BOS_TOKEN, CHAT_TEMPLATE, EOS_TOKEN, write_tiny_tokenizer
from kvmesh.tokenizing.folder_tokenizer import FolderTokenizer
from kvmesh.tokenizing.tokenizer import Tokenizer

BOS_ID, EOS_ID = 0, 1
FIRST_ORDINARY_ID = 5
# No special tokens, and no character that is itself the sign for bytes that are none.
TEXTS = st.text(st.characters(exclude_characters="|\ufffd", exclude_categories=["Cs"]))
TEXT = "The prefill worker 🙂 computes the blocks. Grüße, 世界!\n"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> FolderTokenizer:
    return FolderTokenizer.load(tiny_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one's own, to break."""
    return write_tiny_tokenizer(tmp_path / "model")


@pytest.fixture
def configure(folder: Path) -> Callable[..., FolderTokenizer]:
    """Change or add a JSON file of the folder, and load it."""

    def change(file: str, **values: Any) -> FolderTokenizer:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **values}))
        return FolderTokenizer.load(folder)

    return change


@pytest.fixture(scope="session")
def sentence_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary as SentencePiece models have it: words with their space in front, and bytes for all the rest."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "▁world": 257, "!": 258}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("models") / "sentence_pieces"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# --- encode


def test_encode_begins_the_sequence_with_its_special_token(tiny: FolderTokenizer) -> None:
    token_ids = tiny.encode(TEXT)

    assert token_ids.dtype == np.uint32
    assert token_ids[0] == BOS_ID
    assert token_ids[1:].tolist() == tiny.encode(TEXT, add_special_tokens=False).tolist()


def test_encode_gives_the_tokens_that_the_library_gives(tiny: FolderTokenizer, tiny_folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))

    assert tiny.encode(TEXT).tolist() == library.encode(TEXT).ids
    assert tiny.encode("", add_special_tokens=False).tolist() == []


def test_encode_never_cuts_a_prompt_to_the_length_of_a_training_run(folder: Path) -> None:
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(max_length=8)
    saved.enable_padding(length=8)
    saved.save(str(folder / "tokenizer.json"))

    tokenizer = FolderTokenizer.load(folder)

    assert len(tokenizer.encode("ships in the night " * 50)) > 50
    assert len(tokenizer.encode("a")) == 2


def test_the_tiny_folder_is_always_the_same(tiny_folder: Path, folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (tiny_folder / file).read_bytes()


# --- detokenise


@given(text=TEXTS)
def test_pieces_make_up_the_text_one_per_token(tiny: FolderTokenizer, text: str) -> None:
    token_ids = tiny.encode(text).tolist()
    detokenizer = tiny.detokenizer()

    pieces = detokenizer.push(token_ids)

    assert len(pieces) == len(token_ids)
    assert "".join(pieces) + detokenizer.flush() == text


@given(text=TEXTS, sizes=st.lists(st.integers(0, 4)))
def test_pieces_are_the_same_however_the_tokens_arrive(tiny: FolderTokenizer, text: str, sizes: list[int]) -> None:
    token_ids = tiny.encode(text).tolist()
    detokenizer = tiny.detokenizer()
    pieces: list[str] = []
    rest = token_ids

    for size in [*sizes, len(rest)]:
        pieces += detokenizer.push(rest[:size])
        rest = rest[size:]

    assert pieces == tiny.detokenizer().push(token_ids)


def test_a_character_of_several_tokens_comes_with_the_last(tiny: FolderTokenizer) -> None:
    token_ids = tiny.encode("🙂", add_special_tokens=False).tolist()

    pieces = tiny.detokenizer().push(token_ids)

    assert len(token_ids) == 4
    assert pieces == ["", "", "", "🙂"]


def test_special_tokens_have_no_text(tiny: FolderTokenizer) -> None:
    hello = tiny.encode("hello", add_special_tokens=False).tolist()

    pieces = tiny.detokenizer().push([BOS_ID, *hello, EOS_ID])

    assert "".join(pieces) == "hello"
    assert (pieces[0], pieces[-1]) == ("", "")


def test_flush_shows_an_incomplete_character_as_a_replacement(tiny: FolderTokenizer) -> None:
    first_byte = tiny.encode("🙂", add_special_tokens=False).tolist()[:1]
    detokenizer = tiny.detokenizer()

    assert detokenizer.push(first_byte) == [""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@given(token_ids=st.lists(st.integers(0, 511), max_size=15))
def test_any_few_tokens_decode_as_a_whole_would(tiny: FolderTokenizer, tiny_folder: Path, token_ids: list[int]) -> None:
    library = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    detokenizer = tiny.detokenizer()

    text = "".join(detokenizer.push(token_ids)) + detokenizer.flush()

    assert text == library.decode(token_ids, skip_special_tokens=True)


@given(token_ids=st.lists(st.integers(FIRST_ORDINARY_ID, 511), min_size=16, max_size=200))
def test_no_tokens_are_held_back_for_ever(tiny: FolderTokenizer, token_ids: list[int]) -> None:
    pieces = tiny.detokenizer().push(token_ids)

    silences = [len(list(run)) for has_text, run in itertools.groupby(pieces, bool) if not has_text]
    assert max(silences, default=0) < 16


def test_bytes_that_are_no_character_are_shown_as_replacements(tiny: FolderTokenizer) -> None:
    first_byte = tiny.encode("🙂", add_special_tokens=False).tolist()[:1]
    detokenizer = tiny.detokenizer()

    text = "".join(detokenizer.push(first_byte * 100)) + detokenizer.flush()

    assert text == "\ufffd" * 100


def test_bytes_that_undo_the_text_before_them_do_not_end_the_stream(sentence_pieces: Path) -> None:
    detokenizer = FolderTokenizer.load(sentence_pieces).detokenizer()

    # "A" was shown; with the byte after it the run is no UTF-8 any more, and the library would fail from here on.
    pieces = detokenizer.push([256, ord("A"), 0xFF, 258, 257, 258])

    assert "".join(pieces) + detokenizer.flush() == "helloA\ufffd! world!"


@pytest.mark.parametrize(("after", "text"), [([], "world!"), ([256], " world!"), ([256, 0xF0], "world!")])
def test_the_prompt_decides_whether_the_first_space_is_kept(sentence_pieces: Path, after: list[int], text: str) -> None:
    detokenizer = FolderTokenizer.load(sentence_pieces).detokenizer(after=after)

    assert "".join(detokenizer.push([257, 258])) == text


# --- chat


def test_chat_is_rendered_ready_for_the_answer(tiny: FolderTokenizer) -> None:
    prompt = tiny.render_chat([("system", "Be brief."), ("user", "Hi <b>")])

    assert prompt == "<|begin|><|system|>Be brief.<|end|><|user|>Hi <b><|end|><|assistant|>"


def test_a_rendered_chat_begins_the_sequence_once(tiny: FolderTokenizer) -> None:
    token_ids = tiny.encode(tiny.render_chat([("user", "Hi")]), add_special_tokens=False).tolist()

    assert token_ids.count(BOS_ID) == 1


def test_what_the_template_refuses_is_the_callers_to_fix(tiny: FolderTokenizer) -> None:
    with pytest.raises(FixRequestError, match="unknown role: pirate") as caught:
        tiny.render_chat([("pirate", "Arr")])

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "prompt.messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",  # undefined
        "{{ 1 / (messages | length - 1) }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",  # the sandbox
        "{{ messages.append(1) }}",  # and its immutable values
    ],
)
def test_a_template_that_fails_on_the_messages_is_a_typed_error(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source)
    tokenizer = FolderTokenizer.load(folder)

    with pytest.raises(FixRequestError) as caught:
        tokenizer.render_chat([("user", "Hi")])

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "prompt.messages")


def test_a_model_without_a_template_says_what_to_send(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = FolderTokenizer.load(folder)

    with pytest.raises(FixRequestError, match=r"send prompt\.text") as caught:
        tokenizer.render_chat([("user", "Hi")])

    assert caught.value.field == "prompt.messages"


def test_the_template_file_wins_over_the_configuration(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} from the file")

    tokenizer = FolderTokenizer.load(folder)

    assert tokenizer.render_chat([("user", "Hi")]) == "Hi from the file"


def test_of_several_named_templates_the_default_is_taken(configure: Callable[..., FolderTokenizer]) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]

    tokenizer = configure("tokenizer_config.json", chat_template=templates)

    assert tokenizer.render_chat([("user", "Hi")]) == "plain"


def test_templates_have_the_names_that_models_expect(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ bos_token }}{{ strftime_now('%%') }}{{ tools is none }}{{ add_generation_prompt }}"
    )

    prompt = FolderTokenizer.load(folder).render_chat([("user", "<ü>"), ("user", "b")])

    assert prompt == '{"role": "user", "content": "<ü>"}<|begin|>%TrueTrue'


# --- what the folder says


def test_an_absent_configuration_leaves_the_tokenizers_own_facts(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()

    tokenizer: Tokenizer = FolderTokenizer.load(folder)

    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.max_context_tokens) == (512, (), None)


def test_the_tiny_folder_says_what_it_was_written_with(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "deep" / "model", vocab_size=300, max_context_tokens=77)

    tokenizer = FolderTokenizer.load(folder)

    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.max_context_tokens) == (300, (EOS_ID,), 77)


@pytest.mark.parametrize(
    ("file", "value", "eos_token_ids"),
    [
        ("generation_config.json", [3, 2], (1, 2, 3)),
        ("generation_config.json", 4, (1, 4)),
        ("config.json", 2, (1, 2)),
        ("config.json", None, (1,)),
        ("config.json", [], (1,)),
        ("config.json", -1, (1,)),
        ("config.json", 511, (1, 511)),
    ],
)
def test_every_file_may_name_ends_of_a_sequence(
    configure: Callable[..., FolderTokenizer], file: str, value: object, eos_token_ids: tuple[int, ...]
) -> None:
    assert configure(file, eos_token_id=value).eos_token_ids == eos_token_ids


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("x", "eos_token_id is 'x': it must be a token id, a list of ids, or null"),
        ([2, None], "eos_token_id is [2, None]: it must be"),
        (1.0, "eos_token_id is 1.0: it must be"),
        (True, "eos_token_id is True: it must be"),
        (99_999, "eos_token_id 99999 is beyond the vocabulary, whose vocab_size is 512: it must be below 512"),
        ([2, 512], "eos_token_id 512 is beyond the vocabulary"),
    ],
)
def test_what_is_no_token_of_the_model_does_not_end_a_sequence(
    configure: Callable[..., FolderTokenizer], file: str, value: object, says: str
) -> None:
    configure("config.json", vocab_size=512)

    with pytest.raises(FixRequestError) as refused:
        configure(file, eos_token_id=value)

    assert (refused.value.reason, refused.value.field) == (Reason.INVALID_FIELD, "engine.model")
    assert f"/{file}: {says}" in refused.value.message


def test_a_special_token_may_be_an_object(configure: Callable[..., FolderTokenizer]) -> None:
    tokenizer = configure("tokenizer_config.json", eos_token={"content": "<|user|>", "special": True})

    assert tokenizer.eos_token_ids == (3,)


def test_the_models_vocabulary_may_exceed_the_tokenizers(configure: Callable[..., FolderTokenizer]) -> None:
    assert configure("config.json", vocab_size=640).vocab_size == 640


def test_the_smallest_limit_of_the_context_holds(configure: Callable[..., FolderTokenizer]) -> None:
    assert configure("config.json", max_position_embeddings=2048).max_context_tokens == 2048
    assert configure("tokenizer_config.json", model_max_length=int(1e30)).max_context_tokens == 2048
    assert configure("config.json", text_config={"max_position_embeddings": 99}).max_context_tokens == 99


# --- broken folders


def _remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _remove_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def _write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_remove_folder, "is no folder"),
        (_remove_tokenizer, r"has no tokenizer\.json: .*save_pretrained"),
        (_write("tokenizer.json", b"{"), r"tokenizer\.json is no tokenizer: .*download it again"),
        (_write("tokenizer_config.json", b'{"a": }'), r"tokenizer_config\.json is no JSON: .*line 1 column 7"),
        (_write("config.json", b"[]"), r"config\.json holds no JSON object"),
        (_write("generation_config.json", b"\xff"), r"generation_config\.json cannot be read"),
        (_write("chat_template.jinja", b"{% for %}"), r"chat template of .*chat_template\.jinja is broken"),
    ],
)
def test_a_broken_folder_is_named_with_the_fix(folder: Path, break_it: Callable[[Path], object], words: str) -> None:
    break_it(folder)

    with pytest.raises(FixRequestError, match=words) as caught:
        FolderTokenizer.load(folder)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "engine.model")
    assert str(folder) in caught.value.message


def test_a_template_broken_in_the_configuration_is_named_there(configure: Callable[..., FolderTokenizer]) -> None:
    with pytest.raises(FixRequestError, match=r"tokenizer_config\.json is broken"):
        configure("tokenizer_config.json", chat_template=CHAT_TEMPLATE + "{% endif %}")


def test_special_tokens_of_the_tiny_folder_have_the_ids_it_promises(tiny: FolderTokenizer) -> None:
    assert tiny.encode(BOS_TOKEN + EOS_TOKEN, add_special_tokens=False).tolist() == [BOS_ID, EOS_ID]
