// What runs, as nodes/page.py tells it: fetched once, then kept up to date by events.
import { api } from "../../scripts/api.js";

const watchers = new Set();
let groups = [];
let numEvents = 0;

api.addEventListener("tensor_parallel.groups", ({ detail }) => {
  numEvents += 1;
  showGroups(detail);
});

/** Call `watcher(groups)` now and after every change. Returns what ends that. */
export function watchGroups(watcher) {
  watchers.add(watcher);
  watcher(groups);
  return () => watchers.delete(watcher);
}

/** Ask what runs: the server asks rank after rank for it, so what events say meanwhile is newer. */
export async function refreshGroups() {
  const before = numEvents;
  const answer = await request("/groups");
  if (numEvents === before) showGroups(answer);
}

/** Do something with a group: sleep, wake, restart or release. Returns what runs then. */
export function changeGroup(id, action) {
  return request(`/groups/${id}/${action}`, "POST");
}

export async function releaseAll() {
  await Promise.all(groups.map(({ id }) => changeGroup(id, "release")));
  await refreshGroups();
}

/** The answer of a route of nodes/page.py. Throws an Error with its message. */
export async function request(path, method = "GET") {
  const options = { method };
  if (method === "POST") {
    options.headers = { "Content-Type": "application/json" };
    options.body = "{}";
  }
  const response = await api.fetchApi(`/tensor_parallel${path}`, options);
  const answer = await response.json().catch(() => ({ error: response.statusText }));
  if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
  return answer;
}

/** Tell the watchers of a route's or an event's answer. */
export function showGroups(answer) {
  groups = answer.groups;
  for (const watcher of watchers) watcher(groups);
}
