"""The one JSON object every bench prints on stdout."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def print_report(bench: str, cases: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print `{"bench", "machine", "cases"}` and what else belongs to the whole run.

    `machine` names the interpreter's file: two builds of one version of CPython differ by up to a quarter.
    """
    machine = {
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "interpreter": str(Path(sys.executable).resolve()),
    }
    print(json.dumps({"bench": bench, "machine": machine, "cases": list(cases), **more}))
