// `gpu_count` offers what works here for the node's model, and the node says why the rest does not.
import { app } from "../../scripts/app.js";
import { request } from "./groups.js";
import { LOADERS, SAMPLER, decidingWidget, loaderOf, nodesOfType, placeOf, widgetOf } from "./graph.js";
import { addNote, showReasons } from "./note.js";
import { text } from "./texts.js";
import { toast } from "./toast.js";

export const DEFAULT_COUNT = "TensorParallel.Nodes.GpuCount";

const DECIDE = ["unet_name", "ckpt_name", "devices", "where"]; // the loader's inputs that counts depend on
const answers = new Map(); // query → promise of the route's answer
const questions = new WeakMap(); // node → the query that it asked last
const followed = new WeakSet(); // widgets whose changes are heard of

/** Follow the model of a node that has just been made. */
export function followModel(node) {
  if (LOADERS.includes(node.comfyClass)) {
    widgetOf(node, "gpu_count").value = app.extensionManager.setting.get(DEFAULT_COUNT) ?? "auto";
  }
  const counted = [...LOADERS, SAMPLER].includes(node.comfyClass);
  if (counted) addNote(node);
  // The way of a model may lead through any subgraph.
  if (counted || node.subgraph) {
    chain(node, "onConnectionsChange", later);
    later();
  }
}

/** Ask again for every node: the files or the settings have changed. */
export function forgetAnswers() {
  answers.clear();
  offerEverywhere();
}

const offerEverywhere = () => nodesOfType(...LOADERS, SAMPLER).forEach(offerCounts);

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

async function offerCounts(node) {
  const place = node.graph && placeOf(node);
  const own = widgetOf(node, "gpu_count");
  if (!place || !own) return;
  const shown = decidingWidget(place, "gpu_count");
  const loader = loaderOf(place);
  const inputs = new URLSearchParams();
  for (const name of loader ? DECIDE : []) {
    const widget = decidingWidget(loader, name);
    if (widget) follow(widget);
    if (widget?.value) inputs.set(name, widget.value);
  }
  const query = String(inputs);
  own.allCounts ??= [...own.options.values];
  questions.set(node, query);
  let answer;
  try {
    answer = await countsFor(query);
  } catch (error) {
    answers.delete(query);
    answer = { refused: {}, error: error.message };
  }
  if (questions.get(node) !== query || !node.graph) return; // a later question was answered sooner
  const { refused } = answer;
  const values = own.allCounts.filter((count) => !(count in refused));
  for (const widget of new Set([own, shown])) offer(widget, values, answer);
  showReasons(node, answer, values);
  if (!(shown.value in refused)) return;
  const before = shown.value;
  shown.value = nearest(values, before);
  toast("warn", text("countChanged", { node: node.title, before, after: shown.value }), refused[before]);
  app.canvas.setDirty(true, true);
}

function offer(widget, values, answer) {
  const disabled = Boolean(answer.error); // the file cannot run on any number
  // A new object: HTML nodes do not look into it. Nodes on the canvas have their own property.
  widget.options = { ...widget.options, values, disabled };
  widget.disabled = disabled;
  widget.tooltip = answer.error ?? tooltip(answer);
}

function countsFor(query) {
  if (!answers.has(query)) answers.set(query, request(`/gpu_counts?${query}`, "POST"));
  return answers.get(query);
}

/** Why a file that a loader's input names cannot run; undefined: it can, or it is not here. */
export async function whyNot(input, file) {
  const query = String(new URLSearchParams({ [input]: file }));
  try {
    await countsFor(query);
  } catch (error) {
    answers.delete(query);
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
