"""`module:Class` of a command line as the graph that is served."""

import importlib
import sys
from pathlib import Path

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.suggestions import suggestion
from kvmesh.sdk.definitions import DeclarationError, definition_or_none
from kvmesh.sdk.dependencies import Graph, graph_of


def load_graph(target: str) -> Graph:
    """Import `module:Class`, or `module:graph` made by `link`, from the current folder or anywhere on the path.

    Raises: FixRequestError(INVALID_FIELD) that says what is wrong with the target, or with the declaration.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise _refusal(f"{target!r} is not MODULE:CLASS, e.g. hello:Upper")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except DeclarationError as exc:
        raise _refusal(str(exc)) from exc
    except ModuleNotFoundError as exc:
        if exc.name is None or not (module_name == exc.name or module_name.startswith(f"{exc.name}.")):
            raise _refusal(f"{module_name} imports {exc.name!r}, which is not installed") from exc
        raise _refusal(f"no module is called {module_name!r} here: run this from its folder") from exc
    except Exception as exc:  # a module is anybody's code
        raise _refusal(f"{module_name} cannot be imported: {type(exc).__name__}: {exc}") from exc
    found = getattr(module, name, None)
    if found is None:
        served = [key for key, value in vars(module).items() if isinstance(value, Graph) or definition_or_none(value)]
        raise _refusal(f"{module_name} has no {name!r}; {suggestion(name, served)}")
    try:
        return graph_of(found)
    except DeclarationError as exc:
        raise _refusal(str(exc)) from exc


def _refusal(message: str) -> FixRequestError:
    return FixRequestError(Reason.INVALID_FIELD, message, field="target")
