"""Where NIXL may be used at all."""

from pathlib import Path

import pytest

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.transports.nixl_host import has_fabric, host_identity


@pytest.mark.parametrize(
    ("host", "devices", "expected"),
    [
        ("127.0.0.1", ["mlx5_0"], False),
        ("::1", ["mlx5_0"], False),
        ("localhost", ["mlx5_0"], False),
        ("10.0.0.1", [], False),
        ("10.0.0.1", ["mlx5_0"], True),
        ("0.0.0.0", ["mlx5_0"], True),
        ("worker-7", ["mlx5_0"], True),
    ],
)
def test_fabric_is_used_by_workers_that_leave_loopback(
    tmp_path: Path, host: str, devices: list[str], expected: bool
) -> None:
    for device in devices:
        (tmp_path / device).mkdir()

    assert has_fabric(host, tmp_path) is expected


def test_host_without_infiniband_has_no_fabric(tmp_path: Path) -> None:
    assert not has_fabric("10.0.0.1", tmp_path / "nothing")


@pytest.mark.parametrize("scope", ["0\n", "1\n"])
def test_processes_of_one_host_have_one_identity(tmp_path: Path, scope: str) -> None:
    tracing = tmp_path / "ptrace_scope"
    tracing.write_text(scope)

    assert host_identity(tracing=tracing) == host_identity(tracing=tmp_path / "nothing")


@pytest.mark.parametrize("scope", ["2\n", "3\n", "?"])
def test_host_whose_processes_may_not_read_each_other_is_refused(tmp_path: Path, scope: str) -> None:
    tracing = tmp_path / "ptrace_scope"
    tracing.write_text(scope)

    with pytest.raises(TryElsewhereError) as caught:
        host_identity(tracing=tracing)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
