"""ComfyUI's page in a real Chromium, for the tests marked `web` and the scripts that make pictures.

Debian's chromium, driven by playwright: playwright's own browser would be another download.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from playwright.sync_api import Browser, Locator, Page, sync_playwright
from playwright.sync_api import TimeoutError as PageTimeoutError

from support.comfy_server import PACK_FOLDER, ComfyServer
from support.paths import NEWER_FRONTEND, REPOSITORY

PICTURES = REPOSITORY / "out" / "web"
# ComfyUI's options for the newer frontend.
NEWER_PAGE = ("--cpu", "--front-end-root", str(NEWER_FRONTEND))
SIZE = {"width": 1400, "height": 880}
# A person who has seen ComfyUI before: no tour, no dialog at the start.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.32.9",
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
    "Comfy.Validation.Workflows": False,
    "Comfy.Workflow.Persist": False,  # or the page opens what it had open before
}

# What the page warns of as deprecated while a function of the pack runs.
DEPRECATED = """
Error.stackTraceLimit = 50;
window.deprecated = [];
const warn = console.warn;
console.warn = (...words) => {
    const { stack } = new Error();
    if (/deprecated/i.test(words.join(" ")) && stack.includes("/extensions/PACK/"))
        window.deprecated.push(words.join(" "));
    warn(...words);
};"""

# The page then hears of no events of that kind but those of `tell`.
LEAVE_OUT = """(kind) => {
    const { api } = window.comfyAPI.api;
    const dispatch = api.dispatchCustomEvent;
    window.dispatchAny ??= dispatch;
    api.dispatchCustomEvent = function (type, ...rest) {
        return type.startsWith(kind) || dispatch.call(this, type, ...rest);
    };
}"""

# What is wider than its box in an element, unless it ends in an ellipsis and has it all as a title.
CUT_OFF = """(root) => [root, ...root.querySelectorAll('*')]
    .filter((one) => one.offsetParent && one.clientWidth && one.scrollWidth > one.clientWidth + 1)
    .filter((one) => !(getComputedStyle(one).textOverflow === 'ellipsis' && one.title))
    .map((one) => `${one.className}: ${one.textContent}`)"""


_RANKS = [
    {
        "rank": rank,
        "device": f"cuda:{rank}",
        "pid": rank,
        "models": {},
        "memory": {"allocated_bytes": 40e9, "total_bytes": 80e9},
    }
    for rank in range(2)
]
_GROUP = {
    "tp_size": 2,
    "sequence_size": 1,
    "batch_groups": 1,
    "device": "cuda",
    "devices": [0, 1],
    "models": {"z_image_turbo_bf16.safetensors@1": {"bytes": [6e9, 6e9], "asleep": False}},
    "error": None,
    "step_ms": 55,
    "log_tail": "",
    "ready_ranks": 0,
    "starting_s": 0.0,
    "ranks": _RANKS,
}
# A group in each state, as the server tells the page of them.
GROUPS: tuple[dict[str, Any], ...] = (
    {
        **_GROUP,
        "id": "1",
        "state": "starting",
        "ranks": [],
        "models": {},
        "ready_ranks": 1,
        "starting_s": 70.0,
    },
    {**_GROUP, "id": "2", "state": "ready"},
    {**_GROUP, "id": "3", "state": "busy"},
    {
        **_GROUP,
        "id": "4",
        "state": "failed",
        "error": "Rank 1 was killed by signal 9.",
        "log_tail": "the last line",
    },
    {**_GROUP, "id": "5", "state": "closed"},
)


def chromium_path() -> str | None:
    """Debian's chromium; None where it is not installed."""
    return shutil.which("chromium")


class ComfyPage:
    """One tab with ComfyUI in it. `page` is playwright's.

    `html`: whether nodes are drawn in HTML ("Nodes 2.0"), not on the canvas, once it is opened.
    `name`: of this kind of page, in the names of pictures.
    """

    def __init__(self, page: Page, server: ComfyServer) -> None:
        self.page = page
        self.server = server
        self.html = False
        self.name = "own"
        self.errors: list[str] = []
        page.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        page.add_init_script(DEPRECATED.replace("PACK", PACK_FOLDER))
        page.set_default_timeout(60_000)  # on a machine that is busy
        page.set_default_navigation_timeout(120_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, settings: Mapping[str, Any] | None = None) -> None:
        """(Re)load the page with these settings stored on the server; ready when this returns."""
        drawn = {"Comfy.VueNodes.Enabled": self.html}
        self.server.post("/settings", {**SETTINGS, **drawn, **(settings or {})})
        self.page.goto(self.server.url)
        self.page.wait_for_function(
            "window.app?.extensionManager?.getSidebarTabs?.()"
            ".some((tab) => tab.id === 'tensor-parallel')",
            timeout=120_000,
        )
        self.page.wait_for_function("window.app.graph && !document.querySelector('#splash-loader')")
        self.page.wait_for_function(
            "[...document.styleSheets].some((sheet) => sheet.href?.endsWith('/panel.css'))"
        )

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a workflow in the page's format."""
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)

    def load_prompt(self, prompt: Mapping[str, Any]) -> None:
        """Open a prompt in the API's format; ComfyUI arranges the nodes."""
        self.page.evaluate("(prompt) => app.loadApiJson(prompt, 'test')", prompt)

    def prompt(self) -> dict[str, Any]:
        """What the page would send to the server for its workflow."""
        made = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return dict(made)

    def widget(self, node_type: str, name: str, part: str = "value") -> Any:
        """A widget's `value`, `tooltip` or `options.values`, of the first node of a type."""
        return self.page.evaluate(
            "([type, name, part]) => part.split('.').reduce((value, key) => value?.[key], "
            "app.graph.nodes.find((node) => node.comfyClass === type)"
            ".widgets.find((widget) => widget.name === name))",
            [node_type, name, part],
        )

    def run_command(self, command_id: str) -> None:
        """Run a command of the page, as its menus do."""
        self.page.evaluate("(id) => app.extensionManager.command.execute(id)", command_id)

    def tell(self, event: str, detail: Any) -> None:
        """An event of the pack, as if the server had sent it."""
        self.page.evaluate(
            """([name, detail]) => {
                const { api } = window.comfyAPI.api;
                (window.dispatchAny ?? api.dispatchCustomEvent).call(api, name, detail);
            }""",
            [f"tensor_parallel.{event}", detail],
        )

    def show_groups(self, *groups: Mapping[str, Any]) -> None:
        """Have the page show these groups, and no others until it is loaded again."""
        self.leave_out("tensor_parallel.groups")
        self.tell("groups", {"groups": groups})

    def leave_out(self, kind: str) -> None:
        """Have the page miss the server's events whose names begin so, until it is loaded again."""
        self.page.evaluate(LEAVE_OUT, kind)

    def set_palette(self, name: str) -> None:
        """Choose ComfyUI's colours; they are there when this returns."""
        self.page.evaluate(
            "(id) => app.extensionManager.setting.set('Comfy.ColorPalette', id)", name
        )
        self.page.wait_for_timeout(500)

    def press_run(self) -> None:
        """Press the page's Run. In some frontends the arrow beside it is called Run, too."""
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def choices(self, node_type: str, name: str) -> Locator:
        """What a list of the first node of a type offers, opened by a click; visible on screen."""
        if self.html:
            row = self.node(node_type).locator(".lg-node-widget").filter(has_text=name)
            row.get_by_role("combobox").click()
            options = self.page.get_by_role("option")
            options.first.wait_for()
            return options
        entries = self.page.locator(".litecontextmenu .litemenu-entry")
        for _ in range(5):  # a busy machine may not have laid the node out yet
            x, y = self.page.evaluate(
                """([type, name]) => {
                    const node = app.graph.nodes.find((node) => node.type === type);
                    const widget = node.widgets.find((widget) => widget.name === name);
                    const y = widget.last_y ?? widget.y;
                    const place = [node.pos[0] + node.size[0] / 2, node.pos[1] + y + 10];
                    return app.canvasPosToClientPos(place);
                }""",
                [node_type, name],
            )
            self.page.mouse.click(x, y)
            with suppress(PageTimeoutError):
                entries.first.wait_for(timeout=2000)
                break
        return entries

    def fit_view(self) -> None:
        """Show all nodes; returns when the view has come to rest, which a busy machine delays."""
        self.await_drawing()  # which measures the nodes
        self.run_command("Comfy.Canvas.FitView")
        self.page.wait_for_timeout(500)
        self.page.evaluate("window.viewBefore = undefined")
        self.page.wait_for_function(  # looked at where it moves: between two pictures
            """() => {
                const { scale, offset } = app.canvas.ds;
                const [before, now] = [window.viewBefore, [scale, ...offset].join()];
                if (now !== before?.view) window.viewBefore = { view: now, frames: 0 };
                return ++window.viewBefore.frames > 20;
            }""",
        )

    def await_drawing(self) -> None:
        """The page has drawn what there is now."""
        self.page.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def node(self, node_type: str) -> Locator:
        """The first node of a type, where nodes are drawn in HTML."""
        node_id = self.page.evaluate(
            "(type) => String(app.graph.nodes.find((node) => node.type === type).id)", node_type
        )
        return self.page.locator(f"[data-node-id='{node_id}']").first

    def open_tab(self) -> None:
        """Open the pack's sidebar tab, if it is not open; it has the server's answer then."""
        if not self.page.locator(".tp-panel").is_visible():
            with self.page.expect_response(re.compile(r"/tensor_parallel/groups$")):
                self.page.locator("button:has(.pi-microchip)").click()
            self.page.locator(".tp-panel").wait_for()
            self.page.wait_for_timeout(100)

    def add_node(self, name: str) -> None:
        """Look for a node in the search box, and take the first that it finds."""
        found = self._search(name)
        found.filter(has_text=name).first.wait_for()
        asks_for_place = self.page.get_by_test_id("node-preview-card").is_visible()
        self.page.keyboard.press("Enter")
        if asks_for_place:  # newer frontends do: the node follows the mouse
            self.page.wait_for_timeout(500)
            self.page.mouse.click(900, 700)

    def search(self, words: str) -> list[str]:
        """The names of the nodes that the search box finds, in its order."""
        self._search(words)
        found = self.page.locator(".p-autocomplete-option, [data-testid=result-item]")
        found.first.wait_for()
        self.page.wait_for_timeout(500)  # what it finds while words are typed
        names = [text.partition("\n")[0].strip() for text in found.all_inner_texts()]
        self.page.keyboard.press("Escape")
        self._search_box.wait_for(state="hidden")
        return names

    @property
    def _search_box(self) -> Locator:
        return self.page.get_by_placeholder(re.compile("Search|Add a node")).last

    def _search(self, words: str) -> Locator:
        """Open the search box and type; what it finds, node by node."""
        box = self._search_box
        for _ in range(6):  # a page that is busy with a new workflow may miss a double click
            self.page.mouse.dblclick(900, 700)
            with suppress(PageTimeoutError):
                box.wait_for(timeout=10_000)
                break
        box.fill(words)
        return self.page.locator(".p-autocomplete-option, [data-testid=node-preview-card] h3")

    def cut_off(self, part: Locator) -> list[str]:
        """What does not fit into its box, in a part of the page."""
        return list(part.evaluate(CUT_OFF))

    def deprecated(self) -> list[str]:
        """What the page has warned of as deprecated that the pack does."""
        return list(self.page.evaluate("window.deprecated"))

    def toasts(self, severity: str | None = None) -> str:
        """The text of the messages that are shown, in frontend 1.32 and in newer ones."""
        kinds = "" if severity is None else f"-{severity}"
        newer = "" if severity is None else f"[data-toast-kind={severity}]"
        shown = self.page.locator(f".p-toast-message{kinds}, [data-testid=toast]{newer}")
        return " ".join(shown.all_inner_texts())


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path(), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def comfy_page(browser: Browser, server: ComfyServer, *, html: bool = False) -> Iterator[ComfyPage]:
    """A tab of the browser on ComfyUI's page."""
    with browser.new_page(viewport=SIZE) as tab:
        page = ComfyPage(tab, server)
        page.html = html
        page.open()
        yield page
