"""What a web page could make a browser send here without its user's knowledge, refused before anything is read.

A browser lets any page POST to any address, the loopback ones included, and only keeps the answer from it; and a page
whose name's DNS answer changes to 127.0.0.1 may even read the answer. Neither takes part here: there is no page of
another origin that the mesh serves. Tools that are no browsers send no `Origin`, and reach loopback by its own names.
"""

import ipaddress
import re
from functools import lru_cache

from starlette.types import Scope

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.gateway.failures import HttpRefusalError
from kvmesh.wire.validation import invalid

BOUND_HOST_KEY = "kvmesh.bound_host"
"""Key in a request's scope: the address that its server was told to bind."""

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORT = {"http": ":80", "https": ":443"}
_JSON = re.compile(r"application/(?:json|[\w.!#$&^+-]+\+json)")
_CURL_DEFAULT = "application/x-www-form-urlencoded"
"""What `curl -d` says of any body."""


def check_request(scope: Scope) -> None:
    """Let a request pass. Raises: HttpRefusalError 403 for another origin or a foreign host, 415 for a foreign body."""
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1").lower()
    origin = headers.get(b"origin")
    if origin is not None and not _is_own_origin(origin.decode("latin-1").lower(), host):
        raise _forbidden("origin", "pages of another origin cannot call the mesh")
    bound_host = scope.get(BOUND_HOST_KEY)
    if bound_host is not None and host and not _is_served(host, bound_host):
        raise _forbidden("host", f"this address serves localhost, loopback addresses and {bound_host} alone")
    content_type = headers.get(b"content-type")
    if content_type is not None and scope["method"] not in _READING and not _is_json(content_type.decode("latin-1")):
        raise HttpRefusalError(415, invalid("content-type", "send application/json in UTF-8"))


def _forbidden(header: str, why: str) -> HttpRefusalError:
    return HttpRefusalError(403, FixRequestError(Reason.INVALID_FIELD, f"{header}: {why}", field=header))


@lru_cache(maxsize=256)
def _is_own_origin(origin: str, host: str) -> bool:
    """Compare an `Origin`, scheme://host[:port] or "null", with the `Host` the page's own requests would have."""
    scheme, separator, own = origin.partition("://")
    port = _DEFAULT_PORT.get(scheme, "")
    return separator != "" and own.removesuffix(port) == host.removesuffix(port)


@lru_cache(maxsize=256)
def _is_served(host: str, bound_host: str) -> bool:
    """Tell whether `Host` names what is bound: only a server bound to loopback is found by loopback's names alone."""
    if not _is_loopback(bound_host):
        return True
    name = re.sub(r":\d*$", "", host)
    return _is_loopback(name) or name.strip("[]") == bound_host.lower().strip("[]")


def _is_loopback(name: str) -> bool:
    if name in ("localhost", "localhost.") or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=64)
def _is_json(content_type: str) -> bool:
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    charsets = [
        value.strip('"') for name, _, value in (item.partition("=") for item in parameters) if name == "charset"
    ]
    return (_JSON.fullmatch(kind) is not None or kind == _CURL_DEFAULT) and all(
        charset in ("utf-8", "utf8") for charset in charsets
    )
