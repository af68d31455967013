// What a node says below its inputs: which counts work, why others do not, and what its last run
// warned of or failed with. Its height never changes, so nothing grows over the nodes below.
import { api } from "../../scripts/api.js";
import { findPlace, loaderOf } from "./graph.js";
import { isOfShown } from "./prompts.js";
import { text } from "./texts.js";

const HEIGHT = 68; // three lines and litegraph's margins; more lines scroll
const notes = new WeakMap(); // node → { element, reasons, warning, error }
const withError = new Set(); // notes

export function addNote(node) {
  const element = Object.assign(document.createElement("div"), { className: "tp-note", tabIndex: 0 });
  const widget = node.addDOMWidget("tp_note", "tp_note", element, {
    serialize: false, // no input of the prompt
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false; // nor a value of the workflow
  notes.set(node, { element, reasons: [], warning: "", error: "" });
}

/** Say which of the counts work, and why others do not. `answer` is the route's. */
export function showReasons(node, { num_gpus, why = [], error }, offered) {
  const note = notes.get(node);
  if (!note) return;
  const numbers = offered.map(Number).filter(Number.isInteger);
  const reasons = why.map(({ counts, reason }) => (numbers.length ? `${ranges(counts)}: ${reason}` : reason));
  if (error) reasons.unshift(error);
  else if (numbers.length) reasons.unshift(text("countsWork", { counts: ranges(numbers) }));
  if (num_gpus === 0) reasons.push(text("noGpu"));
  // What the last run failed with was another choice's, or is said of this one anyway.
  if (String(reasons) !== String(note.reasons)) note.error = "";
  note.reasons = reasons;
  show(note);
}

/** Show what runs warn of, as nodes/notices.py sends it, and fail with; an empty text takes it back. */
export function showWarnings() {
  api.addEventListener("tensor_parallel.warning", ({ detail: { node: id, prompt, text: warning } }) => {
    const note = notes.get(findPlace(id)?.node);
    if (!note || !isOfShown(prompt)) return;
    note.warning = warning;
    show(note);
  });
  // Newer frontends say of an error no more than that there is one, until a person asks them to.
  api.addEventListener("execution_error", ({ detail: { node_id: id, exception_type: type, ...more } }) => {
    const place = findPlace(id);
    const note = place && (notes.get(place.node) ?? notes.get(loaderOf(place)?.node));
    if (!note || !type.startsWith("tp_runtime.") || !isOfShown(more.prompt_id)) return;
    note.error = more.exception_message.trim();
    withError.add(note);
    show(note);
  });
  api.addEventListener("execution_start", () => {
    for (const note of withError) {
      note.error = "";
      show(note);
    }
    withError.clear();
  });
}

function show({ element, reasons, warning, error }) {
  const found = [error && !reasons.includes(error) && `✖ ${error}`, warning && `⚠ ${warning}`].filter(Boolean);
  const lines = [...found, ...reasons];
  element.replaceChildren(
    ...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })),
  );
  element.classList.toggle("tp-warning", found.length > 0);
  element.title = lines.join("\n");
}

/** "1–3, 5". */
function ranges(numbers) {
  const found = [];
  for (const number of numbers) {
    if (found.at(-1)?.[1] === number - 1) found.at(-1)[1] = number;
    else found.push([number, number]);
  }
  return found.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ");
}
