// "Use several GPUs (TP)": our loader in the place of the stock one, and back, in one action.
//
// The workflow is changed as it is saved and then opened again, as undo does it. So whatever a node
// has in a saved workflow (links, place, mode, colour, what a subgraph shows of it) stays.
import { app } from "../../scripts/app.js";
import { refreshBadges } from "./badge.js";
import { DEFAULT_COUNT, whyNot } from "./gpu_counts.js";
import { SAMPLER, decidingWidget, isThere, loaderOf, placeOf, placesOf } from "./graph.js";
import { text } from "./texts.js";
import { showError, toast } from "./toast.js";

const OURS = { UNETLoader: "TPLoadDiffusionModel", CheckpointLoaderSimple: "TPLoadCheckpoint" };
const STOCK = Object.fromEntries(Object.entries(OURS).map(([stock, ours]) => [ours, stock]));
const FILES = ["unet_name", "ckpt_name"];
const TITLE = 30; // a node's place is that of what is below its title
const GAP = 30; // between a node and the title of the next one below
const OF_A_PACK = ["cnr_id", "aux_id", "ver"]; // properties that say which pack a node is of

const toOurs = (node) => known(OURS[node.type]);
const toStock = (node) => known(STOCK[node.type]);

function known(type) {
  return type in globalThis.LiteGraph.registered_node_types ? type : undefined;
}

/** The entry of a node's menu that replaces it; none for other nodes. */
export function menuItems(node) {
  const [title, target] = toOurs(node) ? [text("swap"), toOurs] : [text("swapBack"), toStock];
  if (!target(node)) return [];
  return [{ content: title, callback: () => swap([node], target).catch(showError) }];
}

/**
 * Replace every loader of the workflow, those in subgraphs included; to ours, those whose file can
 * run: a workflow may have other models beside it (depth, segmentation).
 */
export async function swapAll(back = false) {
  try {
    const target = back ? toStock : toOurs;
    const places = placesOf(target);
    const reasons = back ? new Map() : await leftOut(places);
    // Another workflow may be open by now.
    const nodes = [...new Set(places.map(({ node }) => node))].filter((node) => !reasons.has(node) && isThere(node));
    const left = [...new Set(reasons.values())].join("\n");
    if (nodes.length) {
      await swap(nodes, target);
      if (left) toast("info", text("swap.left"), left);
    } else if (left) {
      toast("warn", text("swap.left"), left);
    } else {
      toast("info", text("title"), text(back ? "swapBack.none" : "swap.none"));
    }
  } catch (error) {
    showError(error);
  }
}

/** Of places of stock loaders: node → why its file cannot run. One that is missing, or not known, may. */
async function leftOut(places) {
  const found = new Map();
  const ask = async (place) => {
    const name = FILES.find((input) => decidingWidget(place, input));
    const reason = name && (await whyNot(name, decidingWidget(place, name).value));
    if (reason) found.set(place.node, reason);
  };
  await Promise.all(places.map(ask));
  return found;
}

async function swap(nodes, target) {
  const types = new Map(nodes.map((node) => [node, target(node)]));
  if (target === toStock) {
    for (const { node } of placesOf(({ type }) => type === SAMPLER)) {
      if (types.has(loaderOf(placeOf(node))?.node)) types.set(node, "KSampler");
    }
  }
  const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
  (changeTracker.captureCanvasState ?? changeTracker.checkState).call(changeTracker);
  for (const [node, type] of types) disconnectLost(node, sample(type));
  const root = app.rootGraph ?? app.graph;
  const shown = app.canvas.graph?.id;
  const workflow = asSaved(root);
  const graphs = [workflow, ...(workflow.definitions?.subgraphs ?? [])];
  const changed = [];
  for (const [node, type] of types) {
    const graph = node.graph === root ? workflow : graphs.find(({ id }) => id === node.graph.id);
    // Frontend 1.49 has ids as texts, and saves them as numbers.
    const old = graph.nodes.find(({ id }) => String(id) === String(node.id));
    const bottom = old.pos[1] + old.size[1];
    changed.push(...replace(old, node, sample(type)));
    makeRoom(graph, old, bottom);
    for (const host of graphs.flatMap((each) => each.nodes)) forgetLost(host, graph.id, node.id, type);
  }
  // As a step that is done again: so it can be undone, and the workflow counts as changed.
  changeTracker.redoQueue.splice(0, Infinity, workflow);
  await changeTracker.redo();
  const subgraph = (app.rootGraph ?? app.graph).subgraphs?.get(shown);
  if (subgraph) app.canvas.setGraph(subgraph);
  refreshBadges();
  changeTracker.activeState = asSaved(app.rootGraph ?? app.graph); // or what loading adds is one more step
  if (changed.length) toast("warn", text("swap.changed"), changed.join("\n"));
}

const asSaved = (graph) => JSON.parse(JSON.stringify(graph.serialize()));

/** A node of a type that is in no graph: its widgets and properties are those of a new one. */
function sample(type) {
  return globalThis.LiteGraph.createNode(type);
}

const saves = ({ serialize }) => serialize !== false;
const inputNames = ({ inputs, widgets }) => [...(inputs ?? []), ...(widgets ?? [])].map(({ name }) => name);

/** Cut the links of inputs that the new node has not. */
function disconnectLost(node, made) {
  const names = inputNames(made);
  node.inputs?.forEach(({ name }, slot) => {
    if (!names.includes(name) && node.isInputConnected(slot)) node.disconnectInput(slot);
  });
}

/** Make a saved node one of another type. Returns which values the new one cannot have. */
function replace(saved, node, made) {
  const names = inputNames(made);
  const lost = [];
  const valueOf = (widget) => {
    const before = node.widgets.find(({ name }) => name === widget.name);
    if (before === undefined) return countOf(widget);
    const choices = widget.options?.values;
    // Names of files are checked where they are used: a file may be missing here.
    if (widget.name !== "weight_dtype" || choices.includes(before.value)) return before.value;
    lost.push(text("swap.lost", { name: widget.name, before: before.value, after: widget.value }));
    return widget.value;
  };
  saved.size = sizeFor(saved.size, node, made);
  saved.widgets_values = made.widgets.filter(saves).map(valueOf);
  saved.type = made.type;
  saved.inputs = saved.inputs?.filter(({ name }) => names.includes(name));
  for (const name of OF_A_PACK) delete saved.properties?.[name];
  saved.properties = { ...saved.properties, ...made.properties };
  return lost;
}

/** The height of the new type's widgets, unless a person has made the node larger than it had to be. */
function sizeFor([width, height], node, made) {
  const [leastWidth, leastHeight] = made.computeSize();
  const enlarged = height > 1.3 * node.computeSize()[1];
  return [Math.max(width, leastWidth), enlarged ? Math.max(height, leastHeight) : leastHeight];
}

/** Move what lies below a saved node, whose lower edge was higher before, so that it covers nothing. */
function makeRoom({ nodes, groups = [], reroutes, extra }, { id, pos, size, flags }, before) {
  if (flags?.collapsed) return;
  const top = (node) => node.pos[1] - TITLE;
  const covered = nodes.filter((node) =>
    node.id !== id && node.pos[0] < pos[0] + size[0] && pos[0] < node.pos[0] + node.size[0]
    && top(node) >= before && top(node) < pos[1] + size[1]);
  if (!covered.length) return;
  const line = Math.min(...covered.map(top));
  const by = pos[1] + size[1] + GAP - line;
  for (const node of nodes) if (top(node) >= line) node.pos[1] += by;
  for (const { bounding } of groups) {
    if (bounding[1] >= line) bounding[1] += by;
    else if (bounding[1] + bounding[3] >= line) bounding[3] += by;
  }
  for (const reroute of reroutes ?? extra?.reroutes ?? []) if (reroute.pos[1] >= line) reroute.pos[1] += by;
}

function countOf({ name, value }) {
  return name === "gpu_count" ? (app.extensionManager.setting.get(DEFAULT_COUNT) ?? value) : value;
}

/** Have a saved subgraph node show nothing of a node inside that this has no longer. */
function forgetLost(host, graphId, nodeId, type) {
  const shown = host.properties?.proxyWidgets;
  if (host.type !== graphId || !shown) return;
  const names = inputNames(sample(type));
  host.properties.proxyWidgets = shown.filter(
    ([id, name]) => String(id) !== String(nodeId) || names.includes(name),
  );
}
