"""Roles that are served one by one, for the tests that put a mesh together by hand."""

from collections.abc import Iterator

import pytest

from kvmesh.testing.role_cluster import RoleCluster


@pytest.fixture
def cluster() -> Iterator[RoleCluster]:
    with RoleCluster() as cluster:
        yield cluster
