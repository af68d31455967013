"""One ComfyUI and one Chromium for all tests of the page; what they saw is kept in `out/web`."""

from collections.abc import Iterator

import pytest

from support.comfy_page import PICTURES, ComfyPage, chromium_path, comfy_page
from support.comfy_server import ComfyServer
from support.template_models import write_template_models


@pytest.fixture(scope="session")
def browser_page(comfy_server: ComfyServer) -> Iterator[ComfyPage]:
    if chromium_path() is None:
        pytest.skip("there is no chromium: `make browser` installs it")
    write_template_models(comfy_server.models)
    with comfy_page(comfy_server) as page:
        yield page


@pytest.fixture
def web(browser_page: ComfyPage, request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    """The page, freshly loaded. Afterwards a picture of it; neither it nor its scripts complain."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    browser_page.errors.clear()
    browser_page.open()
    yield browser_page
    name = "".join(c if c.isalnum() else "_" for c in request.node.name).strip("_")
    browser_page.page.screenshot(path=PICTURES / f"{name}.png")
    assert not browser_page.errors
    assert browser_page.page.locator(".p-toast-message-error").count() == 0
