"""Where a role says that it is reached."""

import pytest

from kvmesh.runtime.role import Listen


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        pytest.param(Listen("127.0.0.1"), "127.0.0.1:5000", id="what it binds"),
        pytest.param(Listen("0.0.0.0", advertise="worker-1"), "worker-1:5000", id="another host"),
        pytest.param(Listen("0.0.0.0", advertise="edge", advertise_port=7000), "edge:7000", id="a mapped port"),
        pytest.param(Listen("::1", advertise_port=7000), "[::1]:7000", id="an IPv6 host and a mapped port"),
    ],
)
def test_address_is_what_is_advertised_and_else_what_is_bound(listen: Listen, address: str) -> None:
    assert listen.address(5000) == address
