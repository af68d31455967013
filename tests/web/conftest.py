"""ComfyUI's page in one Chromium; what the tests saw is kept in `out/web`.

A page is a frontend, ComfyUI's own or the newer one, that draws its nodes on a canvas or in HTML
("Nodes 2.0"). A test runs in the own one, on the canvas; with the mark `every_page` in each, with
`html_page` in those of HTML nodes. `--page` has all of them run in that one alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, expect

from support.comfy_page import NEWER_PAGE, PICTURES, ComfyPage, chromium, chromium_path, comfy_page
from support.comfy_server import NO_GPU, ComfyServer
from support.compatibility import NEWER
from support.paths import NEWER_FRONTEND
from support.rotation import chosen
from support.template_models import write_template_models
from support.workflows import node

expect.set_options(timeout=60_000)  # on a machine that is busy


class Kind(NamedTuple):
    """Which fixture has the frontend, and whether nodes are drawn in HTML there."""

    frontend: str
    html: bool


PAGES = {
    "own": Kind("own_page", html=False),
    "own-html": Kind("own_page", html=True),
    "newer": Kind("newer_page", html=False),
    "newer-html": Kind("newer_page", html=True),
}
if not NEWER:  # in frontend 1.32 they are an experiment, in which packs add nothing to menus
    del PAGES["own-html"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What every page must do runs in the one that the commit chooses, or in each."""
    if "web" not in metafunc.fixturenames:
        return
    names = ["own"]
    if metafunc.definition.get_closest_marker("every_page"):
        names = list(PAGES)
    elif metafunc.definition.get_closest_marker("html_page"):
        names = [name for name, kind in PAGES.items() if kind.html]
    if (only := metafunc.config.option.page) is not None:
        if only not in PAGES:
            raise pytest.UsageError(f"--page {only}: choose one of {', '.join(PAGES)}")
        if names != ["own"] and only not in names:
            skip = pytest.mark.skip(reason="only where nodes are drawn in HTML")
            metafunc.parametrize("web", [pytest.param(only, marks=skip)])
            return
        names = [only]
    elif commit := metafunc.config.option.rotate:
        names = [chosen(names, "frontend", commit)]
    if names != ["own"]:
        metafunc.parametrize("web", names, indirect=True)


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
def newer_page(
    browser: Browser, servers_leave_nothing: None, tiny_z_image: Path
) -> Iterator[ComfyPage]:
    """The newest frontend, with a ComfyUI of its own."""
    if not NEWER_FRONTEND.is_dir():
        pytest.skip("there is no newer frontend: `make comfyui` fetches it")
    with ComfyServer(env=NO_GPU, extra_args=NEWER_PAGE) as server:
        (server.models / "diffusion_models" / tiny_z_image.name).symlink_to(tiny_z_image)
        write_template_models(server.models)
        with comfy_page(browser, server) as page:
            yield page


@pytest.fixture
def web(request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    """The page, freshly loaded. Afterwards a picture of it; neither it nor its scripts complain,
    and of what the pack does there nothing is deprecated.

    One of `PAGES`, the own one if nothing else is said.
    """
    name = getattr(request, "param", "own")
    frontend, html = PAGES[name]
    page: ComfyPage = request.getfixturevalue(frontend)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.name, page.html = name, html
    page.errors.clear()
    page.open()
    yield page
    picture = "".join(c if c.isalnum() else "_" for c in request.node.name).strip("_")
    page.page.screenshot(path=PICTURES / f"{picture}.png")
    errors, shown = list(page.errors), page.toasts("error")
    deprecated = page.deprecated()
    page.page.goto("about:blank")  # an open page of ComfyUI draws, and takes a quarter of a core
    assert not errors
    assert shown == ""
    assert not deprecated


@pytest.fixture
def alone(web: ComfyPage) -> ComfyPage:
    """The page where no group runs, whichever tests went before."""
    web.server.run({"release": node("TPReleaseRuntime")})
    assert not web.server.ranks()
    return web
