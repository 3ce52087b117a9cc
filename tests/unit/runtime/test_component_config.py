"""What a graph's services are told: the file, the flags over it, and what is wrong with either."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from kvmesh.core.errors import FixRequestError
from kvmesh.runtime.component_config import read_config
from kvmesh.runtime.gpu_assignment import assign_gpus, devices_here
from kvmesh.sdk import depends, endpoint, service
from kvmesh.sdk.definitions import definition_of
from kvmesh.sdk.dependencies import graph_of


class Text(BaseModel):
    text: str


@service(namespace="ns", resources={"gpu": 2})
class Worker:
    @endpoint()
    async def go(self, request: Text) -> Text:
        return request


@service(namespace="ns", workers=2)
class Router:
    worker = depends(Worker)

    @endpoint()
    async def go(self, request: Text) -> Text:
        return request


GRAPH = graph_of(Router)


def test_declared_values_hold_where_nothing_is_given() -> None:
    worker, router = read_config(GRAPH, file=None, flags=())

    assert (worker.workers, worker.definition.resources.gpu, dict(worker.values)) == (1, 2, {})
    assert (router.workers, router.definition.resources.gpu) == (2, None)


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text("Worker:\n  workers: 3\n  greeting: hello\n  model: {name: a, layers: 2}\n")

    worker, _ = read_config(
        GRAPH, file=file, flags=("Worker.greeting=bye", "Worker.model.layers=4", "Worker.resources.gpu=1")
    )

    assert worker.workers == 3
    assert worker.definition.resources.gpu == 1
    assert worker.values == {"greeting": "bye", "model": {"name": "a", "layers": 4}}


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("Wroker.workers=2", "no service of this graph is called 'Wroker'; the nearest is Worker"),
        ("Worker.workers=0", "Worker.workers: 0 is out of range: 1 to 1024"),
        ("Worker.workers=many", "Worker.workers: 'many' is out of range"),
        ("Worker.resources.gpus=1", "Worker.resources: 'gpus' is none of cpu, memory, gpu"),
        ("Worker.resources.gpu=half", "gpu 'half' is no number of GPUs"),
        ("Worker=2", "is not --Class.key=value"),
        ("Worker.model={a: 1, a: 2}", "line 1: a is there already, in line 1"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_fix(flag: str, says: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        read_config(GRAPH, file=None, flags=(flag,))

    assert says in refused.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Worker: 5", "Worker: must be a table"),
        ("- a", "must be a table"),
        ("a: [", "is not YAML"),
        ("Worker:\n  workers: 1\n  workers: 2\n", "graph.yaml: line 3: workers is there already, in line 2: keep one"),
        (None, "No such"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "graph.yaml"
    if text is not None:
        file.write_text(text)

    with pytest.raises(FixRequestError) as refused:
        read_config(GRAPH, file=file, flags=())

    assert str(file) in refused.value.message
    assert says in refused.value.message


def test_every_worker_has_gpus_of_its_own() -> None:
    services = [(definition_of(Worker), 2), (definition_of(Router), 1)]

    assigned = assign_gpus(services, ("0", "1", "2", "3", "4"))

    assert assigned == {("ns/Worker", 0): "0,1", ("ns/Worker", 1): "2,3", ("ns/Router", 0): None}


def test_a_service_that_asks_for_none_sees_none() -> None:
    (worker, _) = read_config(GRAPH, file=None, flags=("Worker.resources.gpu=0",))

    assert assign_gpus([(worker.definition, 1)], ("0",)) == {("ns/Worker", 0): ""}


def test_more_gpus_than_there_are_is_refused_with_both_numbers() -> None:
    with pytest.raises(FixRequestError, match=r"Worker 2 x 2 is 4 GPUs, and 3 are here"):
        assign_gpus([(definition_of(Worker), 2)], ("0", "1", "2"))


def test_the_gpus_of_a_machine_are_those_it_is_told_or_has(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "null"):
        (tmp_path / name).touch()

    assert devices_here({"CUDA_VISIBLE_DEVICES": "3, GPU-1"}, devices=tmp_path) == ("3", "GPU-1")
    assert devices_here({"CUDA_VISIBLE_DEVICES": ""}, devices=tmp_path) == ()
    assert devices_here({"CUDA_VISIBLE_DEVICES": "-1"}, devices=tmp_path) == ()
    assert devices_here({"CUDA_VISIBLE_DEVICES": "2,-1,0"}, devices=tmp_path) == ("2",)
    assert devices_here({}, devices=tmp_path) == ("0", "2", "10")
