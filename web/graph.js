// Nodes of ComfyUI's graph, across the borders of subgraphs.
//
// A place is { node, hosts }: `hosts` are the subgraph nodes that it lies in, outermost first.
import { app } from "../../scripts/app.js";

export const LOADERS = ["TPLoadDiffusionModel", "TPLoadCheckpoint"];
export const SAMPLER = "TPSampler";

const VALUES = ["PrimitiveNode", "PrimitiveString", "PrimitiveStringMultiline"];

/** Whether a node gives what its first widget is. */
export const isValue = ({ comfyClass, type }) => VALUES.includes(comfyClass ?? type);

// Whether a link comes from the node of a subgraph's inputs; newer frontends have ids as texts.
const isFromOutside = (link) => Number(link?.origin_id) === -10;
const MODELS = /^(MODEL|GUIDER|\*)$/;

// A subgraph node has a method of this name that is about its outputs.
const linkInto = (node, slot) => globalThis.LGraphNode.prototype.getInputLink.call(node, slot);
const rootGraph = () => app.rootGraph ?? app.graph;

/** The place of an execution id: "7", or "3:7" for node 7 inside the subgraph node 3. */
export function findPlace(executionId) {
  const hosts = [];
  let graph = rootGraph();
  const ids = String(executionId).split(":");
  for (const id of ids.slice(0, -1)) {
    hosts.push(byId(graph, id));
    graph = hosts.at(-1)?.subgraph;
  }
  const node = byId(graph, ids.at(-1));
  return node && { node, hosts };
}

function byId(graph, id) {
  return graph?.nodes.find((node) => String(node.id) === id);
}

/** Whether a node is where it was: a workflow that is closed leaves its nodes a graph (frontend 1.32). */
export function isThere(node) {
  return Boolean(node.graph?.nodes.includes(node));
}

/** Where a node is; of a subgraph that is used several times, the first use. */
export function placeOf(node) {
  return placesOf((other) => other === node)[0];
}

/** All places of nodes that a function says yes to, those in subgraphs included. */
export function placesOf(wanted, graph = rootGraph(), hosts = []) {
  return graph.nodes.flatMap((node) => [
    ...(wanted(node) ? [{ node, hosts }] : []),
    ...(node.subgraph ? placesOf(wanted, node.subgraph, [...hosts, node]) : []),
  ]);
}

/** The place of the TP loader whose model reaches a place, if the way there is one of MODEL inputs. */
export function loaderOf(place) {
  const seen = new Set();
  while (place && !LOADERS.includes(place.node.comfyClass)) {
    if (seen.has(place.node)) return undefined;
    seen.add(place.node);
    place = modelSource(place);
  }
  return place;
}

function modelSource({ node, hosts }) {
  const inputs = node.graph ? (node.inputs ?? []) : []; // a node that is being moved is in no graph
  const slot = inputs.findIndex(({ type }, index) => MODELS.test(type) && node.isInputConnected(index));
  return slot < 0 ? undefined : sourceOf(node.graph, linkInto(node, slot), hosts);
}

/** The place that a link comes from, in or out of subgraphs. */
function sourceOf(graph, link, hosts) {
  while (link) {
    if (isFromOutside(link)) {
      const host = hosts.at(-1);
      link = host?.graph && linkInto(host, link.origin_slot);
      graph = host?.graph;
      hosts = hosts.slice(0, -1);
      continue;
    }
    const node = graph.getNodeById(link.origin_id);
    if (!node?.subgraph) return node && { node, hosts };
    hosts = [...hosts, node];
    graph = node.subgraph;
    link = graph.outputNode.slots[link.origin_slot]?.getLinks()[0];
  }
  return undefined;
}

export function widgetOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name);
}

/**
 * The widget that decides what a place's widget is: a subgraph node's, where it is shown there, or that
 * of a node whose value a link brings. Undefined: what a link brings is known when it runs.
 */
export function decidingWidget({ node, hosts }, name) {
  const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
  return decidingInput({ node, hosts }, slot, widgetOf(node, name));
}

function decidingInput({ node, hosts }, slot, widget) {
  if (slot < 0 || !node.isInputConnected(slot)) return widget;
  const link = linkInto(node, slot);
  if (isFromOutside(link)) {
    const host = hosts.at(-1);
    const shown = widgetOf(host, host.inputs[link.origin_slot]?.widget?.name) ?? widget;
    return decidingInput({ node: host, hosts: hosts.slice(0, -1) }, link.origin_slot, shown);
  }
  const giver = sourceOf(node.graph, link, hosts)?.node;
  const isKnown = giver && isValue(giver) && !giver.inputs?.some((_, index) => giver.isInputConnected(index));
  return isKnown ? giver.widgets?.[0] : undefined;
}
