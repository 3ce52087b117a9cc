"""A class declared wrongly fails at import, with the fix; declared well it stays a plain class."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from functools import wraps
from typing import Any

import pytest
from pydantic import BaseModel

from kvmesh.sdk import DeclarationError, UnannotatedResultWarning, context, depends, endpoint, link, on_start, service
from kvmesh.sdk.definitions import definition_of
from kvmesh.sdk.dependencies import graph_of


class Text(BaseModel):
    text: str


@service(namespace="ns", resources={"gpu": "1", "memory": "20Gi"}, workers=2)
class Upper:
    def __init__(self, mark: str = "!") -> None:
        self.mark = mark
        self.started = False

    async def plain(self, request: Text) -> Text:
        return request

    @on_start
    async def prepare(self) -> None:
        self.started = True

    @endpoint()
    async def shout(self, request: Text) -> Text:
        """Shout."""
        return Text(text=request.text.upper() + self.mark)

    @endpoint(name="spell")
    async def letters(self, request: Text) -> AsyncIterator[Text]:
        for letter in request.text:
            yield Text(text=letter)


@service(namespace="ns")
class Entry:
    upper = depends(Upper)

    @endpoint()
    async def greet(self, request: Text) -> Text:
        answer: Text = await self.upper.shout(request)
        return Text(text=f"<{answer.text}>")


def test_a_declared_class_is_called_as_if_it_were_not() -> None:
    upper = Upper(mark="?")

    async def use() -> tuple[Text, list[Text]]:
        return await upper.shout(Text(text="a")), [one async for one in upper.letters(Text(text="bc"))]

    assert asyncio.run(use()) == (Text(text="A?"), [Text(text="b"), Text(text="c")])
    assert upper.started is False
    assert Upper.__mro__ == (Upper, object)


def test_a_dependency_is_replaced_by_a_stand_in_in_a_unit_test() -> None:
    entry = Entry()
    entry.upper = Upper(mark="+")

    answer = asyncio.run(entry.greet(Text(text="x")))

    assert answer == Text(text="<X+>")


def test_a_dependency_without_a_stand_in_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"Entry\.upper calls ns/Upper.*`instance\.upper = \.\.\.`"):
        asyncio.run(Entry().greet(Text(text="x")))


def test_the_context_of_a_class_that_is_not_served_says_what_to_do() -> None:
    with pytest.raises(LookupError, match=r"kvmesh\.testing\.sdk\.serving"):
        context["runtime"]
    with pytest.raises(KeyError, match="none of runtime, component"):
        context["runtme"]


def test_the_definition_has_what_the_decorators_said() -> None:
    definition = definition_of(Upper)

    assert definition.address == "ns/Upper"
    assert {one.name: (one.method, one.is_stream) for one in definition.endpoints} == {
        "shout": ("shout", False),
        "spell": ("letters", True),
    }
    assert (definition.resources.gpu, dict(definition.resources.others)) == (1, {"memory": "20Gi"})
    assert (definition.workers, definition.hooks["on_start"]) == (2, ("prepare",))


def test_the_alias_of_the_namespace_is_taken() -> None:
    @service(dynamo={"namespace": "other", "enabled": True})
    class Aliased:
        @endpoint()
        async def go(self, request: Text) -> Text:
            return request

    assert definition_of(Aliased).address == "other/Aliased"


def test_a_result_that_is_not_annotated_is_a_warning() -> None:
    with pytest.warns(UnannotatedResultWarning, match=r"Loose\.go does not say what it answers.*-> AsyncIterator"):

        @service(namespace="ns")
        class Loose:
            @endpoint()
            async def go(self, request: Text):  # type: ignore[no-untyped-def]  # it is the subject
                yield request.text


def test_a_result_that_is_a_list_is_a_warning() -> None:
    with pytest.warns(UnannotatedResultWarning, match=r"Listed\.go answers a list.*field of a pydantic\.BaseModel"):

        @service(namespace="ns")
        class Listed:
            @endpoint()
            async def go(self, request: Text) -> list[Text]:
                return [request]


def test_a_result_that_is_any_list_is_meant_so() -> None:
    @service(namespace="ns")
    class Free:
        @endpoint()
        async def go(self, request: Text) -> list[Any]:
            return [request.text]

    assert definition_of(Free).endpoints[0].response_type == list[Any]


def _stream_of_a_plain_function() -> None:
    class _Wrong:
        @endpoint()
        def go(self, request: Text) -> Iterator[Text]:
            yield request


def _plain_wrapper() -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(self: object, request: Text) -> Any:
            return function(self, request)

        return wrapper

    class _Wrong:
        @endpoint()
        @logged
        async def go(self, request: Text) -> Text:
            return request


def _no_function() -> None:
    class _Wrong:
        go = endpoint()(Text)


def _without_request_type() -> None:
    class _Wrong:
        @endpoint()
        async def go(self, request) -> Text:  # type: ignore[no-untyped-def]  # it is the subject
            return Text(text="")


def _without_request() -> None:
    class _Wrong:
        @endpoint()
        async def go(self) -> Text:
            return Text(text="")


def _twice() -> None:
    class _Wrong:
        @endpoint()
        @endpoint()
        async def go(self, request: Text) -> Text:
            return request


def _service_twice() -> None:
    service(namespace="ns")(Upper)


def _two_of_one_name() -> None:
    @service(namespace="ns")
    class Wrong:
        @endpoint()
        async def go(self, request: Text) -> Text:
            return request

        @endpoint(name="go")
        async def other(self, request: Text) -> Text:
            return request


def _no_endpoint() -> None:
    @service(namespace="ns")
    class Wrong:
        pass


def _stream_not_annotated_as_one() -> None:
    @service(namespace="ns")
    class Wrong:
        @endpoint()
        async def go(self, request: Text) -> Text:  # type: ignore[misc]  # it is the subject
            yield request


def _scalar_request() -> None:
    @service(namespace="ns")
    class Wrong:
        @endpoint()
        async def go(self, request: int) -> Text:
            return Text(text="")


def _field_without_form() -> None:
    class Odd(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        loop: asyncio.AbstractEventLoop

    @service(namespace="ns")
    class Wrong:
        @endpoint()
        async def go(self, request: Odd) -> Text:
            return Text(text="")


def _two_types_of_one_name() -> None:
    other = type("Text", (BaseModel,), {"__annotations__": {"size": int}})

    async def go(self: object, request: Any) -> Text:
        return Text(text="")

    go.__annotations__["request"] = other
    service(namespace="ns")(type("Wrong", (), {"go": endpoint()(go)}))


def _no_parentheses() -> None:
    endpoint(lambda: None)  # type: ignore[arg-type]  # it is the subject


def _service_without_parentheses() -> None:
    service(Upper)  # type: ignore[arg-type]  # it is the subject


def _bad_namespace() -> None:
    service(namespace="a/b")(type("Wrong", (), {"shout": vars(Upper)["shout"]}))


def _two_namespaces() -> None:
    service(namespace="a", dynamo={"namespace": "b"})(type("Wrong", (), {"shout": vars(Upper)["shout"]}))


def _unknown_resource() -> None:
    service(namespace="a", resources={"gpus": 1})(type("Wrong", (), {"shout": vars(Upper)["shout"]}))


def _depends_on_a_plain_class() -> None:
    depends(Text)


def _hook_with_arguments() -> None:
    class _Wrong:
        @on_start
        async def go(self, request: Text) -> None:
            return


def _declare_field(**annotations: Any) -> Callable[[], None]:
    model = type("Odd", (BaseModel,), {"__annotations__": annotations})

    async def go(self: object, request: Any) -> Text:
        return Text(text="")

    go.__annotations__["request"] = model

    def declare() -> None:
        service(namespace="ns")(type("Wrong", (), {"go": endpoint()(go)}))

    return declare


def _name_that_callers_have() -> None:
    class _Wrong:
        @endpoint()
        async def worker_ids(self, request: Text) -> Text:
            return request


def _given_name_that_callers_have() -> None:
    endpoint(name="worker_ids")(vars(Upper)["plain"])


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (_name_that_callers_have, "'worker_ids' asks a dependency for its instances: rename the endpoint"),
        (_given_name_that_callers_have, "'worker_ids' asks a dependency for its instances: rename the endpoint"),
        (_declare_field(items=list[int | None]), "Odd.items: int | None: what is in a list or a map cannot be None"),
        (_declare_field(items=dict[str, Text | None]), "what is in a list or a map cannot be None in protobuf"),
        (_declare_field(größe=int), "Odd.größe: a name of protobuf has letters of ASCII, digits and _: rename"),
        (_declare_field(foo_bar=int, fooBar=int), "Odd: foo_bar and fooBar are both 'fooBar' in JSON: rename one"),
        (_stream_of_a_plain_function, "yields and must be async: write `async def go(self, ...)`"),
        (_plain_wrapper, "is async, its decorator's wrapper is not"),
        (_no_function, "Text is no method"),
        (_without_request_type, "annotate it, `request: YourRequest`"),
        (_without_request, "must take one request: `async def go(self, request: YourRequest)`"),
        (_twice, "is an endpoint already: remove one of the two @endpoint()"),
        (_service_twice, "Upper is a service already: remove one of the two @service(...)"),
        (_two_of_one_name, "go and other are both the endpoint 'go': rename one, @endpoint(name=...)"),
        (_no_endpoint, "Wrong has no endpoint: put @endpoint() on a method"),
        (_stream_not_annotated_as_one, "yields its answers: annotate it, -> AsyncIterator[YourResponse]"),
        (_scalar_request, "int is no request: make it a field of a pydantic.BaseModel"),
        (_field_without_form, "Odd.loop: AbstractEventLoop has no form in protobuf: use a pydantic model, or Any"),
        (_two_types_of_one_name, "two of its types are called Text: rename one of the models"),
        (_no_parentheses, "write @endpoint(), with parentheses"),
        (_service_without_parentheses, "@service on Upper: write @service(), with parentheses"),
        (_bad_namespace, "namespace 'a/b': use letters, digits, _ and -, a letter first"),
        (_two_namespaces, "two namespaces are given, 'a' and 'b': keep one"),
        (_unknown_resource, "resources: 'gpus' is none of cpu, memory, gpu"),
        (_depends_on_a_plain_class, "Text is no service: put @service(namespace=...) on the class"),
        (_hook_with_arguments, "takes no arguments: write `async def go(self)`"),
    ],
)
def test_a_wrong_declaration_fails_with_the_fix(declare: Callable[[], None], says: str) -> None:
    with pytest.raises(DeclarationError) as refused:
        declare()

    assert says in str(refused.value)


def test_a_graph_has_what_is_called_before_its_callers() -> None:
    assert [one.component for one in graph_of(Entry).services] == ["Upper", "Entry"]


def test_a_link_has_exactly_what_it_names() -> None:
    @service(namespace="ns")
    class Outer:
        entry = depends(Entry)

        @endpoint()
        async def go(self, request: Text) -> Text:
            return request

    assert [one.component for one in link(Outer, Entry).services] == ["Entry", "Outer"]
    with pytest.raises(DeclarationError, match="Outer depends on none of the others, and none on it"):
        link(Outer, Upper)
