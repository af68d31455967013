// The sidebar tab: what the groups are and hold, and buttons. Cards stay the same elements while
// they are updated, so that the keyboard's focus stays where it is.
import { app } from "../../scripts/app.js";
import { element } from "./elements.js";
import { changeGroup, refreshGroups, request, showGroups, watchGroups } from "./groups.js";
import { ownPython } from "./own_python.js";
import { swapAll } from "./swap.js";
import { gibibytes, layoutOf, milliseconds, ranksOf, sizeOf, text } from "./texts.js";
import { showError } from "./toast.js";

let close = () => {};

export function openPanel(container) {
  const groups = element("div", { className: "tp-groups" });
  const empty = emptyState();
  const panel = element("section", { className: "tp-panel", tabIndex: -1, ariaLabel: text("title") }, [
    element("h2", { textContent: text("title") }),
    ownPython(),
    groups,
    empty,
    workflow(),
    doctor(),
  ]);
  container.style.height = "100%"; // newer frontends give it none, and the panel would end before the page
  container.replaceChildren(panel);
  const cards = new Map();
  close = watchGroups((found) => {
    const ids = new Set(found.map(({ id }) => id));
    for (const [id, card] of cards) {
      if (ids.has(id) || card.busy()) continue; // a group that restarts is away for a moment
      if (card.element.contains(document.activeElement)) panel.focus();
      card.element.remove();
      cards.delete(id);
    }
    for (const group of found) {
      if (!cards.has(group.id)) {
        cards.set(group.id, groupCard(group.id));
        groups.append(cards.get(group.id).element);
      }
      cards.get(group.id).update(group);
    }
    empty.hidden = cards.size > 0;
  });
  refreshGroups().catch(showError);
}

export function closePanel() {
  close();
}

function groupCard(id) {
  const state = element("span", { className: "tp-state", role: "status" });
  const heading = element("h3");
  const facts = element("p", { className: "tp-facts" });
  const devices = element("ul", { className: "tp-devices" });
  const models = element("ul", { className: "tp-models" });
  const start = startProgress();
  const error = element("p", { className: "tp-error" });
  const logTail = element("pre", { tabIndex: 0 });
  const log = element("details", {}, [element("summary", { textContent: text("log") }), logTail]);
  const buttons = Object.fromEntries(
    ["sleep", "wake", "restart", "release"].map((action) => [action, actionButton(id, action)]),
  );
  const card = element("article", { className: "tp-card" }, [
    element("header", {}, [heading, state]),
    facts,
    start.element,
    devices,
    models,
    error,
    log,
    element("footer", {}, Object.values(buttons)),
  ]);

  function update(group) {
    const onCpu = group.device === "cpu";
    const ready = group.state === "ready" || group.state === "busy";
    const held = ready ? group.models : {};
    const count = ranksOf(group);
    heading.textContent = text(`${group.device}.${count > 1 ? "many" : "one"}`, { count });
    state.textContent = text(`state.${group.state}`);
    state.dataset.state = group.state;
    facts.textContent = [
      onCpu ? "" : group.devices.map((index) => `cuda:${index}`).join(", "),
      count > group.tp_size ? layoutOf(group) : "",
      ready && group.step_ms ? text("perStep", { time: milliseconds(group.step_ms) }) : "",
    ].filter(Boolean).join(" · ");
    start.update(group, count);
    devices.replaceChildren(...(ready ? group.ranks : []).map(deviceRow));
    models.replaceChildren(...Object.entries(held).map(modelRow));
    error.textContent = group.error ?? "";
    logTail.textContent = group.log_tail;
    log.hidden = !group.log_tail;
    // A step of the prompt under way would wake them again.
    const works = group.state === "busy";
    enable(buttons.sleep, !works && Object.values(held).some(({ asleep }) => !asleep));
    buttons.sleep.title = text(works ? "sleep.busy" : "sleep.tooltip");
    enable(buttons.wake, Object.values(held).some(({ asleep }) => asleep));
  }

  const busy = () => Object.values(buttons).some(({ ariaBusy }) => ariaBusy === "true");
  return { element: card, update, busy };
}

/** How many processes have started, and for how long that has been going on. */
function startProgress() {
  const started = bar("progressbar", text("state.starting"));
  const label = element("span");
  const made = element("div", { className: "tp-start", hidden: true }, [started.element, label]);
  let since, ready, count, timer;

  function show() {
    clearTimeout(timer);
    if (made.hidden || !made.isConnected) return;
    const seconds = Math.round((Date.now() - since) / 1000);
    label.textContent = text("startProgress", { ready, count, seconds });
    timer = setTimeout(show, 1000);
  }

  function update(group, numRanks) {
    const before = made.hidden;
    made.hidden = group.state !== "starting";
    [ready, count] = [group.ready_ranks, numRanks];
    started.show(ready ? ready / count : undefined); // nobody knows how far the imports are
    if (before && !made.hidden) {
      since = Date.now() - 1000 * group.starting_s;
      timer = setTimeout(show);
    }
  }

  return { element: made, update };
}

function deviceRow(rank) {
  const { allocated_bytes: used, total_bytes: total } = rank.memory;
  const held = Object.values(rank.models).reduce((sum, model) => sum + model.resident_bytes, 0);
  const onCpu = rank.device === "cpu";
  const name = onCpu ? text("process", { pid: rank.pid }) : rank.device;
  const row = element("li", {}, [
    element("span", { textContent: name }),
    element("span", {
      textContent: onCpu
        ? gibibytes(held)
        : text("ofTotal", { used: gibibytes(used), total: gibibytes(total) }),
    }),
  ]);
  if (!onCpu) {
    const memory = bar("meter", name);
    memory.show(used / total);
    row.append(memory.element);
  }
  return row;
}

/** Drawn by panel.css: of a browser's own bars, newer frontends leave no more than their colours. */
function bar(role, ariaLabel) {
  const part = element("div");
  const made = element("div", { className: "tp-bar", role, ariaLabel, ariaValueMin: "0", ariaValueMax: "100" }, [part]);

  /** `share`: from 0 to 1; undefined where nobody knows. */
  function show(share) {
    const percent = share === undefined ? null : String(Math.round(100 * share));
    made.ariaValueNow = percent;
    part.style.width = percent === null ? "" : `${percent}%`;
  }

  return { element: made, show };
}

function modelRow([name, { bytes, streamed, asleep }]) {
  const facts = [bytes ? sizeOf(bytes) : text("loading")];
  const inHost = Math.max(...(streamed ?? [0]));
  if (inHost) facts.push(text("streamed", { size: gibibytes(inHost) }));
  if (asleep) facts.push(text("asleep"));
  const file = name.replace(/@\w+$/, "");
  return element("li", {}, [
    element("span", { textContent: file, title: file }),
    element("span", { textContent: facts.join(" · ") }),
  ]);
}

function actionButton(id, action) {
  const button = element("button", { textContent: text(action), title: text(`${action}.tooltip`) });
  button.addEventListener("click", async () => {
    // Not `disabled`, which would take the focus away.
    if (button.ariaDisabled === "true" || button.ariaBusy === "true") return;
    button.ariaBusy = "true";
    const answer = await changeGroup(id, action).catch(showError);
    button.ariaBusy = "false";
    if (answer) showGroups(answer);
  });
  return button;
}

function enable(button, possible) {
  button.ariaDisabled = String(!possible);
}

function emptyState() {
  const templates = element("button", { textContent: text("templates") });
  templates.addEventListener("click", () => app.extensionManager.command.execute("Comfy.BrowseTemplates"));
  return element("div", { className: "tp-empty" }, [
    element("p", { textContent: text("empty") }),
    element("p", { textContent: text("empty.what") }),
    templates,
  ]);
}

/** For all of its loaders at once: commands are in no menu, and not every frontend lists them. */
function workflow() {
  const use = element("button", { textContent: text("swap") });
  use.addEventListener("click", () => swapAll());
  const leave = element("button", { textContent: text("swapBack.all") });
  leave.addEventListener("click", () => swapAll(true));
  return element("div", { className: "tp-workflow" }, [
    element("h3", { textContent: text("workflow.title") }),
    element("p", { textContent: text("workflow.what") }),
    use,
    leave,
  ]);
}

function doctor() {
  const findings = element("ul", { className: "tp-findings", role: "status" });
  const button = element("button", { textContent: text("doctor") });
  button.addEventListener("click", async () => {
    if (button.ariaBusy === "true") return;
    button.ariaBusy = "true";
    findings.replaceChildren(element("li", { textContent: text("doctor.running") }));
    try {
      const { checks } = await request("/doctor", "POST");
      findings.replaceChildren(...checks.map(finding));
    } catch (error) {
      findings.replaceChildren();
      showError(error);
    }
    button.ariaBusy = "false";
  });
  return element("div", { className: "tp-doctor" }, [
    element("h3", { textContent: text("doctor.title") }),
    element("p", { textContent: text("doctor.what") }),
    button,
    findings,
  ]);
}

function finding({ name, status, text: what, advice }) {
  const state = element("span", { className: "tp-state", textContent: text(`check.${status}`) });
  state.dataset.state = status;
  return element("li", {}, [
    element("header", {}, [element("strong", { textContent: name }), state]),
    element("p", { textContent: what }),
    ...(advice ? [element("p", { className: "tp-advice", textContent: advice })] : []),
  ]);
}
