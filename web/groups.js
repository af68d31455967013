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

export async function refreshGroups() {
  showGroups(await newest(request("/groups")));
}

/** Do something with a group: sleep, wake, restart or release. Returns what runs then. */
export function changeGroup(id, action) {
  return newest(request(`/groups/${id}/${action}`, "POST"));
}

/** An answer, or what an event has said since it was asked for: the server asks ranks one by one. */
async function newest(asked) {
  const before = numEvents;
  const answer = await asked;
  return numEvents === before ? answer : { groups };
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
