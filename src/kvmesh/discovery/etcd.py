"""Discovery through etcd, for a mesh of many processes and machines.

Nothing here ends a process: while the store is away registrations keep trying, and watchers keep their last view.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.discovery import DiscoveryEvent
from kvmesh.discovery.etcd_client import EtcdClient
from kvmesh.discovery.etcd_registration import EtcdRegistration
from kvmesh.discovery.etcd_watch import EtcdWatch

TTL_S = 10
"""How long a record outlives the last sign of life of its process."""


class EtcdDiscovery:
    """The Discovery over an etcd cluster; `aclose` it after the registrations were stopped."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        ttl_s: int = TTL_S,
        rpc_timeout_s: float = 2.0,
        register_wait_s: float = 5.0,
    ) -> None:
        """Use the members at `endpoints` (HOST:PORT), any that answers; etcd raises a `ttl_s` below its minimum, 2 s.

        `register` returns after `register_wait_s` at the latest, and the record follows when the store answers.
        """
        self._client = EtcdClient(endpoints, rpc_timeout_s=rpc_timeout_s)
        self._ttl_s = ttl_s
        self._register_wait_s = register_wait_s
        self._registrations: set[EtcdRegistration] = set()
        self._closed = asyncio.Event()

    async def register(self, record: WorkerRecord) -> EtcdRegistration:
        """See Discovery.register. A store that does not answer is no error: the record follows when it does."""
        if self._closed.is_set():
            raise TryElsewhereError(Reason.DRAINING, "discovery is closed")
        registration = EtcdRegistration(self._client, record, ttl_s=self._ttl_s)
        self._registrations.add(registration)
        try:
            await registration.start(self._register_wait_s)
        except BaseException:
            self._registrations.discard(registration)
            raise
        return registration

    async def watch(self, namespace: str) -> AsyncGenerator[DiscoveryEvent, None]:
        """See Discovery.watch. What is not read yet waits in etcd's store: a slow reader costs nobody memory."""
        watch = EtcdWatch(self._client, namespace)
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            while not self._closed.is_set():
                reading = asyncio.ensure_future(watch.read())
                try:
                    await asyncio.wait((reading, closing), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not reading.done():
                        reading.cancel()
                        await asyncio.wait((reading,))
                if self._closed.is_set():
                    return
                for event in await reading:
                    yield event
        finally:
            watch.close()
            closing.cancel()

    async def aclose(self) -> None:
        """See Discovery.aclose. Records not stopped before are left to their leases."""
        self._closed.set()
        for registration in self._registrations:
            await registration.aclose()
        await self._client.aclose()
