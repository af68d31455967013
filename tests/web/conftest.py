"""One ComfyUI and one Chromium for all tests of the page; what they saw is kept in `out/web`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from support.comfy_page import PICTURES, ComfyPage, chromium, chromium_path, comfy_page
from support.comfy_server import NO_GPU, ComfyServer
from support.paths import NEWER_FRONTEND
from support.rotation import chosen
from support.template_models import write_template_models
from support.workflows import node

FRONTENDS = ("own_page", "newer_page")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What both frontends must do runs on the one that the commit chooses, or on both."""
    if metafunc.definition.get_closest_marker("both_frontends"):
        commit = metafunc.config.option.rotate
        pages = (chosen(FRONTENDS, "frontend", commit),) if commit else FRONTENDS
        metafunc.parametrize("web", pages, indirect=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if chromium_path() is None:
        pytest.skip("there is no chromium: `make browser` installs it")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def own_page(browser: Browser, comfy_server: ComfyServer) -> Iterator[ComfyPage]:
    """The frontend that this ComfyUI comes with."""
    write_template_models(comfy_server.models)
    with comfy_page(browser, comfy_server) as page:
        yield page


@pytest.fixture(scope="session")
def newer_page(browser: Browser, tiny_z_image: Path) -> Iterator[ComfyPage]:
    """The newest frontend, with a ComfyUI of its own."""
    if not NEWER_FRONTEND.is_dir():
        pytest.skip("there is no newer frontend: `make comfyui` fetches it")
    arguments = ("--cpu", "--front-end-root", str(NEWER_FRONTEND))
    with ComfyServer(env=NO_GPU, extra_args=arguments) as server:
        (server.models / "diffusion_models" / tiny_z_image.name).symlink_to(tiny_z_image)
        write_template_models(server.models)
        with comfy_page(browser, server) as page:
            yield page


@pytest.fixture
def web(request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    """The page, freshly loaded. Afterwards a picture of it; neither it nor its scripts complain.

    ComfyUI's own frontend, or the one that the test names (`both_frontends`).
    """
    page: ComfyPage = request.getfixturevalue(getattr(request, "param", "own_page"))
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.errors.clear()
    page.open()
    yield page
    name = "".join(c if c.isalnum() else "_" for c in request.node.name).strip("_")
    page.page.screenshot(path=PICTURES / f"{name}.png")
    errors, shown = list(page.errors), page.toasts("error")
    page.page.goto("about:blank")  # an open page of ComfyUI draws, and takes a quarter of a core
    assert not errors
    assert shown == ""


@pytest.fixture
def alone(web: ComfyPage) -> ComfyPage:
    """The page where no group runs, whichever tests went before."""
    web.server.run({"release": node("TPReleaseRuntime")})
    assert not web.server.ranks()
    return web
