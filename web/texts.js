// The page's texts in the person's language: the entry `tensorParallel` of locales/*/main.json.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

let translations = {};

export async function loadTexts() {
  translations = await (await api.fetchApi("/i18n")).json();
}

/** A text by its key, with `{name}` replaced by `values.name`. */
export function text(key, values = {}) {
  const locale = app.extensionManager.setting.get("Comfy.Locale");
  const found = translations[locale]?.tensorParallel?.[key];
  const template = found ?? translations.en.tensorParallel[key];
  return template.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Bytes as people read them. */
export function gibibytes(bytes) {
  const size = bytes / 2 ** 30;
  return size < 0.1 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${size.toFixed(1)} GiB`;
}

/** What a model's weights take on each rank. */
export function sizeOf(bytes) {
  const size = gibibytes(Math.max(...bytes));
  return bytes.length > 1 ? text("each", { size }) : size;
}

/** Milliseconds with about three digits. */
export function milliseconds(ms) {
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

// A group's layout, as the loader's input has it: "2x2", or "2x2x1" where ranks share the tokens.
export function layoutOf({ tp_size, sequence_size, batch_groups }) {
  return [tp_size, ...(sequence_size > 1 ? [sequence_size] : []), batch_groups].join("x");
}

// How many ranks a group has.
export const ranksOf = (group) => group.tp_size * group.sequence_size * group.batch_groups;
