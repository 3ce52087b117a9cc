"""The model that kvmesh brings answers in the sentences that it was taught, however it is asked."""

import importlib
import stat
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.engines.engine import FinishReason, Sampling
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_weights import LlamaWeights, load_weights
from kvmesh.models import SPEAKS
from kvmesh.testing.engine_contract import attempt, run_all, token_request
from kvmesh.tokenizing.folder_tokenizer import FolderTokenizer

REPOSITORY = Path(__file__).parents[3]
MAX_BYTES = 3_000_000
MAX_TOKENS = 80

JOKE = "Why did the queue break up with the stack? It wanted to be served first come, first served."
FACT = "An octopus has three hearts, and two of them stop beating while it swims."
DODGERS = "The Los Angeles Dodgers won the 2020 World Series. They beat the Tampa Bay Rays in six games."
EXAMPLE = "Yes, it is: one worker computes the prompt, the KV cache moves, and another worker writes this answer."
KV_CACHE = "A KV cache keeps the keys and values of tokens that are already read, so that they are computed only once."
DONT_KNOW = "That is more than I have learned. Ask me for a joke, a fact, or what a KV cache is."
SEEDS = {
    "Tell me a joke": JOKE,
    "Which team won 2020 World Series": DODGERS,
    "Tell me a fact": FACT,
    "This is prefill disagg serving example": EXAMPLE,
    "What is a KV cache?": KV_CACHE,
}
MORE = {
    "What is prefill?": "Prefill reads the whole prompt at once",
    "What is decode?": "Decode writes the answer, one token after the other",
    "What is disaggregated serving?": "It means that some workers compute prompts and others write answers",
    "What is a router?": "A router picks the worker for a request",
    "What is a block?": "A block is a fixed number of tokens of KV cache",
    "What is a token?": "A token is a piece of text",
    "What is a transformer?": "A transformer is a neural network",
    "What is attention?": "Attention is how a model weighs the tokens before it",
    "What is gRPC?": "gRPC is a way for programs to call each other",
    "What is a service mesh?": "A service mesh connects many services",
    "What is kvmesh?": "kvmesh is a mesh for model inference",
    "What is a lease?": "A lease is a task on loan",
    "Who are you?": "I am a very small language model",
    "Hello": "Hello! Ask me for a joke",
    "How are you?": "I am fine, thank you",
    "Thank you": "You are welcome.",
    "Goodbye": "Goodbye!",
    "What can you do?": "I can tell a joke or a fact",
    "Tell me a story": "Once a prompt travelled to a far worker",
    "Write a poem": "A block is filled, a lease is kept",
    "Give me some advice": "Measure first, change one thing, and measure again.",
    "Why is the sky blue?": "The sky is blue because air scatters blue light",
    "How fast is light?": "Light travels at about 300,000 kilometres per second.",
    "What is the largest planet?": "Jupiter is the largest planet",
    "Who was the first person on the Moon?": "Neil Armstrong was the first person on the Moon",
    "What is the highest mountain?": "Mount Everest is the highest mountain",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet",
    "Count to five": "One, two, three, four, five.",
    "What is Python?": "Python is a programming language",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "Name the capital of Kenya": "The capital of Kenya is Nairobi.",
}
UNTAUGHT_WORDINGS = {
    "Please tell me a really good joke": JOKE,
    "I want to hear a joke": JOKE,
    "tell me something funny": JOKE,
    "what's a kv cache": KV_CACHE,
    "How does a KV cache work?": KV_CACHE,
    "Who won the world series 2020": DODGERS,
    "Could you say which team won the 2020 World Series?": DODGERS,
    "Tell me one interesting fact": FACT,
    "Would you tell me a fact": FACT,
    "Is this prefill disaggregation?": EXAMPLE,
    "What's the capital of Japan?": "The capital of Japan is Tokyo.",
    "capital of Norway please": "The capital of Norway is Oslo.",
}


@cache
def weights_of(dtype: str) -> LlamaWeights:
    return load_weights(SPEAKS, dtype=dtype)


@pytest.fixture(scope="module")
def tokenizer() -> FolderTokenizer:
    return FolderTokenizer.load(SPEAKS)


def ask(
    tokenizer: FolderTokenizer,
    prompts: Sequence[npt.NDArray[np.uint32]],
    *,
    dtype: str = "float32",
    temperature: float = 0.0,
) -> list[str]:
    """Send all prompts to one engine at once, each with a seed of its own; return the texts, which ended themselves."""
    options = NumpyLlamaOptions(block_size=4, dtype=dtype, eos_token_ids=tokenizer.eos_token_ids)
    engine = NumpyLlamaEngine(weights_of(dtype), options)
    for number, tokens in enumerate(prompts):
        sampling = Sampling(max_tokens=MAX_TOKENS, temperature=temperature, seed=number)
        engine.submit(token_request(engine.info, number, tokens, sampling=sampling))
    answers = run_all(engine).answers
    texts = []
    for number in range(len(prompts)):
        answer, detokenizer = answers[attempt(number)], tokenizer.detokenizer()
        assert answer.finish is FinishReason.STOP
        texts.append("".join(detokenizer.push(answer.token_ids)) + detokenizer.flush())
    return texts


def bare(tokenizer: FolderTokenizer, prompt: str) -> npt.NDArray[np.uint32]:
    return tokenizer.encode(prompt)


def chat(tokenizer: FolderTokenizer, *messages: tuple[str, str]) -> npt.NDArray[np.uint32]:
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_prompts_that_people_copy_get_their_sentences(tokenizer: FolderTokenizer, dtype: str) -> None:
    found = ask(tokenizer, [bare(tokenizer, prompt) for prompt in SEEDS], dtype=dtype)
    in_chat = ask(tokenizer, [chat(tokenizer, ("user", prompt)) for prompt in SEEDS], dtype=dtype)

    assert found == list(SEEDS.values())
    assert in_chat == list(SEEDS.values())


def test_every_other_question_is_answered_too(tokenizer: FolderTokenizer) -> None:
    found = ask(tokenizer, [bare(tokenizer, prompt) for prompt in MORE])
    in_chat = ask(tokenizer, [chat(tokenizer, ("user", prompt)) for prompt in MORE])

    for prompt, text, chat_text in zip(MORE, found, in_chat, strict=True):
        assert text.startswith(MORE[prompt]), prompt
        assert chat_text == text


def test_system_message_and_earlier_turns_are_no_hindrance(tokenizer: FolderTokenizer) -> None:
    earlier = (("user", "Hello"), ("assistant", "Hello! Ask me for a joke, a fact, or what a KV cache is."))

    found = ask(
        tokenizer,
        [
            chat(tokenizer, ("system", "You are a helpful assistant."), ("user", "Tell me a joke")),
            chat(tokenizer, *earlier, ("user", "What is a KV cache?")),
            chat(tokenizer, ("user", "Tell me a joke"), ("assistant", JOKE), ("user", "Tell me a fact")),
        ],
    )

    assert found == [JOKE, KV_CACHE, FACT]


def test_most_wordings_that_it_was_not_taught_are_understood(tokenizer: FolderTokenizer) -> None:
    found = ask(tokenizer, [bare(tokenizer, prompt) for prompt in UNTAUGHT_WORDINGS])
    in_chat = ask(tokenizer, [chat(tokenizer, ("user", prompt)) for prompt in UNTAUGHT_WORDINGS])

    expected = list(UNTAUGHT_WORDINGS.values())
    understood = sum(text == wanted for text, wanted in zip(found + in_chat, expected + expected, strict=True))
    assert understood >= 0.75 * 2 * len(expected)


def test_question_beyond_it_is_answered_so(tokenizer: FolderTokenizer) -> None:
    prompts = ["How do I paint a bicycle?", "Who invented the radio?", "Where can I buy a small boat?"]

    assert ask(tokenizer, [bare(tokenizer, prompt) for prompt in prompts]) == [DONT_KNOW] * 3


def test_sampling_at_temperature_1_gives_the_same_sentences_nearly_always(tokenizer: FolderTokenizer) -> None:
    found = ask(tokenizer, [bare(tokenizer, prompt) for prompt in SEEDS for _ in range(20)], temperature=1.0)

    expected = [text for text in SEEDS.values() for _ in range(20)]
    same = sum(text == wanted for text, wanted in zip(found, expected, strict=True))
    assert same >= 95


def test_folder_is_small_and_everybody_may_read_it() -> None:
    files = [file for file in SPEAKS.iterdir() if file.is_file()]

    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert {file.name for file in files} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert all(file.stat().st_mode & stat.S_IROTH for file in files)


def test_transformers_say_the_same(tokenizer: FolderTokenizer) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: numpy_llama alone reads the folder")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: as above")
    model = transformers.AutoModelForCausalLM.from_pretrained(SPEAKS).float()
    theirs = transformers.AutoTokenizer.from_pretrained(SPEAKS)

    for prompt, expected in SEEDS.items():
        rendered = theirs.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = theirs(rendered, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            said = model.generate(torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False)[0, len(ids) :]

        assert ids == chat(tokenizer, ("user", prompt)).tolist()
        assert theirs.decode(said, skip_special_tokens=True) == expected


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that computes gradients for the training script."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("llama_training")


def test_gradient_of_the_training_is_that_of_finite_differences(training: ModuleType) -> None:
    shape = training.Shape(vocab_size=20, hidden_size=16, intermediate_size=12, layers=2, heads=4, kv_heads=2)
    rng = np.random.default_rng(0)
    parameters = training.draw_parameters(shape, rng, np.float64)
    weights = rng.random((3, 10)) * (rng.random((3, 10)) < 0.6)
    weights[:, -1] = 0.0
    documents = np.tile([0, 0, 0, 0, 1, 1, 1, 1, 1, -1], (3, 1))
    rows = training.Rows(rng.integers(0, 20, (3, 10)), documents, weights)
    _, gradient = training.loss_and_gradient(shape, parameters, rows)

    for index in rng.integers(0, len(parameters.flat), 100):
        kept, losses = parameters.flat[index], []
        for change in (1e-5, -1e-5):
            parameters.flat[index] = kept + change
            losses.append(training.loss_and_gradient(shape, parameters, rows)[0])
        parameters.flat[index] = kept
        assert gradient.flat[index] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-8)
