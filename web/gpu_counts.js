// `gpu_count` offers what works here for the node's model, and its tooltip says why the rest does not.
import { app } from "../../scripts/app.js";
import { request } from "./groups.js";
import { LOADER, SAMPLER, loaderOf, nodesOfType, widgetOf } from "./graph.js";
import { text } from "./texts.js";
import { toast } from "./toast.js";

export const DEFAULT_COUNT = "TensorParallel.Nodes.GpuCount";

const answers = new Map(); // query → promise of the route's answer

/** Follow the model of a node that has just been made. */
export function followModel(node) {
  if (node.comfyClass === LOADER) {
    widgetOf(node, "gpu_count").value = app.extensionManager.setting.get(DEFAULT_COUNT) ?? "auto";
    for (const name of ["model_name", "devices", "where"]) {
      chain(widgetOf(node, name), "callback", () => {
        offerCounts(node);
        nodesOfType(SAMPLER).forEach(offerCounts);
      });
    }
  }
  if (node.comfyClass === SAMPLER) chain(node, "onConnectionsChange", () => later(node));
  if ([LOADER, SAMPLER].includes(node.comfyClass)) later(node);
}

/** Ask again for every node: the files or the settings have changed. */
export function forgetAnswers() {
  answers.clear();
  for (const type of [LOADER, SAMPLER]) nodesOfType(type).forEach(offerCounts);
}

/** Once links and widgets of a loaded or pasted node are set. */
function later(node) {
  setTimeout(() => offerCounts(node));
}

async function offerCounts(node) {
  const widget = widgetOf(node, "gpu_count");
  const loader = loaderOf(node);
  if (!node.graph || !widget) return;
  const inputs = new URLSearchParams();
  for (const name of ["model_name", "devices", "where"]) {
    const value = widgetOf(loader, name)?.value;
    if (value) inputs.set(name, value);
  }
  const query = String(inputs);
  widget.allCounts ??= [...widget.options.values];
  widget.countsQuery = query;
  let answer;
  try {
    answer = await countsFor(query);
    if (widget.countsQuery !== query) return; // a later question was answered sooner
  } catch (error) {
    answers.delete(query);
    if (widget.countsQuery !== query) return;
    offer(widget, widget.allCounts);
    widget.tooltip = error.message;
    return;
  }
  const { refused } = answer;
  offer(widget, widget.allCounts.filter((count) => !(count in refused)));
  widget.tooltip = tooltip(answer);
  if (!(widget.value in refused)) return;
  const before = widget.value;
  widget.value = nearest(widget.options.values, before);
  toast("warn", text("countChanged", { node: node.title, before, after: widget.value }), refused[before]);
  app.canvas.setDirty(true, true);
}

function offer(widget, values) {
  widget.options = { ...widget.options, values }; // a new object: HTML nodes do not look into it
}

function countsFor(query) {
  if (!answers.has(query)) answers.set(query, request(`/gpu_counts?${query}`));
  return answers.get(query);
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

function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    after();
    return result;
  };
}
