"""`--Class.key=value` of `kvmesh serve module:Class`: flags whose names the classes of a user bring."""

import re
from collections.abc import Sequence

_OF_A_CLASS = re.compile(r"--([A-Za-z_]\w*\.[\w.]+=.*)", re.S)


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with every `--Class.key=value` as `--set Class.key=value`; no flag of ours has a dot."""
    found: list[str] = []
    for argument in arguments:
        match = _OF_A_CLASS.fullmatch(argument)
        found += ["--set", match[1]] if match is not None else [argument]
    return found
