"""The tab offers to make a Python for the GPU processes where ComfyUI's lacks vLLM."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from support.comfy_page import NEWER_PAGE, ComfyPage, comfy_page
from support.comfy_server import NO_GPU, ComfyServer

pytestmark = pytest.mark.web

# What a ComfyUI without vLLM would find; the one of the tests has it.
WITHOUT_VLLM = """
import importlib.util as util

find_spec = util.find_spec
util.find_spec = lambda name, package=None: None if name == "vllm" else find_spec(name, package)
"""


@pytest.fixture(scope="module")
def own_page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyPage]:
    with page_without_vllm(browser, tmp_path_factory.mktemp("own_python")) as page:
        yield page


@pytest.fixture(scope="module")
def newer_page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyPage]:
    folder = tmp_path_factory.mktemp("own_python")
    with page_without_vllm(browser, folder, NEWER_PAGE) as page:
        yield page


@contextmanager
def page_without_vllm(
    browser: Browser, folder: Path, options: tuple[str, ...] = ("--cpu",)
) -> Iterator[ComfyPage]:
    """The page of such a ComfyUI, whose pip waits for an answer of its index."""
    (folder / "sitecustomize.py").write_text(WITHOUT_VLLM)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    with socket.create_server(("127.0.0.1", 0)) as index:
        env = {
            **NO_GPU,
            "PYTHONPATH": path,
            "TP_RUNTIME_HOME": str(folder / "home"),
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
        }
        with (
            ComfyServer(env=env, extra_args=options) as server,
            comfy_page(browser, server) as page,
        ):
            yield page


def test_shown_asked_for_watched_and_cancelled(web: ComfyPage) -> None:
    folder = Path(web.server.get("/tensor_parallel/python")["folder"])
    web.open_tab()
    part = web.page.locator(".tp-python")
    expect(part).to_contain_text("A Python for the GPU processes")
    expect(part).to_contain_text(f"-m venv --clear {folder}")
    expect(part).to_contain_text("requirements-runtime.txt")
    expect(part).to_contain_text("Takes up to 12.0 GiB of disk while it is made")
    assert not folder.exists()  # nothing is made unless a person asks for it
    part.get_by_role("button", name="Make it").click()
    expect(part).to_contain_text("Being made, 0 min")
    # What pip prints: that it collects a package, that the index does not answer, ...
    expect(part).not_to_contain_text("(It is empty.)", timeout=300_000)
    part.get_by_role("button", name="Cancel").click()
    expect(part.get_by_role("button", name="Make it")).to_be_visible()
    assert not folder.exists()


def test_nothing_is_offered_where_the_processes_have_a_python(web: ComfyPage) -> None:
    setting = "TensorParallel.Runtime.Python"
    web.open({setting: "/usr/bin/python3"})
    web.open_tab()
    expect(web.page.locator(".tp-doctor")).to_be_visible()
    expect(web.page.locator(".tp-python")).to_be_empty()
    web.server.post("/settings", {setting: ""})
