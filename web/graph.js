// Nodes of ComfyUI's graph.
import { app } from "../../scripts/app.js";

export const LOADER = "TPLoadDiffusionModel";
export const SAMPLER = "TPSampler";

/** The node with an execution id: "7", or "3:7" for node 7 inside the subgraph node 3. */
export function findNode(executionId) {
  const ids = String(executionId).split(":");
  let graph = app.rootGraph ?? app.graph;
  for (const id of ids.slice(0, -1)) graph = byId(graph, id)?.subgraph;
  return byId(graph, ids.at(-1));
}

function byId(graph, id) {
  return graph?.nodes.find((node) => String(node.id) === id);
}

/** The nodes of a type, those in subgraphs included. */
export function nodesOfType(type, graph = app.rootGraph ?? app.graph) {
  return graph.nodes.flatMap((node) => [
    ...(node.comfyClass === type ? [node] : []),
    ...(node.subgraph ? nodesOfType(type, node.subgraph) : []),
  ]);
}

/** The TP loader whose model reaches a node, if the way there is one of MODEL inputs. */
export function loaderOf(node) {
  const seen = new Set();
  while (node && node.comfyClass !== LOADER) {
    if (seen.has(node)) return undefined;
    seen.add(node);
    const slot = node.inputs?.findIndex(({ type, link }) => link != null && /^(MODEL|GUIDER|\*)$/.test(type));
    node = slot >= 0 ? node.getInputNode(slot) : undefined;
  }
  return node;
}

export function widgetOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name);
}
