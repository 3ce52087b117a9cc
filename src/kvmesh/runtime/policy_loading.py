"""From the name of a policy to the policy: the mesh's own, an installed package's, or a class of yours.

kv_aware            comes with the mesh
NAME                an entry point of the group `kvmesh.policies`
MODULE:CLASS        anything importable, also from the working directory; CLASS may be a dotted path
"""

import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from typing import Any

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.policies.cost_choice import ImbalanceGuard
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.policies.least_work import LeastWork, LeastWorkKnobs
from kvmesh.core.policies.policy import BUILTIN_POLICIES, Policy
from kvmesh.core.policies.prompt_similarity import PromptSimilarity
from kvmesh.core.suggestions import suggestion
from kvmesh.runtime.router_settings import RouterSettings

ENTRY_POINT_GROUP = "kvmesh.policies"


def load_policy(settings: RouterSettings) -> Policy:
    """Return a new policy as the settings say. Raises: FixRequestError(INVALID_FIELD) saying what to change."""
    name = settings.policy
    if name in BUILTIN_POLICIES or name in _WITH_KNOBS:
        return _builtin(settings)
    if ":" in name:
        return _construct(name, _class_at(name), settings.policy_options)
    for entry_point in _entry_points():
        if entry_point.name == name:
            return _construct(name, _class_of(entry_point), settings.policy_options)
    known = dict.fromkeys([*BUILTIN_POLICIES, *_WITH_KNOBS, *(entry_point.name for entry_point in _entry_points())])
    raise _refusal(
        f"no policy is named {name!r}; {suggestion(name, known)}; a class of your own is MODULE:CLASS, e.g. my:Policy"
    )


def load_policies(settings: RouterSettings, names: Sequence[str]) -> list[Policy]:
    """Return a new policy per name; of several, each is made of those options, and the guard, that it has.

    Raises: FixRequestError(INVALID_FIELD), also for an option that none of them has.
    """
    if len(names) == 1:
        return [load_policy(settings.model_copy(update={"policy": names[0]}))]
    options = settings.policy_options
    taken = [{key: value for key, value in options.items() if _takes(name, key)} for name in names]
    for key in options:
        if not any(key in own for own in taken):
            setting = (
                f"; {_SETTING.format(key, key.upper())}" if any(key in _WEIGHTS.get(name, ()) for name in names) else ""
            )
            raise _refusal(
                f"none of {', '.join(names)} has an option {key!r}{setting}", field=f"router.policy_options.{key}"
            )
    policies = []
    for name, own in zip(names, taken, strict=True):
        changes: dict[str, Any] = {"policy": name, "policy_options": own}
        if name not in _WITH_GUARD and any(other in _WITH_GUARD for other in names):
            changes["imbalance_absolute"] = None
        policies.append(load_policy(settings.model_copy(update=changes)))
    return policies


def reads_prompts(policy: Policy) -> bool:
    """Tell whether this policy of the mesh compares what prompts say, so that logs and traces cannot ask it."""
    return isinstance(policy, PromptSimilarity)


def _takes(name: str, option: str) -> bool:
    """Tell whether a policy has an option; of a class that does not say, that it has: it will refuse by itself."""
    if name in BUILTIN_POLICIES:
        return option in _OWN_OPTIONS.get(name, ())
    if ":" in name:
        factory = _class_at(name)
    else:
        factory = next((_class_of(each) for each in _entry_points() if each.name == name), None)
    try:
        parameters = signature(factory).parameters
    except (TypeError, ValueError):
        return True
    return option in parameters or any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())


def _builtin(settings: RouterSettings) -> Policy:
    if settings.imbalance_absolute is not None and settings.policy not in _WITH_GUARD:
        raise _refusal(
            f"{settings.policy} has no imbalance guard: {' and '.join(_WITH_GUARD)} have",
            field="router.imbalance_absolute",
        )
    make = _WITH_KNOBS.get(settings.policy)
    if make is not None:
        return make(settings)
    _options(settings, known=())
    return BUILTIN_POLICIES[settings.policy]()


def _kv_aware(settings: RouterSettings) -> Policy:
    return KvAware(CostKnobs(**_knobs(settings)), imbalance_guard=_guard(settings))


def _least_work(settings: RouterSettings) -> Policy:
    return LeastWork(LeastWorkKnobs(**_knobs(settings)), imbalance_guard=_guard(settings))


def _guard(settings: RouterSettings) -> ImbalanceGuard | None:
    if settings.imbalance_absolute is None:
        return None
    return ImbalanceGuard(absolute=settings.imbalance_absolute, relative=settings.imbalance_relative)


def _prompt_similarity(settings: RouterSettings) -> Policy:
    return PromptSimilarity(**_options(settings, known=_OWN_OPTIONS[PromptSimilarity.name]))


_WITH_GUARD = (LeastWork.name, KvAware.name)
_WEIGHTS: Mapping[str, Collection[str]] = {
    KvAware.name: [item.name for item in fields(CostKnobs) if item.name in RouterSettings.model_fields],
    LeastWork.name: [item.name for item in fields(LeastWorkKnobs) if item.name in RouterSettings.model_fields],
}
"""Weights of every cost, which are settings and no options."""
_SETTING = "that weight is a setting: router.{}, in a file or as KVMESH_ROUTER__{}"
_OWN_OPTIONS: Mapping[str, Collection[str]] = {
    KvAware.name: [item.name for item in fields(CostKnobs) if item.name not in RouterSettings.model_fields],
    LeastWork.name: [item.name for item in fields(LeastWorkKnobs) if item.name not in RouterSettings.model_fields],
    PromptSimilarity.name: ["threshold"],
}
_WITH_KNOBS: Mapping[str, Callable[[RouterSettings], Policy]] = {
    KvAware.name: _kv_aware,
    LeastWork.name: _least_work,
    PromptSimilarity.name: _prompt_similarity,
}


def _knobs(settings: RouterSettings) -> dict[str, float]:
    """Return the knobs that are set: those of every cost are settings, a policy's own are options."""
    given = {name: getattr(settings, name) for name in _WEIGHTS[settings.policy] if getattr(settings, name) is not None}
    return given | _options(settings, known=_OWN_OPTIONS[settings.policy])


def _options(settings: RouterSettings, *, known: Collection[str]) -> dict[str, float]:
    """Return the options as numbers."""
    numbers = {}
    for name, text in settings.policy_options.items():
        if name not in known:
            raise _refusal(
                f"{settings.policy} has no option {name!r}; {_what_it_has(settings.policy, name, known)}",
                field=f"router.policy_options.{name}",
            )
        try:
            numbers[name] = float(text)
        except ValueError as exc:
            raise _refusal(f"{name} = {text!r} is no number", field=f"router.policy_options.{name}") from exc
    return numbers


def _what_it_has(policy: str, name: str, known: Collection[str]) -> str:
    if name in _WEIGHTS.get(policy, ()):
        return _SETTING.format(name, name.upper())
    return suggestion(name, known) if known else "it has none, the weights are settings, e.g. router.temperature"


def _entry_points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry_point: entry_point.name)


def _class_of(entry_point: EntryPoint) -> Any:
    try:
        return entry_point.load()
    except Exception as exc:  # importing runs anybody's code
        raise _refusal(f"policy {entry_point.name} ({entry_point.value}) cannot be imported: {_text(exc)}") from exc


def _class_at(name: str) -> Any:
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise _refusal(f"{name!r} is not MODULE:CLASS, e.g. my:Policy")
    found: Any = _import(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            where = getattr(found, "__file__", None) or getattr(found, "__name__", module_name)
            raise _refusal(f"{where} has no {part!r}; {_suggestion(part, found)}")
        found = getattr(found, part)
    return found


def _suggestion(name: str, found: Any) -> str:
    public = {known: value for known, value in vars(found).items() if not known.startswith("_")}
    policies = [known for known, value in public.items() if isinstance(value, type) and hasattr(value, "select")]
    return suggestion(name, policies or public) if public else "it has nothing public"


def _import(module_name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last: what is installed is not to be shadowed by a file that has its name
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and module_name.partition(".")[0] == exc.name.partition(".")[0]:
            raise _refusal(
                f"no module is called {exc.name!r}: it must be installed, on PYTHONPATH, or a file in {here}"
            ) from exc
        raise _refusal(f"module {module_name} cannot be imported: {_text(exc)}") from exc
    except Exception as exc:  # importing runs anybody's code
        raise _refusal(f"module {module_name} cannot be imported: {_text(exc)}") from exc


def _construct(name: str, factory: Callable[..., Any], options: Mapping[str, str]) -> Policy:
    if not callable(factory):
        raise _refusal(f"{name} is a {type(factory).__name__}, not a class: it must make a policy when it is called")
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    try:
        policy: Any = factory(**options)
    except Exception as exc:  # a policy is anybody's code
        raise _refusal(
            f"{name}({given}) failed: {_text(exc)}", field="router.policy_options" if options else None
        ) from exc
    if not callable(getattr(policy, "select", None)):
        raise _refusal(
            f"{name} makes a {type(policy).__name__} without a method select(query, candidates, rng), "
            "which is what a policy is"
        )
    made: Policy = policy
    return made


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _refusal(message: str, *, field: str | None = None) -> FixRequestError:
    return FixRequestError(Reason.INVALID_FIELD, message, field=field or "router.policy")
