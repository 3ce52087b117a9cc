"""One incarnation's record in etcd, kept there under a lease until its owner stops it.

Every third of the lease's life: renew the lease, look whether the record stands as it should. Whatever is missing, be
it the lease, the record or the whole store, is put back; while etcd does not answer it is asked again and again. A
higher epoch under the same worker_id has the place while it is there: the lower one stands back, and returns after it.
"""

import asyncio

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, FixRequestError, NotKnownError, Reason
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.etcd_client import EtcdClient, EtcdUnavailableError, LeaseEndedError
from kvmesh.discovery.etcd_records import encode, key_epoch, mark_stopped, put_record, record_key
from kvmesh.discovery.etcd_retry import Retry
from kvmesh.etcd.v1 import etcd_pb2

log = telemetry.logger(__name__)


class EtcdRegistration:
    """The Registration of `EtcdDiscovery`."""

    def __init__(self, client: EtcdClient, record: WorkerRecord, *, ttl_s: int) -> None:
        """Hold `record` in the store from `start` on."""
        self._client = client
        self._record = record
        self._ttl_s = ttl_s
        self._lease: etcd_pb2.LeaseGrantResponse | None = None
        self._superseded_by: int | None = None
        """The higher epoch that was found live."""
        self._is_standing_back = False
        self._is_stopped = False
        self._store = asyncio.Lock()
        """Held by whoever writes: the owner's updates and the upkeep take turns."""
        self._due = asyncio.Event()
        """Set when the upkeep should not wait for its turn."""
        self._settled = asyncio.Event()
        """Set once the record stands, or cannot."""
        self._registered = asyncio.Event()
        """Set once the record has stood."""
        self._is_starting = True
        """False once `start` is over: nobody is left to raise a conflict to."""
        self._upkeep: asyncio.Task[None] | None = None
        self._log = log.bind(worker_id=record.worker_id, epoch=record.epoch)

    @property
    def lease_id(self) -> int:
        """The lease that the record stands under; 0 while there is none."""
        return self._lease.lease_id if self._lease is not None else 0

    async def start(self, wait_s: float) -> None:
        """Begin to hold the record, and wait `wait_s` for it to stand; the upkeep goes on trying after that.

        Raises: ConflictError(STALE_EPOCH) if a higher epoch is live.
        """
        self._upkeep = asyncio.get_running_loop().create_task(self._keep(), name=f"register-{self._record.worker_id}")
        self._upkeep.add_done_callback(self._upkeep_ended)
        try:
            async with asyncio.timeout(wait_s):
                await self._settled.wait()
        except TimeoutError:
            self._log.warning("registration.pending", waited_s=wait_s)
        except asyncio.CancelledError:
            await self.aclose()
            raise
        finally:
            self._is_starting = False
        self._require_highest()

    async def wait_registered(self) -> None:
        """See Registration.wait_registered."""
        await self._registered.wait()

    async def update(self, record: WorkerRecord) -> None:
        """See Registration.update; while etcd does not answer, the new record is kept and put as soon as it does."""
        for field in ("worker_id", "epoch", "namespace", "role"):
            if getattr(record, field) != getattr(self._record, field):
                raise FixRequestError(Reason.INVALID_FIELD, f"{field} of a registration cannot change", field=field)
        if self._is_stopped:
            raise NotKnownError(Reason.NOT_FOUND, f"{record.worker_id} has stopped")
        self._record = record
        try:
            async with self._store:
                await self._put()
        except EtcdUnavailableError as exc:
            self._log.warning("registration.update_pending", error=str(exc))
            self._due.set()

    async def stop(self) -> None:
        """See Registration.stop; if etcd does not answer, the lease runs out by itself."""
        if self._is_stopped:
            return
        self._is_stopped = True
        await self.aclose()
        if self._lease is None:
            return
        try:
            await self._client.transact(mark_stopped(self._record, self._lease.lease_id))
            await self._client.revoke_lease(self._lease.lease_id)  # deletes the record
        except LeaseEndedError:
            return  # and the record with it
        except EtcdUnavailableError as exc:
            self._log.warning("registration.stop_untold", error=str(exc))

    async def aclose(self) -> None:
        """End the upkeep and leave the record to its lease. Idempotent."""
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait((self._upkeep,))

    async def _keep(self) -> None:
        retry = Retry("registration", worker_id=self._record.worker_id)
        while True:
            self._due.clear()
            try:
                async with self._store:
                    pause_s = await self._look_after()
            except EtcdUnavailableError as exc:
                await retry.failed(exc)
                continue
            except ConflictError as exc:
                if self._is_starting:
                    return  # `start` raises it
                pause_s = self._stand_back(exc)
            else:
                retry.succeeded()
                self._come_back()
                self._registered.set()
                self._settled.set()
            try:
                async with asyncio.timeout(pause_s):
                    await self._due.wait()
            except TimeoutError:
                continue

    def _stand_back(self, conflict: ConflictError) -> float:
        """Leave the place to the higher epoch; return after how long to see whether that is still there."""
        if not self._is_standing_back:
            self._is_standing_back = True
            self._log.warning(
                "registration.superseded", error=str(conflict),
                fix="two processes have one id: give them different --index, --node or --namespace",
            )  # fmt: skip
        return self._ttl_s / 3

    def _come_back(self) -> None:
        if self._is_standing_back:
            self._is_standing_back = False
            self._log.info("registration.back")

    async def _look_after(self) -> float:
        """Make sure that the lease lives and the record stands under it; return how long that may be taken for granted.

        Raises: ConflictError(STALE_EPOCH), EtcdUnavailableError.
        """
        if self._lease is not None:
            try:
                await self._client.renew_lease(self._lease.lease_id)
            except LeaseEndedError:
                self._lose_lease()
        if self._lease is None or not await self._stands():
            self._superseded_by = None  # found again if it is still live
            await self._put()
        assert self._lease is not None
        return self._lease.ttl_s / 3

    async def _stands(self) -> bool:
        answer = await self._client.get(record_key(self._record))
        wanted = (encode(self._record), self.lease_id)
        return [(kv.value, kv.lease_id) for kv in answer.kvs] == [wanted]

    async def _put(self) -> None:
        """Put the record under the lease, or under a new one if that has ended.

        Raises: ConflictError(STALE_EPOCH), EtcdUnavailableError.
        """
        self._require_highest()
        if self._lease is not None:
            try:
                return await self._put_under(self._lease.lease_id)
            except LeaseEndedError:
                self._lose_lease()
        self._lease = await self._client.grant_lease(self._ttl_s)
        try:
            await self._put_under(self._lease.lease_id)
        except LeaseEndedError as exc:  # a store that lets a lease go at once will not do better just now
            self._lose_lease()
            raise EtcdUnavailableError(f"a new lease has ended: {exc}") from exc

    async def _put_under(self, lease_id: int) -> None:
        answer = await self._client.transact(put_record(self._record, lease_id))
        if not answer.succeeded:
            self._superseded_by = key_epoch(answer.responses[0].response_range.kvs[0].key)
        self._require_highest()

    def _require_highest(self) -> None:
        if self._superseded_by is not None:
            raise ConflictError(
                Reason.STALE_EPOCH,
                f"{self._record.worker_id} is live with epoch {self._superseded_by}, above {self._record.epoch}",
            )

    def _lose_lease(self) -> None:
        telemetry.DISCOVERY_LEASES_LOST.inc()
        self._log.warning("registration.lease_lost", lease_id=f"{self.lease_id:x}")
        self._lease = None

    def _upkeep_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("registration.failed", exc_info=error)
        self._settled.set()
