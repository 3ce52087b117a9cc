"""EtcdDiscovery against the contract suite, on a real etcd."""

from collections.abc import AsyncIterator, Iterator

import pytest

from kvmesh.discovery.discovery import Registration
from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.discovery.etcd import EtcdDiscovery
from kvmesh.discovery.etcd_client import EtcdClient
from kvmesh.discovery.etcd_registration import EtcdRegistration
from kvmesh.testing.discovery_contract import DiscoveryContract
from kvmesh.testing.etcd_server import EtcdServer

pytestmark = pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd]")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


class TestEtcdDiscovery(DiscoveryContract):
    @pytest.fixture
    async def discovery(self, etcd: EtcdServer) -> AsyncIterator[EtcdDiscovery]:
        self.etcd = etcd
        etcd.wipe()
        discovery = EtcdDiscovery([etcd.endpoint])
        yield discovery
        await discovery.aclose()

    async def lose(self, registration: Registration) -> None:
        assert isinstance(registration, EtcdRegistration)
        client = EtcdClient([self.etcd.endpoint])
        await client.revoke_lease(registration.lease_id)
        await client.aclose()
