"""A person at ComfyUI's page: makes a picture on several ranks, looks at them, ends them."""

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from playwright.sync_api import Route, expect

from support.comfy_page import GROUPS, PICTURES, ComfyPage
from support.tiny_vae import VAE_NAME
from support.workflows import Prompt, Sampling, text_to_latent, tp_loader, with_picture

pytestmark = [pytest.mark.web, pytest.mark.rotates(5)]
every_page = pytest.mark.every_page

MODEL = "tiny_z_image.safetensors"
START_MS = 240_000  # of a group, on a machine that is busy


def picture_prompt(gpu_count: int | str = 2, steps: int = 4, layout: str = "tp") -> Prompt:
    sampling = Sampling(seed=time.monotonic_ns() % 2**32, steps=steps, width=256, height=256)
    prompt = text_to_latent(tp_loader(MODEL, gpu_count), "TPSampler", sampling)
    del prompt["save"]
    prompt["model"]["inputs"]["layout"] = layout
    return with_picture(prompt, VAE_NAME)


def wait_for_picture(web: ComfyPage) -> None:
    web.page.wait_for_function(
        "app.graph.nodes.some((node) => node.comfyClass === 'SaveImage' && node.imgs?.length)",
        timeout=START_MS,
    )


def run(web: ComfyPage, prompt: Prompt) -> None:
    """Open a prompt, press Run and wait for its picture."""
    web.load_prompt(prompt)
    web.press_run()
    wait_for_picture(web)


BADGES = """(type) => app.graph.nodes.filter((node) => node.comfyClass === type).flatMap((node) =>
    node.badges.map((badge) => (typeof badge === 'function' ? badge() : badge).text))"""


def badges(web: ComfyPage, node_type: str) -> list[str]:
    return list(web.page.evaluate(BADGES, node_type))


@every_page
def test_a_picture_from_the_search_box_to_the_end(web: ComfyPage) -> None:
    prompt = picture_prompt()
    sampler = prompt.pop("sampler")["inputs"]
    del prompt["decoded"]["inputs"]["samples"]
    web.load_prompt(prompt)
    page = web.page

    web.add_node("TP Sampler")
    page.wait_for_function("app.graph.nodes.some((node) => node.comfyClass === 'TPSampler')")
    page.keyboard.press("Escape")
    links = [
        (value[0], value[1], name) for name, value in sampler.items() if isinstance(value, list)
    ]
    values = {name: value for name, value in sampler.items() if not isinstance(value, list)}
    page.evaluate(
        """([links, values]) => {
            const sampler = app.graph.nodes.find((node) => node.comfyClass === 'TPSampler');
            const byId = (id) => app.graph.nodes.find((node) => node.id === id);
            for (const [source, slot, name] of links) byId(source).connect(slot, sampler, name);
            for (const [name, value] of Object.entries(values))
                sampler.widgets.find((widget) => widget.name === name).value = value;
            sampler.connect(0, byId('decoded'), 'samples');
            sampler.widgets.find(({name}) => name === 'control_after_generate').value = 'fixed';
            app.canvas.deselectAll();  // or the view is fitted to the sampler alone
        }""",
        [links, values],
    )
    web.fit_view()

    web.choices("TPSampler", "gpu_count").get_by_text("2", exact=True).click()
    assert web.widget("TPSampler", "gpu_count") == "2"

    page.evaluate(
        """async () => {
            const { api } = await import('/scripts/api.js');
            window.seen = { progress: 0, b_preview: 0 };
            for (const kind of Object.keys(window.seen))
                api.addEventListener(kind, () => { window.seen[kind] += 1; });
        }"""
    )
    web.press_run()
    wait_for_picture(web)
    seen = page.evaluate("window.seen")
    assert seen["progress"] >= 4
    assert seen["b_preview"] >= 1
    for node_type in ("TPSampler", "TPLoadDiffusionModel"):
        page.wait_for_function(  # it comes with the last event about the group
            f"(type) => ({BADGES})(type).some((text) => text.endsWith(' ms/step'))", arg=node_type
        )
        (badge,) = [text for text in badges(web, node_type) if "×" in text]
        assert badge.startswith("2× · ")
        assert badge.endswith(" ms/step")


@pytest.mark.html_page
def test_nodes_drawn_in_html(web: ComfyPage) -> None:
    web.load_prompt(picture_prompt(layout="tp"))
    web.fit_view()
    loader, sampler = (web.node(kind) for kind in ("TPLoadDiffusionModel", "TPSampler"))
    web.page.wait_for_function(
        "app.graph.nodes.find((node) => node.comfyClass === 'TPLoadDiffusionModel')"
        ".widgets.find((widget) => widget.name === 'gpu_count').tooltip?.includes('7: ')"
    )
    for drawn in (loader, sampler):
        drawn.locator(".tp-note").get_by_text("7: Z-Image would need too much padding.").wait_for()
    offered = web.choices("TPLoadDiffusionModel", "gpu_count").all_inner_texts()
    assert "6" in offered
    assert "7" not in offered
    web.page.keyboard.press("Escape")
    web.press_run()
    for node in (loader, sampler):
        badge = node.get_by_text("ms/step")
        badge.wait_for(timeout=START_MS)
        assert badge.inner_text().startswith("2× · ")
    # Nodes that take the place of these have not run here.
    web.run_command("TensorParallel.UseStockInWorkflow")
    web.node("KSampler").wait_for()
    web.page.get_by_text("ms/step").first.wait_for(state="hidden")
    web.run_command("TensorParallel.UseInWorkflow")
    web.node("TPLoadDiffusionModel").wait_for()
    web.press_run()
    for kind in ("TPLoadDiffusionModel", "KSampler"):
        web.node(kind).get_by_text("ms/step").wait_for(timeout=START_MS)


@every_page
@pytest.mark.usefixtures("alone")  # or the loader, which warns, is not run: its result is known
def test_what_a_run_warns_of_is_on_the_node_and_nothing_grows(web: ComfyPage) -> None:
    web.load_prompt(picture_prompt(gpu_count=3, steps=1))
    web.leave_out("b_preview")  # the sampler would grow by one
    sizes = "app.graph.nodes.map(({ size }) => [...size])"
    before = web.page.evaluate(sizes)
    web.press_run()
    warning = web.page.locator(".tp-note.tp-warning").first
    warning.get_by_text("No CUDA GPU is visible: the model runs on 3 CPU processes").wait_for(
        timeout=START_MS
    )
    wait_for_picture(web)
    after = web.page.evaluate(sizes)
    picture = web.page.evaluate(
        "app.graph.nodes.findIndex(({ comfyClass }) => comfyClass === 'SaveImage')"
    )
    del before[picture], after[picture]  # it shows the picture
    assert after == before
    web.open()


@every_page
def test_what_is_said_of_one_workflow_is_not_on_the_nodes_of_another(web: ComfyPage) -> None:
    """Their nodes may have the same ids, as those of templates do."""
    page, said = web.page, "What the first one warns of."
    of_note = page.locator(".tp-note").filter(has_text=said)
    web.load_prompt(picture_prompt(steps=1))
    workflow = page.evaluate("app.graph.serialize()")
    # It is not run, or what it says itself would come between.
    taken = {"prompt_id": "taken", "number": 1, "node_errors": {}}
    page.route("**/prompt", lambda route: route.fulfill(json=taken))
    page.evaluate("async () => comfyAPI.api.api.queuePrompt(0, await app.graphToPrompt())")
    page.unroute("**/prompt")
    loader = "app.graph.nodes.find(({ comfyClass }) => comfyClass === 'TPLoadDiffusionModel').id"
    warning = {"node": str(page.evaluate(loader)), "text": said}
    web.tell("warning", warning | {"prompt": "taken"})
    of_note.wait_for(state="attached")
    page.evaluate("(workflow) => app.loadGraphData(workflow, true, true, 'another')", workflow)
    page.wait_for_function("app.extensionManager.workflow.activeWorkflow.path.includes('another')")
    of_note.wait_for(state="detached")
    web.tell("warning", warning | {"prompt": "taken"})
    page.wait_for_timeout(100)
    assert of_note.count() == 0
    web.tell("warning", warning | {"prompt": "of whoever it is"})
    of_note.wait_for(state="attached")
    web.open()


@every_page
@pytest.mark.usefixtures("alone")
def test_the_tab_and_its_buttons(web: ComfyPage) -> None:
    web.open_tab()
    run(web, picture_prompt())
    card = web.page.locator(".tp-card")
    card.get_by_text("ready").wait_for()
    expect(card).to_contain_text("ms/step")  # it comes with the last event about the group
    assert "2 CPU processes" in card.inner_text()
    assert MODEL in card.inner_text()
    web.page.screenshot(path=PICTURES / "the_tab.png")

    card.get_by_role("button", name="Sleep").click()
    card.get_by_text("asleep").wait_for()
    card.get_by_role("button", name="Wake").click()
    card.get_by_text("asleep").wait_for(state="detached")

    ranks = {process.pid for process in web.server.ranks()}
    card.get_by_role("button", name="Restart").focus()
    web.page.keyboard.press("Enter")
    web.page.wait_for_function(
        "!document.querySelector('.tp-card').innerText.includes('tiny_z_image')",
        timeout=START_MS,
    )
    card.get_by_text("ready").wait_for(timeout=START_MS)
    assert ranks.isdisjoint(process.pid for process in web.server.ranks())
    focus = web.page.evaluate("document.activeElement.textContent")
    assert focus == "Restart"

    web.page.keyboard.press("Tab")
    web.page.keyboard.press("Enter")  # Release
    web.page.get_by_text("No GPU process runs.").wait_for()
    assert not web.server.ranks()
    assert web.page.evaluate("document.activeElement.className") == "tp-panel"


@pytest.mark.usefixtures("alone")
def test_a_dead_group_says_why(web: ComfyPage) -> None:
    web.open_tab()
    run(web, picture_prompt())
    rank = web.server.ranks()[0]
    psutil.Process(rank.pid).kill()
    card = web.page.locator(".tp-card")
    card.locator(".tp-state[data-state=failed]").wait_for()
    assert "was killed by signal 9" in card.inner_text()
    assert "Log: " in card.inner_text()
    assert card.locator(".tp-devices li").count() == 0  # its processes hold nothing any more
    card.get_by_text("End of the log").click()
    assert card.locator("pre").inner_text()
    card.get_by_role("button", name="Release").click()
    web.page.get_by_text("No GPU process runs.").wait_for()


@pytest.mark.usefixtures("alone")
def test_the_card_of_a_dead_group_goes_when_its_model_runs_elsewhere(web: ComfyPage) -> None:
    web.open_tab()
    run(web, picture_prompt())
    psutil.Process(web.server.ranks()[0].pid).kill()
    card = web.page.locator(".tp-card")
    card.locator(".tp-state[data-state=failed]").wait_for()
    web.load_prompt(picture_prompt(gpu_count=1))
    web.press_run()
    web.page.locator(".tp-card", has_text="1 CPU process").wait_for(timeout=START_MS)
    expect(card.locator(".tp-state[data-state=failed]")).to_have_count(0, timeout=START_MS)
    wait_for_picture(web)
    expect(card).to_have_count(1)


def test_the_machine_is_checked(web: ComfyPage) -> None:
    web.open_tab()
    web.page.get_by_role("button", name="Check").click()
    findings = web.page.locator(".tp-findings")
    findings.get_by_text("vllm").wait_for(timeout=START_MS)
    assert "Runtime Python" in findings.inner_text()


# --- workflows of other machines ---------------------------------------------------------------


@every_page
def test_a_count_that_the_model_cannot_have_is_changed(web: ComfyPage) -> None:
    web.load_prompt(picture_prompt(gpu_count=7, layout="tp"))
    web.page.get_by_text("gpu_count 7 → 6").last.wait_for()
    assert web.widget("TPLoadDiffusionModel", "gpu_count") == "6"
    for node_type in ("TPLoadDiffusionModel", "TPSampler"):
        assert "7" not in web.widget(node_type, "gpu_count", "options.values")
    tooltip = web.widget("TPLoadDiffusionModel", "gpu_count", "tooltip")
    assert "7: Z-Image cannot be split over 7 GPUs" in tooltip
    notes = web.page.locator(".tp-note").all_inner_texts()
    assert len(notes) == 2
    for note in notes:
        assert "gpu_count can be 1–6, 8." in note
        assert "7: Z-Image would need too much padding." in note


def test_a_workflow_of_four_gpus_on_a_machine_with_two(web: ComfyPage) -> None:
    def two_gpus(route: Any) -> None:
        reason = "{} GPUs were asked for, but this machine shows 2 (0, 1)."
        refused = {str(count): reason.format(count) for count in range(3, 9)}
        why = [{"counts": [*range(3, 9)], "reason": "This machine shows 2 GPUs (0, 1)."}]
        if "layout=2x2" in route.request.url:
            reason = "layout is '2x2', which takes 4 GPUs, but this machine shows 2 (0, 1)."
            refused = {str(count): reason for count in range(1, 9)}
            why = [{"counts": [*range(1, 9)], "reason": reason}]
        route.fulfill(body=json.dumps({"num_gpus": 2, "refused": refused, "why": why}))

    web.page.route("**/tensor_parallel/gpu_counts**", two_gpus)
    web.open()
    try:
        web.load_prompt(picture_prompt(gpu_count=4, layout="2x2"))
        web.page.get_by_text("layout 2x2 → auto").last.wait_for()
        web.page.get_by_text("gpu_count 4 → 2").last.wait_for()
        offered = web.widget("TPLoadDiffusionModel", "gpu_count", "options.values")
        assert offered == ["auto", "1", "2"]
        inputs = web.prompt()["model"]["inputs"]
        assert (inputs["gpu_count"], inputs["layout"]) == ("2", "auto")
        for note in web.page.locator(".tp-note").all():
            assert list(filter(None, note.locator("p").all_inner_texts())) == [
                "gpu_count can be 1–2.",
                "3–8: This machine shows 2 GPUs (0, 1).",
            ]
        web.page.screenshot(path=PICTURES / "fewer_gpus.png")
    finally:
        web.page.unroute("**/tensor_parallel/gpu_counts**")


@every_page
def test_a_layout_says_once_what_it_takes(web: ComfyPage) -> None:
    web.load_prompt(picture_prompt(gpu_count="auto", layout="2x2"))
    note = web.page.locator(".tp-note").first
    expect(note).to_contain_text("1–3, 5–8: The layout 2x2 takes 4 GPUs.")
    expect(note.locator("p")).to_have_count(3)


@pytest.mark.usefixtures("alone")
def test_a_workflow_of_four_gpus_on_this_machine(web: ComfyPage) -> None:
    """Four CPU processes, where there is no GPU."""
    run(web, picture_prompt(gpu_count=4, steps=2))
    assert web.widget("TPLoadDiffusionModel", "gpu_count") == "4"
    web.open_tab()
    web.page.locator(".tp-card").get_by_text("4 CPU processes").wait_for()
    # It comes with an event about the group.
    web.page.wait_for_function(
        f"() => ({BADGES})('TPSampler').some((text) => text.startsWith('4×'))"
    )
    web.page.screenshot(path=PICTURES / "four_ranks.png")
    web.run_command("TensorParallel.ReleaseAll")
    web.page.get_by_text("No GPU process runs.").wait_for()


@every_page
def test_saved_and_opened_again(web: ComfyPage) -> None:
    web.load_prompt(picture_prompt(gpu_count=3))
    web.page.keyboard.press("Control+s")
    name = f"three-{web.name}"  # pages share a server
    web.page.get_by_role("dialog").get_by_role("textbox").fill(name)
    saved = web.server.base / f"user/default/workflows/{name}.json"
    with web.page.expect_response(lambda answer: saved.name in answer.url):
        web.page.keyboard.press("Enter")
    workflow = json.loads(saved.read_text())
    web.open()
    web.load(workflow)
    web.page.wait_for_timeout(500)
    assert web.widget("TPLoadDiffusionModel", "gpu_count") == "3"
    assert web.toasts() == ""


# --- looks -------------------------------------------------------------------------------------


# The page's own store of palettes, which has no public name.
PALETTES = """() => Object.keys(document.querySelector('#vue-app').__vue_app__.config
    .globalProperties.$pinia._s.get('colorPalette').palettesLookup)"""
# The names of the page's menus; of its own store of them, too.
MENUS = """() => document.querySelector('#vue-app').__vue_app__.config.globalProperties
    .$pinia._s.get('menuItem').menuItems.map(({ label }) => label)"""
# Of every element of the tab with a text of its own: what it says, and its contrast.
CONTRASTS = """() => {
    const luminance = (colour) => {
        const scale = colour.startsWith('color(') ? 1 : 255;
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
            const value = part / scale;
            return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const says = ({ childNodes }) => [...childNodes].some(
        ({ nodeType, textContent }) => nodeType === Node.TEXT_NODE && textContent.trim());
    return [...document.querySelectorAll('.tp-panel *')]
        .filter((one) => says(one) && one.ariaDisabled !== 'true' && one.offsetParent)
        .map((one) => {
            let behind = one;
            while (/, 0\\)|transparent|\\/ 0\\)/.test(getComputedStyle(behind).backgroundColor))
                behind = behind.parentElement;
            const [low, high] = [getComputedStyle(one).color,
                getComputedStyle(behind).backgroundColor].map(luminance).sort((a, b) => a - b);
            return [one.textContent, (high + 0.05) / (low + 0.05)];
        });
}"""


@every_page
def test_readable_in_every_palette(web: ComfyPage) -> None:
    """Every text of the tab, with a group in each state and findings of the check."""
    web.open_tab()
    web.page.get_by_role("button", name="Check").click()
    web.page.locator(".tp-findings strong").first.wait_for(timeout=START_MS)
    web.show_groups(*GROUPS)
    palettes = web.page.evaluate(PALETTES)
    assert {"dark", "light", "solarized", "arc", "nord", "github"} <= set(palettes)
    for palette in palettes:
        web.set_palette(palette)
        contrasts = dict(web.page.evaluate(CONTRASTS))
        assert {"starting", "ready", "working", "failed", "Rank 1 was killed by signal 9."} <= set(
            contrasts
        )
        low = {text: ratio for text, ratio in contrasts.items() if ratio < 4.5}  # WCAG 2.1, AA
        assert not low, palette
        if palette in ("dark", "light"):
            web.page.screenshot(path=PICTURES / f"tab_{palette}.png")
    web.server.post("/settings", {"Comfy.ColorPalette": "dark"})


@every_page
def test_its_commands_are_in_no_menu_of_their_own(web: ComfyPage) -> None:
    """ComfyUI would call it "Extensions", as another of its menus."""
    menus = web.page.evaluate(MENUS)
    assert "Edit" in menus
    assert "Extensions" not in menus


@every_page
def test_buttons_stand_in_whole_rows(web: ComfyPage) -> None:
    web.open_tab()
    web.show_groups(*GROUPS)
    for width in (220, 260, 320, 420, 600):
        rows = web.page.evaluate(
            """(width) => {
                document.querySelector('.tp-panel').style.width = `${width}px`;
                const tops = [...document.querySelector('.tp-card footer').children]
                    .map((button) => button.getBoundingClientRect().top);
                return [...new Set(tops)].map((top) => tops.filter((one) => one === top).length);
            }""",
            width,
        )
        assert rows in ([4], [2, 2]), width


@every_page
def test_a_start_shows_how_far_it_is(web: ComfyPage) -> None:
    web.open_tab()
    web.show_groups(*GROUPS)
    card = web.page.locator(".tp-card", has_text=re.compile(r"1 of 2 processes started, [7-9]\d s"))
    card.locator("[role=progressbar][aria-valuenow='50']").wait_for()


@pytest.mark.usefixtures("alone")
def test_in_chinese(web: ComfyPage) -> None:
    web.open({"Comfy.Locale": "zh"})
    try:
        web.open_tab()
        web.page.get_by_text("没有正在运行的 GPU 进程。").wait_for()
        # Frontend 1.32 loads its own Chinese texts over those of packs, so the nodes stay English.
        assert web.server.get("/i18n")["zh"]["nodeDefs"]["TPSampler"]["display_name"] == "TP 采样器"
    finally:
        web.server.post("/settings", {"Comfy.Locale": "en", "Comfy.ColorPalette": "dark"})


def hold_first(web: ComfyPage, question: str) -> Callable[[Any], None]:
    """Keep the next such request of the page waiting; what is returned answers it."""
    held: list[Route] = []
    web.page.route(question, lambda route: held.append(route), times=1)

    def answer(document: Any) -> None:
        (request,) = held
        with web.page.expect_response(question):
            request.fulfill(json=document)
        web.page.wait_for_timeout(100)  # the page has it

    return answer


DEVICES = "TensorParallel.Runtime.Devices"
# Of the first loader's count; it has none before the counts are known.
TOOLTIP = (
    "(app.graph.nodes.find(({ comfyClass }) => comfyClass === 'TPLoadDiffusionModel')"
    ".widgets.find(({ name }) => name === 'gpu_count').tooltip ?? '')"
)


@pytest.fixture
def set_devices(web: ComfyPage) -> Iterator[Callable[[str], None]]:
    """Set the GPUs to use, as the settings dialog does."""

    def set_to(devices: str) -> None:
        web.page.evaluate(f"app.extensionManager.setting.set('{DEVICES}', '{devices}')")

    yield set_to
    web.server.post("/settings", {DEVICES: ""})


def test_the_devices_of_the_settings_are_heeded_at_once(
    web: ComfyPage, set_devices: Callable[[str], None]
) -> None:
    """What the counts are asked for after a change is what was changed to, not what was before."""
    web.load_prompt({"model": tp_loader(MODEL)})
    for devices in ("7", "5"):
        set_devices(devices)
        web.page.wait_for_function(f"{TOOLTIP}.includes(\"is '{devices}'\")")
    set_devices("")
    web.page.wait_for_function(f'!{TOOLTIP}.includes("is \'")')


def test_an_answer_of_before_a_change_comes_late(
    web: ComfyPage, set_devices: Callable[[str], None]
) -> None:
    """It is not shown: the same question was asked again since."""
    questions = "**/tensor_parallel/gpu_counts**"
    answer = hold_first(web, questions)
    with web.page.expect_request(questions):
        web.load_prompt({"model": tp_loader(MODEL)})
    set_devices("7")
    web.page.wait_for_function(f"{TOOLTIP}.includes(\"is '7'\")")
    answer({"num_gpus": 2, "refused": {}, "why": []})
    assert "is '7'" in web.page.evaluate(TOOLTIP)


def test_another_server_is_asked_which_counts_it_has(web: ComfyPage) -> None:
    web.load_prompt({"model": tp_loader(MODEL)})
    with (
        web.page.expect_request("**/tensor_parallel/gpu_counts*"),
        web.page.expect_request("**/tensor_parallel/groups"),
    ):
        web.page.evaluate("window.comfyAPI.api.api.dispatchCustomEvent('reconnected')")


def test_an_event_is_newer_than_an_answer_that_was_under_way(web: ComfyPage) -> None:
    """The server asks the ranks of one group after the other for it."""
    web.open_tab()
    question = "**/tensor_parallel/groups"
    answer = hold_first(web, question)
    with web.page.expect_request(question):
        web.page.evaluate("window.comfyAPI.api.api.dispatchCustomEvent('reconnected')")
    web.show_groups(GROUPS[1])
    card = web.page.locator(".tp-card")
    card.wait_for()
    answer({"groups": []})
    assert card.count() == 1


@every_page
def test_the_nodes_of_another_workflow_have_no_badge(web: ComfyPage) -> None:
    """Whose ids are the same."""
    web.load_prompt(picture_prompt())
    workflow = web.page.evaluate("app.graph.serialize()")
    sampler = web.page.evaluate(
        "String(app.graph.nodes.find(({ comfyClass }) => comfyClass === 'TPSampler').id)"
    )
    (model,) = GROUPS[1]["models"]
    web.show_groups(GROUPS[1])
    web.tell("node", {"node": sampler, "group": GROUPS[1]["id"], "model": model})
    assert any("ms/step" in text for text in badges(web, "TPSampler"))
    web.page.evaluate("(workflow) => app.loadGraphData(workflow, true, true, 'another')", workflow)
    web.page.wait_for_function(
        "app.extensionManager.workflow.activeWorkflow.path.includes('another')"
    )
    web.show_groups(GROUPS[1])  # what is gone is looked for when something changes
    assert not any("ms/step" in text for text in badges(web, "TPSampler"))


def test_a_new_loader_has_the_count_of_the_settings(web: ComfyPage) -> None:
    web.open({"TensorParallel.Nodes.GpuCount": "2"})
    try:
        web.page.evaluate("() => { app.graph.add(LiteGraph.createNode('TPLoadDiffusionModel')); }")
        assert web.widget("TPLoadDiffusionModel", "gpu_count") == "2"
    finally:
        web.server.post("/settings", {"TensorParallel.Nodes.GpuCount": "auto"})
