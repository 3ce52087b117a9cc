"""Components of a mesh as Python classes: declare, serve, call. docs/sdk.md is the guide."""

from kvmesh.core.errors import (
    BackOffError,
    FixRequestError,
    MeshError,
    NotKnownError,
    Reason,
    TryElsewhereError,
)
from kvmesh.sdk.client import Client
from kvmesh.sdk.context import context
from kvmesh.sdk.declarations import UnannotatedResultWarning, endpoint, on_shutdown, on_start, service
from kvmesh.sdk.definitions import DeclarationError
from kvmesh.sdk.dependencies import Graph, depends, link
from kvmesh.sdk.handles import Component, Endpoint, Namespace
from kvmesh.sdk.kv import (
    AggregatedMetrics,
    EndpointMetrics,
    KvEventPublisher,
    KvIndexer,
    KvMetricsAggregator,
    KvMetricsPublisher,
    OverlapScores,
)
from kvmesh.sdk.runtime import Runtime, connect, worker

async_on_start = on_start
async_on_shutdown = on_shutdown

__all__ = [
    "AggregatedMetrics",
    "BackOffError",
    "Client",
    "Component",
    "DeclarationError",
    "Endpoint",
    "EndpointMetrics",
    "FixRequestError",
    "Graph",
    "KvEventPublisher",
    "KvIndexer",
    "KvMetricsAggregator",
    "KvMetricsPublisher",
    "MeshError",
    "Namespace",
    "NotKnownError",
    "OverlapScores",
    "Reason",
    "Runtime",
    "TryElsewhereError",
    "UnannotatedResultWarning",
    "async_on_shutdown",
    "async_on_start",
    "connect",
    "context",
    "depends",
    "endpoint",
    "link",
    "on_shutdown",
    "on_start",
    "service",
    "worker",
]
