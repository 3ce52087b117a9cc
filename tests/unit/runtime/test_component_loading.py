"""`module:Class` of a command line: what is found, and what is said where nothing is."""

import sys
from pathlib import Path

import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.runtime.component_loading import load_graph

MODULE = """
from pydantic import BaseModel
from kvmesh.sdk import depends, endpoint, link, service

class Text(BaseModel):
    text: str

@service(namespace="ns")
class Worker:
    @endpoint()
    async def go(self, request: Text) -> Text:
        return request

@service(namespace="ns")
class Entry:
    worker = depends(Worker)

    @endpoint()
    async def go(self, request: Text) -> Text:
        return request

alone = link(Entry)
"""
WRONG = """
from kvmesh.sdk import endpoint

class Wrong:
    @endpoint()
    def go(self, request: dict) -> dict:
        yield request
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_graph_of_a_test.py").write_text(MODULE)
    (tmp_path / "a_wrong_graph_of_a_test.py").write_text(WRONG)
    (tmp_path / "a_graph_that_imports_of_a_test.py").write_text("import nothing_of_this_name")
    (tmp_path / "a_graph_that_fails_of_a_test.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in [name for name in sys.modules if name.endswith("_of_a_test")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("name", "served"), [("Entry", ["Worker", "Entry"]), ("alone", ["Entry"])])
def test_a_class_is_served_with_what_it_depends_on_and_a_link_as_it_is(name: str, served: list[str]) -> None:
    graph = load_graph(f"a_graph_of_a_test:{name}")

    assert [one.component for one in graph.services] == served


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("a_graph_of_a_test:", "is not MODULE:CLASS, e.g. hello:Upper"),
        ("a_graph_of_a_test:Entyr", "a_graph_of_a_test has no 'Entyr'; the nearest is Entry"),
        ("a_graph_of_a_test:Text", "Text is no service: put @service(namespace=...) on the class"),
        ("no_graph_of_a_test:Entry", "no module is called 'no_graph_of_a_test' here: run this from its folder"),
        ("a_wrong_graph_of_a_test:Wrong", "Wrong.go yields and must be async"),
        ("a_graph_that_imports_of_a_test:X", "imports 'nothing_of_this_name', which is not installed"),
        ("a_graph_that_fails_of_a_test:X", "cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_fix(target: str, says: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        load_graph(target)

    assert refused.value.field == "target"
    assert says in refused.value.message
