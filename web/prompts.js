// Which of the open workflows a prompt was queued from: nodes of another may have the same ids.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const KEPT = 64;
const queuedFrom = new Map(); // prompt id → { workflow, path } of what was shown when it was queued

/** Note where prompts come from, from now on. */
export function followPrompts() {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (...args) {
    const workflow = shown();
    const answer = await queue.apply(this, args);
    queuedFrom.set(answer?.prompt_id, { workflow, path: workflow?.path });
    if (queuedFrom.size > KEPT) queuedFrom.delete(queuedFrom.keys().next().value);
    return answer;
  };
}

/** Whether what is said of a prompt's nodes is about the workflow that is shown, as far as is known. */
export function isOfShown(prompt) {
  const from = queuedFrom.get(prompt);
  const now = shown();
  // Its name may change meanwhile, and newer frontends may have another object for it.
  return !from || from.workflow === now || from.path === now?.path;
}

const shown = () => app.extensionManager.workflow?.activeWorkflow;
