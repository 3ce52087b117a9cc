"""Metadata that calls of the mesh carry, and HTTP headers of the same names."""

REQUEST_ID_KEY = "x-request-id"
"""Key of the id that a call's log lines carry; it names log lines and is no key of anything."""
