"""The page to look at a mesh: files as they are, which in a browser draw what the contract's REST routes say.

No script and no style stands in the markup, so that the policy sent along may forbid both there: whatever a prompt, a
worker's id or an error holds stays text.
"""

from functools import lru_cache
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

PREFIX = "/dashboard"
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def dashboard_routes() -> list[BaseRoute]:
    """Return the routes of the page, `/`, and of its parts."""

    async def page(request: Request) -> Response:
        return _response("index.html")

    async def part(request: Request) -> Response:
        return _response(request.scope["path"].removeprefix(f"{PREFIX}/"))

    return [Route("/", page), *(Route(f"{PREFIX}/{name}", part) for name in _parts())]


def _response(name: str) -> Response:
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(_content(name), media_type=media_type, headers=_HEADERS)


@lru_cache(maxsize=64)
def _content(name: str) -> bytes:
    return (_folder() / name).read_bytes()


def _parts() -> list[str]:
    names = [file.name for file in _folder().iterdir()]
    return sorted(name for name in names if name != "index.html" and name.rpartition(".")[2] in _MEDIA_TYPES)


def _folder() -> resources.abc.Traversable:
    return resources.files("kvmesh.gateway") / "static"
