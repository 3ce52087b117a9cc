"""Changes of etcd's keys become discovery events."""

from collections.abc import Sequence

from kvmesh.core.ids import Epoch
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.discovery import Deleted, Put, Snapshot
from kvmesh.discovery.etcd_records import encode, record_key
from kvmesh.discovery.etcd_view import RecordView, Standing
from kvmesh.etcd.v1 import etcd_pb2
from kvmesh.testing.discovery_contract import make_record

OLD, NEW, OTHER = make_record(0, epoch=1), make_record(0, epoch=2), make_record(1)


def kv(record: WorkerRecord, revision: int, *, is_stopped: bool = False) -> etcd_pb2.KeyValue:
    return etcd_pb2.KeyValue(
        key=record_key(record), value=encode(record, is_stopped=is_stopped), mod_revision=revision, lease_id=7
    )


def put(record: WorkerRecord, revision: int, *, is_stopped: bool = False) -> etcd_pb2.Event:
    return etcd_pb2.Event(kv=kv(record, revision, is_stopped=is_stopped))


def delete(record: WorkerRecord, revision: int) -> etcd_pb2.Event:
    return etcd_pb2.Event(is_delete=True, kv=etcd_pb2.KeyValue(key=record_key(record), mod_revision=revision))


def view_of(records: Sequence[WorkerRecord] = ()) -> RecordView:
    view = RecordView()
    view.reset([kv(record, revision) for revision, record in enumerate(records, start=1)])
    return view


def test_a_listing_shows_the_highest_epoch_of_each_worker_and_none_that_stopped() -> None:
    stopped = make_record(2)

    snapshot = RecordView().reset([kv(OTHER, 1), kv(NEW, 2), kv(OLD, 3), kv(stopped, 4, is_stopped=True)])

    assert snapshot == Snapshot((NEW, OTHER))


def test_a_listing_replaces_what_was_known() -> None:
    view = view_of([OLD, OTHER])

    snapshot = view.reset([kv(OTHER, 1)])

    assert snapshot == Snapshot((OTHER,))
    assert view.apply([delete(OLD, 2)]) == []


def test_an_epoch_that_replaces_another_in_one_revision_is_one_put() -> None:
    view = view_of([OLD])

    assert view.apply([delete(OLD, 5), put(NEW, 5)]) == [Put(NEW)]


def test_the_same_changes_in_two_revisions_are_two_events() -> None:
    view = view_of([OLD])

    events = view.apply([delete(OLD, 5), put(NEW, 6)])

    assert events == [Deleted(OLD.worker_id, Epoch(1), graceful=False), Put(NEW)]


def test_a_stop_is_told_at_its_mark_and_not_again_at_its_delete() -> None:
    view = view_of([OLD])

    at_mark = view.apply([put(OLD, 5, is_stopped=True)])
    at_delete = view.apply([delete(OLD, 6)])

    assert at_mark == [Deleted(OLD.worker_id, Epoch(1), graceful=True)]
    assert at_delete == []


def test_a_delete_without_a_mark_is_not_graceful() -> None:
    assert view_of([OLD]).apply([delete(OLD, 5)]) == [Deleted(OLD.worker_id, Epoch(1), graceful=False)]


def test_a_lower_epoch_beside_a_live_one_is_not_told() -> None:
    view = view_of([NEW])

    assert view.apply([put(OLD, 5), delete(OLD, 6)]) == []


def test_an_unchanged_record_put_again_is_not_told() -> None:
    assert view_of([OLD]).apply([put(OLD, 5)]) == []


def test_what_is_no_record_changes_nothing() -> None:
    view = view_of([OLD])
    nonsense = etcd_pb2.Event(kv=etcd_pb2.KeyValue(key=record_key(OLD), value=b'{"Op":0}', mod_revision=5))
    stranger = etcd_pb2.Event(kv=etcd_pb2.KeyValue(key=b"kvmesh/contract/decode/x/y", value=b"\xff", mod_revision=6))

    assert view.apply([nonsense, stranger]) == []
    assert view.apply([delete(OLD, 7)]) == [Deleted(OLD.worker_id, Epoch(1), graceful=False)]


def test_the_witness_is_the_last_change_of_a_key() -> None:
    view = view_of([OLD])
    view.apply([put(make_record(0, epoch=1, draining=True), 9)])

    assert view.witness() == Standing(record_key(OLD), mod_revision=9, lease_id=7)


def test_a_key_under_a_lease_is_the_better_witness() -> None:
    view = RecordView()
    view.reset([etcd_pb2.KeyValue(key=b"kvmesh/contract/a", value=b"x", mod_revision=1), kv(OLD, 2)])

    assert view.witness() == Standing(record_key(OLD), mod_revision=2, lease_id=7)


def test_keys_of_others_are_witnesses_too_until_they_go() -> None:
    view = RecordView()
    foreign = etcd_pb2.KeyValue(key=b"kvmesh/contract/a", value=b"x", mod_revision=3)
    view.reset([foreign])

    before = view.witness()
    view.apply([etcd_pb2.Event(is_delete=True, kv=foreign)])

    assert before == Standing(b"kvmesh/contract/a", mod_revision=3, lease_id=0)
    assert view.witness() is None
