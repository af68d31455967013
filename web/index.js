// The pack in ComfyUI's page: a sidebar tab, settings, commands, and what the nodes show.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { prepareBadge, showBadges } from "./badge.js";
import { DEFAULT_COUNT, followModel, forgetAnswers } from "./gpu_counts.js";
import { refreshGroups, releaseAll, showGroups } from "./groups.js";
import { showWarnings } from "./note.js";
import { lookAgain } from "./own_python.js";
import { closePanel, openPanel } from "./panel.js";
import { followPrompts } from "./prompts.js";
import { openOldPrompts, renameInputs } from "./renamed.js";
import { menuItems, swapAll } from "./swap.js";
import { loadTexts, text } from "./texts.js";
import { showError } from "./toast.js";

const TAB = "tensor-parallel";

app.registerExtension({
  name: "TensorParallel",
  // The names here are in English; locales/*/settings.json and commands.json have the others.
  settings: [
    {
      id: "TensorParallel.Runtime.Python",
      category: ["Tensor Parallel", "Runtime", "Python"],
      name: "Python of the GPU processes",
      tooltip:
        "Path of a Python that has vLLM and diffusers, for groups that start from now on. " +
        "Empty: ComfyUI's own. TP_RUNTIME_PYTHON overrides it.",
      type: "text",
      attrs: { style: "width: 24rem" },
      sortOrder: 40,
      defaultValue: "",
      onChange: (now, before) => settingChanged("TensorParallel.Runtime.Python", now, before, lookAgain),
    },
    {
      id: "TensorParallel.Runtime.Devices",
      category: ["Tensor Parallel", "Runtime", "Devices"],
      name: "GPUs to use",
      tooltip: "Their numbers, such as 0,1; of GPUs that are alike, the first ones are taken first. Empty: all that ComfyUI sees.",
      type: "text",
      sortOrder: 30,
      defaultValue: "",
      onChange: (now, before) => settingChanged("TensorParallel.Runtime.Devices", now, before, forgetAnswers),
    },
    {
      id: "TensorParallel.Runtime.Reproducible",
      category: ["Tensor Parallel", "Runtime", "Reproducible"],
      name: "Same seed, same bits",
      tooltip:
        "What was measured decides neither the layout that 'auto' takes nor the kernel of " +
        "attention, so that a prompt gives the same bits tomorrow. May be slower. " +
        "TP_RUNTIME_REPRODUCIBLE overrides it.",
      type: "boolean",
      defaultValue: false,
    },
    {
      id: "TensorParallel.Runtime.Prepare",
      category: ["Tensor Parallel", "Runtime", "Prepare"],
      name: "Prepare the GPU processes",
      tooltip:
        "What they are forked from takes 500 MB of the machine's memory, none of a GPU's, and five " +
        "to twenty seconds to start. 'auto' starts it with ComfyUI if there are several GPUs, and " +
        "ends it after five minutes without use; 'always' keeps it; 'when used' waits for a page " +
        "or a prompt with a loader. From ComfyUI's next start on.",
      type: "combo",
      options: ["auto", "always", "when used"],
      defaultValue: "auto",
    },
    {
      id: DEFAULT_COUNT,
      category: ["Tensor Parallel", "Nodes", "GpuCount"],
      name: "GPU count of a new loader",
      tooltip: "What 'Load Diffusion Model (TP)' is set to when you add it to a workflow.",
      type: "combo",
      sortOrder: 10,
      options: ["auto", "1", "2", "3", "4", "5", "6", "7", "8"],
      defaultValue: "auto",
    },
  ],
  commands: [
    {
      id: "TensorParallel.ReleaseAll",
      label: "Release all GPU processes",
      icon: "pi pi-power-off",
      function: () => releaseAll().catch(showError),
    },
    {
      id: "TensorParallel.UseInWorkflow",
      label: "Use several GPUs (TP) in this workflow",
      icon: "pi pi-microchip",
      function: () => swapAll(),
    },
    {
      id: "TensorParallel.UseStockInWorkflow",
      label: "Use ComfyUI's own loaders in this workflow",
      icon: "pi pi-undo",
      function: () => swapAll(true),
    },
  ],
  beforeConfigureGraph: renameInputs,
  getNodeMenuItems: menuItems,
  async setup() {
    await loadTexts();
    addStyle();
    openOldPrompts();
    followPrompts();
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-microchip",
      title: text("title"),
      tooltip: text("title"),
      type: "custom",
      render: openPanel,
      destroy: closePanel,
    });
    showBadges(app.extensionManager.getSidebarTabs().find(({ id }) => id === TAB));
    showWarnings();
    refreshGroups().catch(showError);
    api.addEventListener("reconnected", () => {
      forgetAnswers(); // it may be another server now
      refreshGroups().catch(() => showGroups({ groups: [] }));
    });
  },
  nodeCreated(node) {
    followModel(node);
    prepareBadge(node);
    // On the canvas a node is as wide as its inputs, and this one's report is not.
    if (node.comfyClass === "TPRuntimeInfo") node.setSize([Math.max(node.size[0], 320), Math.max(node.size[1], 160)]);
  },
  refreshComboInNodes: forgetAnswers,
});

/** Show what follows from it. The server reads the stored value, so that is stored first. */
async function settingChanged(id, now, before, show) {
  if (before === undefined) return; // the page is being loaded
  await api.storeSetting(id, now);
  show();
}

function addStyle() {
  const href = new URL("panel.css", import.meta.url).href;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
}
