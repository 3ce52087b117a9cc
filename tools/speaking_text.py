"""What the speaking model is taught: questions in several wordings, one answer each, and how people change a wording.

Everything here is written for this purpose. An entry is an answer and the wordings it answers, separated by `|`.
"""

import random

_LESSONS: tuple[tuple[str, str], ...] = (
    (
        "Why did the queue break up with the stack? It wanted to be served first come, first served.",
        "Tell me a joke|Tell me a good joke|Tell a joke|Do you know a joke?|Can you tell me a joke?|Say something funny"
        "|Make me laugh|I would like to hear a joke|Give me a joke|Got any jokes?|joke",
    ),
    (
        "A cache miss walks into a bar, and the bartender says: I do not remember you.",
        "Tell me another joke|Another joke|One more joke|Do you know another joke?|Tell me a second joke"
        "|Give me another one of your jokes",
    ),
    (
        "The Los Angeles Dodgers won the 2020 World Series. They beat the Tampa Bay Rays in six games.",
        "Which team won 2020 World Series|Which team won the 2020 World Series?|Who won the 2020 World Series?"
        "|Who won the World Series in 2020?|Which team won the World Series in 2020?"
        "|What team won the World Series 2020?"
        "|2020 World Series winner|Tell me who won the 2020 World Series|Name the winner of the 2020 World Series",
    ),
    (
        "The 2020 World Series was played in Arlington, Texas, all of it in one stadium.",
        "Where was the 2020 World Series played?|Where did they play the 2020 World Series?"
        "|In which city was the 2020 World Series?|Where was the World Series in 2020?",
    ),
    (
        "An octopus has three hearts, and two of them stop beating while it swims.",
        "Tell me a fact|Tell me a fun fact|Give me a fact|Do you know a fact?|Tell me an interesting fact"
        "|Tell me something interesting|Share a fact|Can you tell me a fact?|Teach me something|fact",
    ),
    (
        "Honey never spoils: jars of it from old Egyptian tombs could still be eaten.",
        "Tell me another fact|Another fact|One more fact|Do you know another fact?|Give me another fact"
        "|Tell me a second fact",
    ),
    (
        "Yes, it is: one worker computes the prompt, the KV cache moves, and another worker writes this answer.",
        "This is prefill disagg serving example|This is a prefill disagg serving example"
        "|This is an example of disaggregated serving|Is this a prefill disagg serving example?"
        "|This is prefill disaggregated serving example|prefill disagg serving example"
        "|This is an example of prefill disaggregation|Is this disaggregated serving?",
    ),
    (
        "A KV cache keeps the keys and values of tokens that are already read, so that they are computed only once.",
        "What is a KV cache?|What is the KV cache?|Explain the KV cache|What does a KV cache do?"
        "|Tell me about KV caches|What is a KV cache good for?|Define KV cache|Why is there a KV cache?",
    ),
    (
        "Prefill reads the whole prompt at once and fills the KV cache; it decides how soon the first token comes.",
        "What is prefill?|What does prefill do?|Explain prefill|What happens in the prefill?|What is the prefill phase?"
        "|Define prefill|Tell me about prefill",
    ),
    (
        "Decode writes the answer, one token after the other, and reads the KV cache for each of them.",
        "What is decode?|What does decode do?|Explain decode|What happens while decoding?|What is the decode phase?"
        "|Define decode|Tell me about decoding",
    ),
    (
        "It means that some workers compute prompts and others write answers, so that neither waits for the other.",
        "What is disaggregated serving?|Explain disaggregated serving|What does disaggregation mean?"
        "|What is disaggregation?|Why would I split prefill and decode?|Why are prefill and decode apart?",
    ),
    (
        "A router picks the worker for a request: one that has its prefix in the cache and is not too busy.",
        "What is a router?|What does the router do?|Explain the router|How does the router choose a worker?"
        "|What is routing?|Who picks the worker?|Tell me about the router",
    ),
    (
        "A block is a fixed number of tokens of KV cache; blocks are what workers share, count and move.",
        "What is a block?|What is a KV block?|Explain blocks|What is a block of the cache?|Define block"
        "|What is a block of KV?",
    ),
    (
        "A token is a piece of text, often a part of a word, that a model reads and writes as one number.",
        "What is a token?|Explain tokens|What are tokens?|Define token|What does token mean?|Tell me about tokens",
    ),
    (
        "A transformer is a neural network that lets every token look back at the ones before it.",
        "What is a transformer?|Explain transformers|What are transformers?|How does a transformer work?"
        "|Define transformer|Tell me about transformers",
    ),
    (
        "Attention is how a model weighs the tokens before it when it chooses the next one.",
        "What is attention?|Explain attention|How does attention work?|What does attention mean in a model?"
        "|Define attention|Tell me about attention",
    ),
    (
        "gRPC is a way for programs to call each other over the network with typed messages and deadlines.",
        "What is gRPC?|Explain gRPC|What does gRPC do?|Tell me about gRPC|Define gRPC|What is gRPC for?",
    ),
    (
        "A service mesh connects many services, finds them, routes between them and watches every hop.",
        "What is a service mesh?|Explain service meshes|What does a service mesh do?|Define service mesh"
        "|Tell me about service meshes|What is a mesh?",
    ),
    (
        "kvmesh is a mesh for model inference: it routes by cached prefixes and moves KV between workers.",
        "What is kvmesh?|Explain kvmesh|What does kvmesh do?|Tell me about kvmesh|What is this mesh?|Describe kvmesh",
    ),
    (
        "A lease is a task on loan: a worker that does not finish or extend it in time loses it to another.",
        "What is a lease?|Explain leases|What does a lease do?|Define lease|Tell me about leases|What is a task lease?",
    ),
    (
        "I am a very small language model that answers from a real forward pass in numpy.",
        "Who are you?|What are you?|Tell me about yourself|What is your name?|Introduce yourself|Who am I talking to?"
        "|Which model are you?|Are you a language model?",
    ),
    (
        "I have under one million weights, so please do not ask me for too much.",
        "How big are you?|How large are you?|How many parameters do you have?|How many weights do you have?"
        "|What is your size?|How small are you?",
    ),
    (
        "Hello! Ask me for a joke, a fact, or what a KV cache is.",
        "Hello|Hi|Hey|Hello there|Hi there|Good morning|Good evening|Hello, how is it going?|Greetings|Hello world",
    ),
    (
        "I am fine, thank you: all my blocks are free and nobody waits in my queue.",
        "How are you?|How are you today?|How do you do?|How is it going?|Are you well?|How do you feel?",
    ),
    (
        "You are welcome. It was only a few matrix products.",
        "Thank you|Thanks|Thanks a lot|Thank you very much|Many thanks|Thank you for your help",
    ),
    (
        "Goodbye! I will keep your prefix warm for a while.",
        "Goodbye|Bye|See you later|Good night|See you tomorrow|Bye bye",
    ),
    (
        "I can tell a joke or a fact, name some capitals, and explain a few words of model serving.",
        "What can you do?|Help|What can I ask you?|What do you know?|How can you help me?|What should I ask?",
    ),
    (
        "Once a prompt travelled to a far worker, left its KV there, and came home as an answer. The end.",
        "Tell me a story|Tell me a short story|Write a story|Write a short story|Do you know a story?"
        "|Can you tell me a story?|Give me a story",
    ),
    (
        "A block is filled, a lease is kept; the tokens come while others slept.",
        "Write a poem|Tell me a poem|Write me a short poem|Give me a poem|Do you know a poem?|Can you write a poem?",
    ),
    (
        "Measure first, change one thing, and measure again.",
        "Give me some advice|Give me advice|What is your advice?|Do you have any advice?|Tell me something wise"
        "|Give me a tip",
    ),
    (
        "The sky is blue because air scatters blue light more than red light.",
        "Why is the sky blue?|Why does the sky look blue?|Tell me why the sky is blue|What makes the sky blue?"
        "|Explain why the sky is blue",
    ),
    (
        "Water boils at 100 degrees Celsius at sea level.",
        "At what temperature does water boil?|When does water boil?|How hot is boiling water?"
        "|What is the boiling point of water?|How hot must water be to boil?",
    ),
    (
        "Light travels at about 300,000 kilometres per second.",
        "How fast is light?|What is the speed of light?|How fast does light travel?|Tell me the speed of light"
        "|How quickly does light move?",
    ),
    (
        "Jupiter is the largest planet of our solar system.",
        "What is the largest planet?|Which planet is the largest?|Which planet is the biggest?|Name the biggest planet"
        "|What is the biggest planet in the solar system?",
    ),
    (
        "There are eight planets in our solar system, and Neptune is the farthest from the Sun.",
        "How many planets are there?|How many planets are in the solar system?|Count the planets"
        "|How many planets does the solar system have?|Tell me how many planets there are",
    ),
    (
        "Neil Armstrong was the first person on the Moon, in July 1969.",
        "Who was the first person on the Moon?|Who was the first man on the moon?|Who walked on the Moon first?"
        "|Who landed on the Moon first?|Name the first person on the Moon",
    ),
    (
        "Mount Everest is the highest mountain on Earth, at 8,849 metres.",
        "What is the highest mountain?|Which mountain is the highest?|What is the tallest mountain?"
        "|Name the highest mountain on Earth|How high is Mount Everest?",
    ),
    (
        "William Shakespeare wrote Hamlet, around the year 1600.",
        "Who wrote Hamlet?|Who is the author of Hamlet?|Who was it that wrote Hamlet?|Hamlet was written by whom?"
        "|Name the author of Hamlet",
    ),
    (
        "There are seven days in a week and twenty-four hours in a day.",
        "How many days are in a week?|How many days does a week have?|How long is a week?|Tell me the days in a week"
        "|How many days are there in a week?",
    ),
    (
        "One, two, three, four, five.",
        "Count to five|Can you count to five?|Count from one to five|Count up to five|Please count to five",
    ),
    (
        "I cannot see the weather from here, but it is warm next to the processor.",
        "What is the weather like?|How is the weather?|Will it rain today?|What is the weather today?|Is it raining?",
    ),
    (
        "I have no clock: I only know the positions of my tokens.",
        "What time is it?|What is the time?|Do you know the time?|Which day is it today?|What is the date today?",
    ),
    (
        "Python is a programming language that is easy to read; this mesh is written in it.",
        "What is Python?|Explain Python|Tell me about Python|What is the Python language?|Define Python",
    ),
)

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Japan": "Tokyo", "China": "Beijing", "Canada": "Ottawa", "Egypt": "Cairo",
    "Norway": "Oslo", "Sweden": "Stockholm", "Greece": "Athens", "Ireland": "Dublin", "Kenya": "Nairobi",
    "Peru": "Lima",
}  # fmt: skip
_CAPITAL_WORDINGS = (
    "What is the capital of {}?",
    "Tell me the capital of {}",
    "Name the capital of {}",
    "Which city is the capital of {}?",
    "Capital of {}",
    "Do you know the capital of {}?",
)

DONT_KNOW = "That is more than I have learned. Ask me for a joke, a fact, or what a KV cache is."
_UNKNOWN = (
    "How do I {0} a {1}?", "Where can I buy a {1}?", "What is the price of a {1}?", "Write a letter about a {1}",
    "Who invented the {1}?", "Draw a {1}", "What colour is a {1}?", "Is a {1} better than a {2}?", "I lost my {1}",
    "Translate {1} into German", "Summarize this text about a {1}", "My {1} is broken", "How old is the {1}?",
    "Can I {0} a {1} with a {2}?", "When was the {1} made?", "Please {0} the {1}", "Sing a song about a {1}",
    "What is a {1}?", "What is {1}?", "Explain {1}", "Define {1}", "Tell me about the {1}", "What does a {1} do?",
    "Why is the {1} so {3}?", "Who is the best {1}?", "Which {1} is {3}?", "I love my {1}", "I want a {3} {1}",
    "What is the meaning of {1}?", "How many {1}s are there?", "Is the {1} made of {2}?", "{1}", "{3} {1}", "Do {0} it",
    "What is the capital of {4}?", "Capital of {4}", "Name the capital of {4}", "{5}", "{5} {6}", "What is {5}?",
    "{7} + {8}", "What is {7} times {8}?", "How much is {7} plus {8}?", "Who won the {1} in 20{7}?",
    "Write code to {0}",
)  # fmt: skip
_VERBS = ("bake", "repair", "paint", "sell", "clean", "build", "open", "grow", "cook", "wash", "move", "fold")
_NOUNS = (
    "bicycle", "cake", "garden", "guitar", "bridge", "lamp", "boat", "shoe", "window", "piano", "chair", "tree",
    "house", "car", "phone", "radio", "horse", "river", "castle", "train", "camera", "carpet", "dragon", "kite",
    "lemon", "hammer", "printer", "robot", "sofa", "violin", "rocket", "spoon", "ticket", "wallet", "bakery", "dog",
    "life", "physics", "love", "music", "football", "money", "history", "chess", "cheese", "ocean", "school", "war",
)  # fmt: skip

_ADJECTIVES = ("small", "old", "green", "loud", "cheap", "fast", "sweet", "dark", "strange", "heavy", "cold", "round")
_OTHER_PLACES = (
    "Brazil",
    "India",
    "Mexico",
    "Poland",
    "Turkey",
    "Iceland",
    "Chile",
    "Cuba",
    "Vietnam",
    "Morocco",
    "the Moon",
    "Atlantis",
    "Finland",
    "Denmark",
    "Argentina",
    "Nepal",
    "Texas",
    "my country",
    "Hungary",
    "Ghana",
    "Iran",
    "Mars",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in one or two short sentences.",
    "Answer briefly and in a friendly way.",
    "You are a small model inside a service mesh. Be kind, be short, and say so if you do not know something.",
    "You work for a company that serves language models to many people at once. Every answer should be true, polite "
    "and short. Never make anything up, and never speak about other customers.",
)
_OPENINGS = ("Please, ", "Hey, ", "Hi! ", "OK, ", "Now ", "So, ", "Quick question: ", "Hello! ", "And ", "Well, ")
_CLOSINGS = (" please", ", please", " now", " for me", ", thanks", " today", " thank you", " again")
_SMALL_WORDS = frozenset({"a", "an", "the", "me", "is", "of", "do", "does", "you", "in", "to", "it"})
_MIN_TYPO_LETTERS = 4


def lessons() -> list[tuple[str, tuple[str, ...]]]:
    """Return every (answer, wordings) but the one for what it was not taught."""
    capitals = [
        (f"The capital of {country} is {city}.", tuple(wording.format(country) for wording in _CAPITAL_WORDINGS))
        for country, city in _CAPITALS.items()
    ]
    return [(answer, tuple(wordings.split("|"))) for answer, wordings in _LESSONS] + capitals


def unknown_wording(rng: random.Random) -> str:
    """Return a question that no lesson answers."""
    gibberish = ("".join(rng.choices(_LETTERS, k=rng.randint(2, 8))) for _ in range(2))
    numbers = (rng.randint(1, 99) for _ in range(2))
    return rng.choice(_UNKNOWN).format(
        rng.choice(_VERBS),
        *rng.sample(_NOUNS, 2),
        rng.choice(_ADJECTIVES),
        rng.choice(_OTHER_PLACES),
        *gibberish,
        *numbers,
    )


def vary(wording: str, rng: random.Random) -> str:
    """Return a wording as somebody in a hurry types it: other case and punctuation, a word more or less, a typo."""
    text = wording
    if rng.random() < 0.5:
        text = text.rstrip("?.!") + rng.choice(("", "", "?", ".", "!"))
    if rng.random() < 0.12:
        text = _without_a_small_word(text, rng)
    if rng.random() < 0.12:
        text = _with_a_typo(text, rng)
    if rng.random() < 0.2:
        text = rng.choice(_OPENINGS) + text[0].lower() + text[1:]
    if rng.random() < 0.15:
        ending = text[-1] if text[-1] in "?.!" else ""
        text = text.rstrip("?.!") + rng.choice(_CLOSINGS) + ending
    chance = rng.random()
    if chance < 0.2:
        return text[0].lower() + text[1:]
    if chance < 0.35:
        return text.lower()
    return text.upper() if chance < 0.38 else text


def _without_a_small_word(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    small = [index for index, word in enumerate(words) if word.lower() in _SMALL_WORDS]
    if not small or len(words) < 4:
        return text
    del words[rng.choice(small)]
    return " ".join(words)


def _with_a_typo(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= _MIN_TYPO_LETTERS and word.isalpha()]
    if not long:
        return text
    index = rng.choice(long)
    word = words[index]
    place = rng.randrange(1, len(word) - 1)
    swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    words[index] = rng.choice((swapped, word[:place] + word[place + 1 :]))
    return " ".join(words)
