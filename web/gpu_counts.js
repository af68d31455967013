// `gpu_count` offers what works here for the node's model, and the node says why the rest does not.
import { app } from "../../scripts/app.js";
import { request } from "./groups.js";
import { LOADERS, SAMPLER, decidingWidget, isThere, isValue, loaderOf, placesOf, widgetOf } from "./graph.js";
import { addNote, showReasons } from "./note.js";
import { text } from "./texts.js";
import { toast } from "./toast.js";

export const DEFAULT_COUNT = "TensorParallel.Nodes.GpuCount";

const DECIDE = ["unet_name", "ckpt_name", "devices", "where", "layout"]; // the loader's inputs that counts depend on
const answers = new Map(); // query → promise of the route's answer
const questions = new WeakMap(); // node → { the place's hosts: what was asked last }
const followed = new WeakSet(); // widgets whose changes are heard of

/** Follow the model of a node that has just been made. */
export function followModel(node) {
  if (LOADERS.includes(node.comfyClass)) {
    widgetOf(node, "gpu_count").value = app.extensionManager.setting.get(DEFAULT_COUNT) ?? "auto";
  }
  if (isCounted(node)) addNote(node);
  // The way of a model may lead through any subgraph, and a loader's value come from another node.
  if (isCounted(node) || node.subgraph || isValue(node)) {
    chain(node, "onConnectionsChange", later);
    if (node.subgraph) chain(node, "onWidgetChanged", later); // its widgets come and go
    later();
  }
}

/** Ask again for every node: the files or the settings have changed. */
export function forgetAnswers() {
  answers.clear();
  offerEverywhere();
}

const isCounted = ({ comfyClass }) => [...LOADERS, SAMPLER].includes(comfyClass);

function offerEverywhere() {
  const seen = new Set();
  for (const place of placesOf(isCounted)) {
    offerCounts(place, !seen.has(place.node));
    seen.add(place.node);
  }
}

let waiting = false;

/** Once links and widgets of loaded, pasted or moved nodes are set. */
function later() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    offerEverywhere();
  });
}

/** The same node has other places where its subgraph is used again; it shows what holds in the first. */
async function offerCounts(place, isFirst) {
  const { node, hosts } = place;
  const own = widgetOf(node, "gpu_count");
  if (!own) return;
  const shown = decidingWidget(place, "gpu_count");
  const loader = loaderOf(place);
  const query = loader ? questionOf(loader) : "";
  own.allCounts ??= [...own.options.values];
  const asked = questions.get(node) ?? {};
  const where = hosts.map(({ id }) => id).join(":");
  questions.set(node, asked);
  const question = (asked[where] = Symbol(query));
  let answer;
  try {
    answer = await countsFor(query);
  } catch (error) {
    answer = { refused: {}, error: error.message };
  }
  // It was asked again since, as settings changed, or is to be, as another layout was put in its place.
  if (asked[where] !== question || !isThere(node) || (loader && questionOf(loader) !== query)) return;
  const { refused } = answer;
  const values = own.allCounts.filter((count) => !(count in refused));
  if (loader && !answer.error && values.every((count) => !Number(count)) && leaveLayout(loader, refused)) return;
  if (isFirst) {
    offer(own, values, answer);
    showReasons(node, answer, values);
  }
  if (!shown) return; // another node decides when it runs
  if (shown !== own) offer(shown, values, answer);
  if (!(shown.value in refused)) return;
  const before = shown.value;
  shown.value = nearest(values, before);
  toast("warn", text("countChanged", { node: node.title, before, after: shown.value }), refused[before]);
  app.canvas.setDirty(true, true);
}

/** Where no count works because of a loader's layout, set that to "auto"; whether it was. */
function leaveLayout(loader, refused) {
  const layout = decidingWidget(loader, "layout");
  if (!layout || !/^\d/.test(layout.value)) return false;
  const before = layout.value;
  layout.value = "auto";
  toast("warn", text("layoutChanged", { node: loader.node.title, before }), Object.values(refused)[0]);
  app.canvas.setDirty(true, true);
  later();
  return true;
}

/** What to ask the server about a loader; null: nothing, since another node gives one of its inputs. */
function questionOf(loader) {
  const names = DECIDE.filter((name) => widgetOf(loader.node, name));
  const widgets = names.map((name) => decidingWidget(loader, name));
  widgets.filter(Boolean).forEach(follow);
  if (!widgets.every(Boolean)) return null;
  const inputs = widgets.map(({ value }, index) => [names[index], value]);
  return String(new URLSearchParams(inputs.filter(([, value]) => value)));
}

function offer(widget, values, answer) {
  const disabled = Boolean(answer.error); // the file cannot run on any number
  changeOptions(widget, { values, disabled });
  widget.disabled = disabled; // what nodes on the canvas look at
  widget.tooltip = answer.error ?? tooltip(answer);
}

/** Change a widget's options so that HTML nodes see it: they watch another thing in each frontend. */
function changeOptions(widget, changed) {
  if (hasSetter(widget, "options")) {
    widget.options = { ...widget.options, ...changed };
    return;
  }
  // 1.49: what is registered of a widget, that of a node of the same id before it at times; first,
  // since it is watched. A subgraph node's options are nothing else.
  for (const options of [widget._state?.options, widget.options]) Object.assign(options ?? {}, changed);
}

function hasSetter(object, name) {
  const found = object && Object.getOwnPropertyDescriptor(object, name);
  return found ? Boolean(found.set) : Boolean(object) && hasSetter(Object.getPrototypeOf(object), name);
}

function countsFor(query) {
  if (query === null) return { refused: {} };
  if (!answers.has(query)) {
    const answer = request(`/gpu_counts?${query}`, "POST");
    answers.set(query, answer);
    answer.catch(() => answers.get(query) === answer && answers.delete(query)); // it may work next time
  }
  return answers.get(query);
}

/** Why a file that a loader's input names cannot run; undefined: it can, or it is not here. */
export async function whyNot(input, file) {
  const query = String(new URLSearchParams({ [input]: file }));
  try {
    await countsFor(query);
  } catch (error) {
    if (error.status === 400) return error.message;
    if (error.status !== 404) throw error;
  }
  return undefined;
}

/** The largest count on offer that is not above the one asked for. */
function nearest(offered, count) {
  const numbers = offered.map(Number).filter((number) => number <= Number(count));
  return numbers.length ? String(Math.max(...numbers)) : "auto";
}

function tooltip({ num_gpus, refused }) {
  const lines = [text("gpuCount")];
  if (num_gpus === 0) lines.push(text("noGpu"));
  for (const [count, reason] of Object.entries(refused)) lines.push(`${count}: ${reason}`);
  return lines.join("\n");
}

function follow(widget) {
  if (followed.has(widget)) return;
  followed.add(widget);
  chain(widget, "callback", offerEverywhere);
}

function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    after();
    return result;
  };
}
