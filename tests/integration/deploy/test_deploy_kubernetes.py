"""The Kubernetes manifests: valid each, at one with each other, and with what kvmesh makes of their command lines."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

from kvmesh.core.waits import Waits
from kvmesh.runtime.engine_registry import plan_engine
from kvmesh.runtime.health import LIVENESS
from kvmesh.runtime.served_role import ROLES
from kvmesh.runtime.server import CLEANUP_S, FLUSH_S
from kvmesh.runtime.settings import Settings

Manifest = dict[str, Any]
Kustomized = Callable[[Path], list[Manifest]]
Serving = Callable[[Sequence[str], Mapping[str, str]], Any]

STOP_S = Waits().drain_s + CLEANUP_S + FLUSH_S
VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The first where a preStop may sleep without a feature gate, and the newest."""
OF_A_POD = {"status.podIP": "10.1.2.3", "metadata.name": "pod-7"}
BASE, OVERLAY = "base", "overlays/two-nodes"


def pod_of(manifest: Manifest) -> Manifest:
    pod: Manifest = manifest.get("spec", {}).get("template", {}).get("spec", {})
    return pod


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] in kinds]


def selects(selector: Mapping[str, str], manifest: Manifest) -> bool:
    labels: Mapping[str, str] = manifest["spec"]["template"]["metadata"]["labels"]
    return selector.items() <= labels.items()


def schema_faults(manifests: Sequence[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        for version in VERSIONS:
            if fault := schema_fault(yaml.safe_dump(manifest), version):
                yield f"{manifest['metadata']['name']} ({version}): {fault}"


@cache  # copies differ in one file, and each call reads megabytes of schemas
def schema_fault(text: str, version: str) -> str | None:
    try:
        kubernetes_validate.validate(yaml.safe_load(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return None


def reference_faults(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield every name, label and port that leads nowhere."""
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    yield from (f"{name} is there twice" for name in set(names) if names.count(name) > 1)
    pods = of_kind(manifests, "Deployment", "StatefulSet")
    for pod in pods:
        yield from pod_faults(pod, set(names))
    for service in of_kind(manifests, "Service"):
        yield from service_faults(service, pods)
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        if not any(selects(budget["spec"]["selector"]["matchLabels"], pod) for pod in pods):
            yield f"PodDisruptionBudget {budget['metadata']['name']} selects nothing"
    for policy in of_kind(manifests, "NetworkPolicy"):
        behind = [pod for pod in pods if selects(policy["spec"]["podSelector"]["matchLabels"], pod)]
        known = {name for pod in behind for name in port_names(pod)}
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
        yield from (f"NetworkPolicy {policy['metadata']['name']} opens no port {name}" for name in opened - known)


def pod_faults(pod: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    name, spec = pod["metadata"]["name"], pod_of(pod)
    if not selects(pod["spec"]["selector"]["matchLabels"], pod):
        yield f"{name} does not select its own pods"
    if pod["kind"] == "StatefulSet" and ("Service", pod["spec"]["serviceName"]) not in names:
        yield f"{name} names no Service"
    for volume in spec["volumes"]:
        if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in names:
            yield f"{name} mounts ConfigMap {volume['configMap']['name']}, which is not there"
    for container in spec["containers"]:
        if {mount["name"] for mount in container["volumeMounts"]} != {volume["name"] for volume in spec["volumes"]}:
            yield f"{name} does not mount what it has"
        yield from probe_port_faults(name, container)


def service_faults(service: Manifest, pods: Sequence[Manifest]) -> Iterator[str]:
    name = service["metadata"]["name"]
    behind = [pod for pod in pods if selects(service["spec"]["selector"], pod)]
    if len(behind) != 1:
        yield f"Service {name} selects {len(behind)} roles"
    for port in service["spec"]["ports"]:
        if any(port["targetPort"] not in port_names(pod) for pod in behind):
            yield f"Service {name} leads to no port {port['targetPort']}"


def port_names(pod: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for one in pod_of(pod)["containers"] for port in one["ports"]}


def probe_port_faults(name: str, container: Manifest) -> Iterator[str]:
    known = {value for port in container["ports"] for value in (port["name"], port["containerPort"])}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container.get(kind, {})
        (port,) = [probe[way]["port"] for way in ("grpc", "httpGet") if way in probe] or [None]
        if port not in known:
            yield f"{name}: {kind} asks at port {port}, which is none of its own"


def settings_of(deployment: Manifest, manifests: Sequence[Manifest], serving: Serving, folder: Path) -> Any:
    """Return what the pod of a Deployment would serve; its ConfigMap is written to `folder`."""
    spec = pod_of(deployment)
    (container,) = spec["containers"]
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(manifests, "ConfigMap")}
    files = {
        f"{mount['mountPath']}/{name}": text
        for mount in container["volumeMounts"]
        for volume in spec["volumes"]
        if volume["name"] == mount["name"] and "configMap" in volume
        for name, text in maps.get(volume["configMap"]["name"], {}).items()
    }
    for path, text in files.items():
        (folder / Path(path).name).write_text(text)
    arguments = [str(folder / Path(word).name) if word in files else word for word in container["args"]]
    environment = {
        variable["name"]: variable.get("value") or OF_A_POD[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in container["env"]
    }
    return serving(arguments, environment)


def role_faults(manifests: Sequence[Manifest], serving: Serving, folder: Path) -> Iterator[str]:
    """Yield where a Deployment and the settings that its pods would have are at odds."""
    deployments = of_kind(manifests, "Deployment")
    components = [each["metadata"]["labels"]["app.kubernetes.io/component"] for each in deployments]
    if sorted(components) != sorted(ROLES):
        yield f"the Deployments are {components}"
    for deployment, component in zip(deployments, components, strict=True):
        spec = pod_of(deployment)
        (container,) = spec["containers"]
        try:
            role, settings = settings_of(deployment, manifests, serving, folder)
        except ValueError as error:
            yield f"{component}: {error}"
            continue
        plan_engine(settings.engine)
        if role != component:
            yield f"{component} serves {role}"
        if port_names(deployment) != ports_of(role, settings):
            yield f"{component} has the ports {port_names(deployment)}, it listens on {ports_of(role, settings)}"
        if (settings.process.advertise, settings.process.node) != ("10.1.2.3", "pod-7"):
            yield f"{component} tells others {settings.process.advertise}, {settings.process.node}"
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        if annotations["prometheus.io/port"] != str(
            ports_of(role, settings)["http" if role == "frontend" else "metrics"]
        ):
            yield f"{component} has no metrics at {annotations['prometheus.io/port']}"
        if spec["enableServiceLinks"]:
            yield f"{component}: variables of Services would be taken for settings"
        waits = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if not waits + STOP_S < spec["terminationGracePeriodSeconds"]:
            yield f"{component} is killed before it is drained"
        liveness = container["livenessProbe"]
        if "grpc" in liveness and liveness["grpc"].get("service") != LIVENESS:
            yield f"{component}: its liveness ends a drain"


def ports_of(role: str, settings: Settings) -> dict[str, int]:
    if role == "frontend":
        return {"grpc": settings.grpc.port, "http": settings.http.port}
    return {"grpc": settings.process.port, "metrics": settings.process.metrics_port}


def all_faults(folder: Path, kustomized: Kustomized, serving: Serving, scratch: Path) -> list[str]:
    try:
        manifests = kustomized(folder)
    except ValueError as error:
        return [str(error)]
    return [*schema_faults(manifests), *reference_faults(manifests), *role_faults(manifests, serving, scratch)]


@pytest.mark.parametrize("name", [BASE, OVERLAY])
def test_what_kustomize_builds_has_no_fault(
    name: str, root: Path, kustomized: Kustomized, serving: Serving, tmp_path: Path
) -> None:
    assert all_faults(root / "deploy/kubernetes" / name, kustomized, serving, tmp_path) == []


def test_every_manifest_is_valid_by_itself(root: Path) -> None:
    manifests = [
        manifest
        for path in (root / "deploy/kubernetes").rglob("*.yaml")
        if path.name != "kustomization.yaml"
        for manifest in yaml.safe_load_all(path.read_text())
    ]

    assert len(manifests) > 10
    assert list(schema_faults(manifests)) == []


class Break(NamedTuple):
    file: str
    old: str
    new: str
    told: str


BROKEN = [
    Break("decode.yaml", "readinessProbe:", "readyProbe:", "readyProbe"),
    Break("decode.yaml", "serve, decode,", "serve, decoder,", "decode: kvmesh serve decoder"),
    Break("decode.yaml", "serve, decode,", "serve, prefill,", "decode serves prefill"),
    Break("decode.yaml", "--config,", "--configuration,", "decode: kvmesh serve"),
    Break("decode.yaml", "replicas: 2", "replicas: two", "'two' is not"),
    Break(
        "decode.yaml", "  selector:\n    matchLabels: {", "  selector:\n    matchLabels: {app: other, ", "its own pods"
    ),
    Break("queue.yaml", 'prometheus.io/port: "9090"', 'prometheus.io/port: "8000"', "no metrics at 8000"),
    Break("queue.yaml", "name: metrics, containerPort: 9090", "name: metrics, containerPort: 9091", "it listens on"),
    Break("frontend.yaml", "targetPort: http", "targetPort: web", "leads to no port web"),
    Break("frontend.yaml", "seconds: 5", "seconds: 30", "killed before it is drained"),
    Break("frontend.yaml", "name: kvmesh-frontend\n  labels", "name: kvmesh-decode\n  labels", "twice"),
    Break("etcd.yaml", "serviceName: kvmesh-etcd", "serviceName: etcd", "names no Service"),
    Break("etcd.yaml", "path: /health, port: client", "path: /health, port: clients", "clients"),
    Break("network-policy.yaml", "port: http", "port: https", "opens no port https"),
    Break("every-role.yaml", "KVMESH_PROCESS__ADVERTISE", "KVMESH_PROCESS__ADVERTISED", "exit code 2"),
    Break("every-role.yaml", "status.podIP", "metadata.name", "tells others"),
    Break("every-role.yaml", "configMap: {name: kvmesh-settings}", "configMap: {name: settings}", "is not there"),
    Break("every-role.yaml", "mountPath: /etc/kvmesh,", "mountPath: /etc/settings,", "exit code 2"),
    Break("every-role.yaml", "50051, service: liveness", "50051", "liveness ends a drain"),
    Break("every-role.yaml", "grpc: {port: 50051}", "grpc: {port: 50052}", "asks at port 50052"),
    Break("every-role.yaml", "enableServiceLinks: false", "enableServiceLinks: true", "taken for settings"),
    Break("kvmesh.toml", "metrics_port", "metric_port", "exit code 2"),
    Break("kvmesh.toml", "insecure = true", "insecure = false", "exit code 2"),
    Break("kvmesh.toml", "port = 50051", "port = 50052", "it listens on"),
    Break("kustomization.yaml", "  - router.yaml\n", "", "router.yaml"),
    Break("kustomization.yaml", "  - router.yaml\n", "  - router.yaml\n  - gateway.yaml\n", "gateway.yaml"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=[f"{each.file}: {each.new}" for each in BROKEN])
def test_a_broken_copy_is_told(
    broken: Break, root: Path, kustomized: Kustomized, serving: Serving, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(root / "deploy/kubernetes/base", folder)
    text = (folder / broken.file).read_text()
    assert broken.old in text
    (folder / broken.file).write_text(text.replace(broken.old, broken.new))

    faults = all_faults(folder, kustomized, serving, tmp_path)

    assert any(broken.told in fault for fault in faults), faults


@pytest.mark.parametrize("name", [BASE, OVERLAY])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_builder_of_these_tests_builds_what_kustomize_builds(name: str, root: Path, kustomized: Kustomized) -> None:
    folder = root / "deploy/kubernetes" / name
    built = subprocess.run(
        ["kubectl", "kustomize", str(folder)], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    without_hash = re.sub(r"(kvmesh-settings)-\w{10}\b", r"\1", built)

    assert unordered(kustomized(folder)) == unordered(list(yaml.safe_load_all(without_hash)))


def unordered(value: Any) -> Any:
    """Return the value with its lists sorted: kustomize merges into them in an order of its own."""
    if isinstance(value, dict):
        return {key: unordered(value[key]) for key in sorted(value)}
    return sorted((unordered(item) for item in value), key=repr) if isinstance(value, list) else value
