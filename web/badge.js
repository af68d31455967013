// `2× · 5.7 GiB each · 55 ms/step` on the nodes that run on a group, and the subgraph nodes they are in.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { watchGroups } from "./groups.js";
import { findPlace, isThere, loaderOf } from "./graph.js";
import { isOfShown } from "./prompts.js";
import { layoutOf, milliseconds, ranksOf, sizeOf, text } from "./texts.js";

// Node → where it is, and what it runs on: { key, group, model }, all of them ids.
const marks = new Map();
const withBadge = new WeakSet();
let groups = [];
let texts; // key of a place → what the badge there says, in an object that HTML nodes watch

const keyOf = (node) => `${node.graph.id} ${node.id}`;

/** `tab` is the pack's own sidebar tab, which the page watches; nothing else here is watched. */
export function showBadges(tab) {
  tab.badgeTexts = new Map();
  texts = tab.badgeTexts;
  watchGroups((found) => {
    groups = found;
    refreshBadges();
  });
  api.addEventListener("tensor_parallel.node", ({ detail: { node: id, prompt, group, model } }) => {
    if (!isOfShown(prompt)) return;
    const sampler = findPlace(id);
    const places = [sampler, loaderOf(sampler)].filter(Boolean);
    for (const node of new Set(places.flatMap((place) => [place.node, ...place.hosts]))) {
      addBadge(node);
      const mark = { key: keyOf(node), group, model };
      marks.set(node, mark);
      show(node, mark);
    }
  });
}

/** Show what is known; nodes that are no longer there have none. */
export function refreshBadges() {
  for (const [node, mark] of marks) show(node, mark);
}

/** Give a new node its badge, empty as yet: an HTML node asks once which badges it has. */
export function prepareBadge(node) {
  const slots = [...(node.inputs ?? []), ...(node.outputs ?? [])];
  if (node.subgraph || slots.some(({ type }) => type === "MODEL" || type === "GUIDER")) addBadge(node);
}

function addBadge(node) {
  if (withBadge.has(node)) return;
  withBadge.add(node);
  let key; // kept: an HTML node asks the one whose place its node has taken (frontend 1.58)
  node.badges.push(() => {
    if (node.graph) key = keyOf(node);
    const { BADGE_FG_COLOR: fgColor, BADGE_BG_COLOR: bgColor } = globalThis.LiteGraph; // the palette's
    return new globalThis.LGraphBadge({ text: texts?.get(key) ?? "", fgColor, bgColor });
  });
}

function show(node, mark) {
  if (!isThere(node)) {
    marks.delete(node);
    texts.delete(mark.key);
    return;
  }
  texts.set(mark.key, label(mark));
  app.canvas.setDirty(true, true);
}

function label({ group: id, model: name }) {
  const group = groups.find((candidate) => candidate.id === id);
  const model = group?.models[name];
  if (!model || group.state === "failed") return "";
  const parts = [ranksOf(group) > group.tp_size ? layoutOf(group) : `${group.tp_size}×`];
  // HTML nodes, which have a badge inside, are too narrow for all of it.
  const isNarrow = globalThis.LiteGraph.vueNodesMode;
  if (model.bytes && !isNarrow) parts.push(sizeOf(model.bytes));
  if (model.asleep) parts.push(text("asleep"));
  else if (group.step_ms) parts.push(text("perStep", { time: milliseconds(group.step_ms) }));
  return parts.join(" · ");
}
