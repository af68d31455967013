import { app } from "../../scripts/app.js";
import { text } from "./texts.js";

// Newer frontends have a method for each severity; `add` is what 1.32 has.
const METHODS = { info: "info", warn: "warning", error: "error" };

/** A message in the page's corner. `severity`: info, warn or error. */
export function toast(severity, title, detail) {
  const toasts = app.extensionManager.toast;
  const method = METHODS[severity];
  if (toasts[method]) toasts[method](title, { description: detail });
  else toasts.add({ severity, summary: title, detail, life: 15000 });
}

export function showError(error) {
  toast("error", text("title"), error.message);
}
