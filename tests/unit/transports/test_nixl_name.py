"""The public name of a pool served over NIXL."""

import pytest

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.transports.nixl_name import NixlName

NAME = NixlName(
    agent_name="node/prefill/0@17",
    token=bytes(range(16)),
    blocks=512,
    block_bytes=262_144,
    address=0x7F00_0000_1000,
    token_address=0x7F00_1234_5678,
    metadata=bytes(range(256)) * 2,
)


def test_name_is_read_as_it_was_written() -> None:
    public_name = str(NAME)

    assert NixlName.parse(public_name) == NAME
    assert public_name.startswith("node/prefill/0@17@")
    assert public_name.count("@") == 2


@pytest.mark.parametrize(
    "altered",
    [
        str(NAME).replace("prefill/0", "prefill/1"),
        str(NAME).replace("@17@", "@18@"),
        str(NAME)[:-8],
        str(NAME)[:-2] + "AA",
        str(NAME) + "AAAA",
        "node/prefill/0@17@",
        "node/prefill/0@17@AAAA",
        "node/prefill/0@17@\u00e9\u00e9\u00e9\u00e9",
        "\ud800@" + str(NAME),
        "@" + str(NAME).rpartition("@")[2],
        str(NAME).rpartition("@")[2],
        "node@" + "A" * 100_000,
        "",
    ],
)
def test_name_that_was_altered_is_refused(altered: str) -> None:
    with pytest.raises(TryElsewhereError) as caught:
        NixlName.parse(altered)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
