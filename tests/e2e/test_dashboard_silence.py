"""The dashboard of a mesh whose router is gone: nothing that it alone knows is shown as a figure."""

import pytest

from kvmesh.testing.chromium import find_chromium, running_chromium
from kvmesh.testing.mesh import running_mesh

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium: make install-chromium")

WORKER = "document.querySelector('[data-worker=\"NODE1/decode/0\"]')"
UNKNOWN = "\N{EN DASH}"
PICTURE = "document.querySelector('.picture').textContent"


async def test_a_router_that_does_not_answer_is_said_and_the_loads_are_unknown() -> None:
    async with running_mesh(engine__name="simulated", mesh__decode=1, mesh__prefill=0, mesh__router="separate") as mesh:
        (router,) = [role for role in mesh.others if "/router/" in role.name]
        async with running_chromium() as chromium:
            page = await chromium.open(f"http://{mesh.http_address}/", width=1280, height=900)
            await page.wait_for(f"{WORKER}?.querySelector('.state').textContent == 'ready'")

            await router.stop()
            await page.wait_for(f"{WORKER}.querySelector('.state').textContent == 'unknown'")
            cells = await page.evaluate(f"[...{WORKER}.children].slice(2).map((cell) => cell.textContent)")
            picture = await page.evaluate(PICTURE)

    assert cells == [UNKNOWN, UNKNOWN, f"{UNKNOWN} of 16,384 blocks", UNKNOWN, UNKNOWN, UNKNOWN]
    assert "not answering" in picture
    assert f"unknown: {UNKNOWN}" in picture
