// `2× · 5.7 GiB each · 55 ms/step` on the nodes that run on a group.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { watchGroups } from "./groups.js";
import { findNode, loaderOf } from "./graph.js";
import { gibibytes, layoutOf, milliseconds, text } from "./texts.js";

// Node → what it runs on: { group, model, badge }, the first two being ids.
const marks = new Map();
let groups = [];

export function showBadges() {
  watchGroups((found) => {
    groups = found;
    for (const [node, mark] of marks) draw(node, mark);
  });
  api.addEventListener("tensor_parallel.node", ({ detail: { node: id, group, model } }) => {
    const sampler = findNode(id);
    for (const node of new Set([sampler, loaderOf(sampler)])) {
      if (!node) continue;
      const mark = { ...marks.get(node), group, model };
      marks.set(node, mark);
      draw(node, mark);
    }
  });
}

function draw(node, mark) {
  if (!node.graph) {
    marks.delete(node);
    return;
  }
  // A new object in the same place: frontends that draw nodes in HTML look for that.
  const badge = new globalThis.LGraphBadge({ text: label(mark) });
  const place = node.badges.indexOf(mark.badge);
  node.badges.splice(place < 0 ? node.badges.length : place, 1, badge);
  mark.badge = badge;
  app.canvas.setDirty(true, true);
}

function label({ group: id, model: name }) {
  const group = groups.find((candidate) => candidate.id === id);
  const model = group?.models[name];
  if (!model || group.state === "failed") return "";
  const parts = [group.batch_groups > 1 ? layoutOf(group) : `${group.tp_size}×`];
  if (model.bytes) parts.push(text("each", { size: gibibytes(Math.max(...model.bytes)) }));
  if (model.asleep) parts.push(text("asleep"));
  else if (group.step_ms) parts.push(text("perStep", { time: milliseconds(group.step_ms) }));
  return parts.join(" · ");
}
