"""The tab offers to make a Python for the GPU processes where ComfyUI's lacks vLLM."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from support.comfy_page import NEWER_PAGE, PICTURES, ComfyPage, comfy_page
from support.comfy_server import NO_GPU, ComfyServer
from support.workflows import Sampling, text_to_latent, tp_loader

pytestmark = [pytest.mark.web, pytest.mark.rotates(2)]

# What a ComfyUI without vLLM would find, and its ranks; the one of the tests has it.
WITHOUT_VLLM = """
import importlib.util as util
import sys


class WithoutVllm:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, WithoutVllm)
find_spec = util.find_spec
util.find_spec = lambda name, package=None: None if name == "vllm" else find_spec(name, package)
"""

# Of a paragraph in a note, the sentences that are seen before it is scrolled.
SHOWN = """(paragraph) => {
    const { firstChild, parentElement } = paragraph;
    const bottom = parentElement.getBoundingClientRect().bottom;
    const range = document.createRange();
    range.setStart(firstChild, 0);
    let shown = "";
    for (let end = 1; end <= firstChild.length; end += 1) {
        range.setEnd(firstChild, end);
        if (range.getBoundingClientRect().bottom > bottom + 1) break;
        if (firstChild.data[end - 1] === ".") shown = range.toString();
    }
    return shown;
}"""


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
            "TP_RUNTIME_HOME": str(
                folder / "home_of_a_name_that_no_line_has_room_for_and_no_hyphen"
            ),
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
    expect(part).to_contain_text("Takes up to 14.0 GiB of disk while it is made")
    web.page.screenshot(path=PICTURES / f"screen_own_python_{web.name}.png")
    assert web.cut_off(part) == []
    assert not folder.exists()  # nothing is made unless a person asks for it
    part.get_by_role("button", name="Make it").click()
    expect(part).to_contain_text("Being made, 0 min")
    expect(part.locator("pre")).to_have_text(re.compile(r"\S"))  # the command, or what it prints
    cancel = part.get_by_role("button", name="Cancel")
    cancel.focus()
    # What pip prints: that it collects a package, that the index does not answer, ...
    expect(part.locator("pre")).not_to_have_text(re.compile(r"^\$"), timeout=300_000)
    web.page.screenshot(path=PICTURES / f"screen_own_python_making_{web.name}.png")
    expect(cancel).to_be_focused()  # a button that is put anew would not be
    cancel.click()
    expect(part.get_by_role("button", name="Make it")).to_be_visible(timeout=60_000)
    assert not folder.exists()


def test_the_first_run_says_what_to_do(web: ComfyPage, tiny_z_image: Path) -> None:
    """On the node, and the Python of its own before what would change ComfyUI's."""
    file = web.server.models / "diffusion_models" / tiny_z_image.name
    if not file.exists():
        file.symlink_to(tiny_z_image)
    web.open()  # with the file in its lists
    web.load_prompt(text_to_latent(tp_loader(file.name, 2), "TPSampler", Sampling(steps=1)))
    web.press_run()
    said = web.page.locator(".tp-note p").get_by_text("No module named 'vllm'")
    said.wait_for(timeout=120_000)
    web.page.wait_for_timeout(1000)
    web.page.screenshot(path=PICTURES / f"screen_first_start_{web.name}.png")
    own, advice = "the tab 'Tensor Parallel' makes one.", "vLLM replaces its torch"
    assert said.evaluate(SHOWN).endswith(own)  # the rest scrolls
    assert advice in said.inner_text()
    details = web.page.get_by_role("button", name="View details")  # newer frontends show no more
    if details.is_visible():
        details.click()
        web.page.wait_for_timeout(1000)
        web.page.screenshot(path=PICTURES / f"screen_first_start_details_{web.name}.png")
    web.open()  # and the error is gone


def test_nothing_is_offered_where_the_processes_have_a_python(web: ComfyPage) -> None:
    choose = "(path) => app.extensionManager.setting.set('TensorParallel.Runtime.Python', path)"
    web.open_tab()
    part = web.page.locator(".tp-python")
    expect(part).to_contain_text("A Python for the GPU processes")
    web.page.evaluate(choose, "/usr/bin/python3")
    expect(part).to_be_empty()
    web.open()
    web.open_tab()
    expect(web.page.locator(".tp-doctor")).to_be_visible()
    expect(part).to_be_empty()
    web.page.evaluate(choose, "")
    expect(part).to_contain_text("A Python for the GPU processes")
