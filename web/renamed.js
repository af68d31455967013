// Workflows of before the loader's file was called `unet_name`, as in ComfyUI's Load Diffusion Model.
import { app } from "../../scripts/app.js";

const LOADER = "TPLoadDiffusionModel";
const OLD = "model_name";
const NEW = "unet_name";

/** Give what a saved workflow says of our loaders today's names, in place. */
export function renameInputs(workflow) {
  const graphs = [workflow, ...(workflow.definitions?.subgraphs ?? [])];
  for (const { id, nodes = [] } of graphs) {
    for (const loader of nodes.filter(({ type }) => type === LOADER)) {
      for (const slot of loader.inputs ?? []) {
        for (const named of [slot, slot.widget]) if (named?.name === OLD) named.name = NEW;
      }
      for (const host of graphs.flatMap((graph) => graph.nodes ?? [])) {
        if (host.type !== id) continue;
        for (const shown of host.properties?.proxyWidgets ?? []) {
          if (String(shown[0]) === String(loader.id) && shown[1] === OLD) shown[1] = NEW;
        }
      }
    }
  }
}

/** The same for prompts in the API's format, which no hook of the page is told of. */
export function openOldPrompts() {
  const open = app.loadApiJson;
  app.loadApiJson = function (prompt, ...more) {
    for (const { class_type: type, inputs } of Object.values(prompt)) {
      if (type === LOADER && inputs && OLD in inputs) inputs[NEW] ??= inputs[OLD];
    }
    return open.call(this, prompt, ...more);
  };
}
