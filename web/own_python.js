// Makes a Python for the GPU processes where ComfyUI's lacks vLLM: shown, asked for, watched, cancelled.
import { app } from "../../scripts/app.js";
import { element } from "./elements.js";
import { request } from "./groups.js";
import { gibibytes, text } from "./texts.js";
import { showError } from "./toast.js";

const SETTING = "TensorParallel.Runtime.Python";
const LOOK_MS = 1000;
let offered; // the part of the open tab

/** The part of the tab for it; empty where the GPU processes have what they need. */
export function ownPython() {
  offered = element("div", { className: "tp-python", role: "status" });
  lookAgain();
  return offered;
}

/** Another Python may be set now. What is being made is looked at anyway, and what was made stays said. */
export function lookAgain() {
  if (offered) show(offered).catch(showError);
}

async function show(part) {
  const isMade = () => ["making", "made"].includes(part.dataset.shown);
  if (isMade()) return;
  const found = await request("/python");
  if (!isMade()) await follow(part, found); // nobody has said meanwhile that it is to be made
}

async function follow(part, found) {
  const update = found.state === "making" ? progress(part) : undefined;
  while (found.state === "making") {
    update(found);
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
    if (!part.isConnected) return; // the tab was closed; it goes on
    found = await request("/python");
  }
  if (found.state === "ready" && found.missing) {
    part.dataset.shown = "made";
    part.replaceChildren(heading(), paragraph(text("python.ready", { python: found.python })));
    await app.extensionManager.setting.set(SETTING, found.python);
  } else if (found.missing) {
    offer(part, found);
  } else {
    part.dataset.shown = "nothing";
    part.replaceChildren();
  }
}

function offer(part, found) {
  const size = gibibytes(found.needed_bytes);
  const free = gibibytes(found.free_bytes);
  part.dataset.shown = "offer";
  part.replaceChildren(
    heading(),
    paragraph(text("python.what")),
    paragraph(text("python.size", { size, free, folder: found.folder })),
    element("pre", { textContent: found.commands.join("\n"), tabIndex: 0 }),
    ...(found.refusal ? [paragraph(found.refusal)] : [button(part, "make")]),
    ...(found.error ? [element("pre", { className: "tp-error", textContent: found.error, tabIndex: 0 })] : []),
  );
}

/** Elements that stay while they are updated: a button that is put anew misses clicks and loses the focus. */
function progress(part) {
  const time = paragraph("");
  const line = element("pre");
  part.dataset.shown = "making";
  part.replaceChildren(heading(), time, line, button(part, "cancel"));
  return (found) => {
    const seconds = Math.round(found.seconds);
    time.textContent = text("python.making", {
      minutes: Math.floor(seconds / 60),
      seconds: seconds % 60,
      size: gibibytes(found.written_bytes),
    });
    line.textContent = found.line;
  };
}

function button(part, action) {
  const made = element("button", { textContent: text(`python.${action}`) });
  made.addEventListener("click", async () => {
    if (made.ariaBusy === "true") return;
    made.ariaBusy = "true";
    try {
      const found = await request(`/python/${action}`, "POST");
      // While it is made, the loop of the first click goes on.
      if (action === "make") await follow(part, found);
    } catch (error) {
      showError(error);
    }
    made.ariaBusy = "false";
  });
  return made;
}

const heading = () => element("h3", { textContent: text("python.title") });
const paragraph = (textContent) => element("p", { textContent });
