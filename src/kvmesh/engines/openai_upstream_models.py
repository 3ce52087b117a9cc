"""The models that an upstream lists: which one is served, and whether it is still there."""

import httpx

from kvmesh.core.errors import NotKnownError, Reason, TryElsewhereError
from kvmesh.core.suggestions import suggestion
from kvmesh.engines.openai_upstream_answers import error_of_status, read_models
from kvmesh.engines.openai_upstream_options import OpenAiUpstreamOptions

MODELS_S = 5.0
"""Longest wait for the list of models."""


def choose_model(options: OpenAiUpstreamOptions, *, url: str, api_key: str | None) -> tuple[str, int]:
    """Return the upstream's name of the model and its context in tokens, 0 = not said. Blocks for seconds at most.

    Raises:
        TryElsewhereError: WORKER_LOST if nothing answers at `url`, or what does is no OpenAI API.
        NotKnownError: UNKNOWN_MODEL if the model is not listed there, or none is.
    """
    try:
        response = httpx.get(f"{url}/models", headers=headers_of(api_key), timeout=MODELS_S, trust_env=False)
    except httpx.HTTPError as exc:
        raise nobody_answers(url, exc) from exc
    models = read_listed(response, url=url, is_needed=not options.model)
    if options.model:
        check_listed(options.model, models, url=url)
        return options.model, models.get(options.model, 0)
    if not models:
        raise NotKnownError(Reason.UNKNOWN_MODEL, f"{url} lists no model: load one there, or name it, model=NAME")
    return next(iter(models.items()))


def check_listed(model: str, models: dict[str, int], *, url: str) -> None:
    """Raises: NotKnownError if there is a list without it."""
    if models and model not in models:
        raise NotKnownError(
            Reason.UNKNOWN_MODEL,
            f"{url} does not list the model {model!r}; {suggestion(model, models)}",
            field="model",
        )


def read_listed(response: httpx.Response, *, url: str, is_needed: bool) -> dict[str, int]:
    """Return the models and their contexts; {} where the server has no list and none is needed. Raises: MeshError."""
    if response.status_code == httpx.codes.OK:
        return read_models(response.content)
    if response.status_code == httpx.codes.NOT_FOUND and not is_needed:
        return {}
    if response.status_code == httpx.codes.NOT_FOUND:
        raise TryElsewhereError(
            Reason.WORKER_LOST, f"{url}/models is not there: fix --engine-option url (most end in /v1), or add model="
        )
    raise error_of_status(response.status_code, response.content, url=f"{url}/models")


def headers_of(api_key: str | None) -> dict[str, str]:
    """Return what shows the key, if there is one."""
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def nobody_answers(url: str, error: httpx.HTTPError) -> TryElsewhereError:
    """Return the error of an upstream that could not be asked."""
    return TryElsewhereError(
        Reason.WORKER_LOST,
        f"nothing answers at {url}: start the server or fix --engine-option url ({type(error).__name__}: {error})",
    )
