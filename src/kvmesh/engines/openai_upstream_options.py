"""What the openai_upstream engine can be told."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from kvmesh.engines.engine import PromptForm
from kvmesh.engines.options import check_ranges, choice, invalid_option, number, parse_options


@dataclass(frozen=True, slots=True)
class OpenAiUpstreamOptions:
    """Options of the engine. Raises: FixRequestError(INVALID_FIELD), naming the option and what it may be."""

    url: str = ""
    """Base of the upstream's OpenAI API, e.g. `http://127.0.0.1:8080/v1`; several, by commas: one for each worker."""
    model: str = ""
    """The upstream's name of the model; empty = the first one it lists."""
    api: str = choice("completions", "chat")
    """Where prompts go: `/completions` as they are, or `/chat/completions` as one user message."""
    prompts: str = choice("text", "tokens")
    """What is sent and hashed: `tokens` needs the upstream's own tokenizer here, and an upstream that takes ids."""
    api_key_env: str = ""
    """Name of the environment variable that holds the upstream's key; empty = none is sent."""
    max_sequences: int = number(256, 1, 65_536)
    """Requests that the upstream is given at once by one worker."""
    max_context_tokens: int = number(0, 0, 2**31)
    """Of prompt and output together; 0 = what the upstream lists, where prompts are tokens, else no limit here."""
    block_size: int = number(16, 1, 65_536)
    """Tokens (bytes, where prompts are text) in what routers count as a block; with KV events, that of their blocks."""
    connect_s: float = number(2.0, 0.01, 3_600.0)
    """Longest wait for a connection."""
    first_token_s: float = number(30.0, 0.01, 3_600.0)
    """Longest wait for the first event of an answer."""
    token_gap_s: float = number(10.0, 0.01, 3_600.0)
    """Longest wait between two events of an answer."""
    kv_events: str = ""
    """ZeroMQ endpoint of the upstream's KV event publisher, e.g. `tcp://127.0.0.1:5557`, one for each url; needs
    `prompts=tokens`."""
    kv_events_replay: str = ""
    """ZeroMQ endpoint where the publisher replays what was missed, one for each url; empty = it does not."""
    kv_events_topic: str = ""
    """Topic the publisher writes under."""

    def __post_init__(self) -> None:
        """Check every value, and that they fit each other."""
        check_ranges(self)
        if not self.urls:
            raise invalid_option("url", "is missing: name the upstream, e.g. url=http://127.0.0.1:8080/v1")
        for position, url in enumerate(self.urls):
            _check_url(url)
            if url in self.urls[:position]:
                raise invalid_option("url", f"names {url} twice: each worker needs an upstream of its own")
        if self.prompts == "tokens" and self.api == "chat":
            raise invalid_option("prompts", "is 'tokens', which a chat cannot carry: leave api=completions")
        if self.kv_events and self.prompts != "tokens":
            raise invalid_option("kv_events", "tells of tokens, so routing must know them: add prompts=tokens")
        if (self.kv_events_replay or self.kv_events_topic) and not self.kv_events:
            raise invalid_option("kv_events", "is missing: the endpoint of the publisher, e.g. tcp://127.0.0.1:5557")
        for name in ("kv_events", "kv_events_replay"):
            if (count := len(_listed(getattr(self, name)))) not in (0, len(self.urls)):
                raise invalid_option(
                    name, f"names {count} endpoints for {len(self.urls)} urls: one for each, by commas"
                )

    @property
    def urls(self) -> tuple[str, ...]:
        """Every upstream's base, without a slash at its end."""
        return tuple(url.rstrip("/") for url in _listed(self.url))

    def event_endpoints(self, index: int) -> tuple[str, str | None]:
        """Return the publisher's endpoint of the url at `index`, and where it replays."""
        replays = _listed(self.kv_events_replay)
        return _listed(self.kv_events)[index], replays[index] if replays else None

    @property
    def accepts(self) -> PromptForm:
        """The form of prompt that is sent."""
        return PromptForm(self.prompts)


def parse(options: Mapping[str, str]) -> OpenAiUpstreamOptions:
    """Read options from text. Raises: FixRequestError(INVALID_FIELD) as `parse_options`."""
    return parse_options(OpenAiUpstreamOptions, options, engine="openai_upstream")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise invalid_option("url", f"{url!r} is no http(s)://HOST:PORT/v1")
    if parts.username is not None or parts.password is not None:
        raise invalid_option("url", "carries a password: put the key into a variable and name it, api_key_env=VAR")
