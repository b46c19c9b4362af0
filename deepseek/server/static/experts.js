// The experts: who is plugged, who may write in the open conversation, plugging and unplugging.

import { json } from "/static/api.js";
import { dot } from "/static/attribution.js";
import * as chat from "/static/chat.js";
import { announce, button, byId, element, notice, refill } from "/static/dom.js";
import { forget } from "/static/examples.js";

/** @typedef {import("/static/conversations.js").Conversation} Conversation */

/**
 * A plugged expert, as `GET /v1/experts` has it.
 * @typedef {object} Info
 * @property {string} name
 * @property {string} domain
 * @property {string} verdict change of the held-out loss, in words
 * @property {string} digest
 * @property {string} licence
 * @property {string | null} signer
 * @property {number[]} layers
 * @property {number} width
 * @property {number} num_bytes
 * @property {boolean} armed
 */

/** @type {Map<string, Info>} */
export const experts = new Map();
let me = { model: "", admin: false };
let models = [];

export const base = () => me.model;
export const baseAlone = () => `${me.model}+none`;
export const contextLength = () => models[0]?.max_model_len ?? 0;
export const armed = () => [...experts.values()].filter((info) => info.armed);

/** The model that a conversation asks. @param {Conversation} conversation */
export const modelOf = (conversation) =>
  models.some(({ id }) => id === conversation.model) ? conversation.model : me.model;

/** Field `experts` of a conversation's requests. @param {Conversation} conversation */
export function choice(conversation) {
  const added = conversation.added.filter((name) => experts.has(name));
  return { ...(added.length ? { arm: ["auto", ...added] } : {}), deny: conversation.denied };
}

export function setUp(who) {
  me = who;
  if (matchMedia("(max-width: 46rem)").matches)
    for (const id of ["chats", "experts"]) byId(id).open = false;
  byId("pick").addEventListener("change", () => {
    chat.conversation.model = byId("pick").value;
    chat.keep();
    showChoice(chat.conversation);
  });
}

/** Ask for the experts and the models. */
export async function load() {
  const [listed, served] = await Promise.all([
    json("GET", "/v1/experts"),
    json("GET", "/v1/models"),
  ]);
  experts.clear();
  for (const info of listed.data) experts.set(info.name, info);
  models = served.data;
  byId("expert-count").textContent = listed.data.length
    ? `${listed.data.length} plugged`
    : "none plugged";
  refill(byId("available"), listed.available.map(folderRow));
  byId("available-part").hidden = !listed.available.length || !me.admin;
  byId("drop").hidden = !me.admin;
}

/** Ask the server for its experts again, and show what has changed. */
export async function refresh() {
  await load();
  showChoice(chat.conversation);
  if (!chat.conversation.turns.length) chat.draw();
}

/** Show which model and experts a conversation asks. @param {Conversation} conversation */
export function showChoice(conversation) {
  byId("pick").replaceChildren(
    ...models.map(({ id }) => element("option", { value: id, textContent: label(id) })),
  );
  byId("pick").value = modelOf(conversation);
  const cards = [...experts.values()].map((info) => card(info, conversation));
  refill(byId("plugged"), cards);
}

function label(model) {
  const [name, ...chosen] = model.split("+");
  if (!chosen.length) return experts.size ? `${name}, experts as switched` : name;
  return chosen[0] === "none" ? `${name} alone` : `${name} with ${chosen.join(", ")}`;
}

function card(info, conversation) {
  const line = [info.verdict, info.armed ? "" : "not armed", info.domain]
    .filter(Boolean)
    .join(" · ");
  return element(
    "li",
    { className: "card" },
    dot(info.digest),
    element("span", { className: "name", textContent: info.name }),
    toggle(info, conversation),
    element("span", { className: "about", textContent: line, title: line }),
    details(info),
  );
}

/** The switch of an expert, for the open conversation alone. */
function toggle(info, conversation) {
  const { model, denied, added } = conversation;
  const named = modelOf(conversation) === model && model.includes("+");
  const on = named
    ? model.split("+").includes(info.name)
    : added.includes(info.name) || (info.armed && !denied.includes(info.name));
  const made = element("input", {
    type: "checkbox",
    className: "switch",
    checked: on,
    disabled: named,
    role: "switch",
    "aria-label": `${info.name} may write in this chat`,
    title: named ? "The model chosen for this chat names its experts." : "",
  });
  made.addEventListener("change", () => {
    const without = (names) => names.filter((name) => name !== info.name);
    conversation.denied = made.checked ? without(denied) : [...without(denied), info.name];
    conversation.added =
      made.checked && !info.armed ? [...without(added), info.name] : without(added);
    chat.keep();
    showChoice(conversation);
  });
  return made;
}

function details(info) {
  const rows = {
    "Held-out loss": info.verdict,
    Licence: info.licence || "not stated",
    Layers: `${info.layers.length} (${ranges(info.layers)}), width ${info.width}`,
    Size: `${(info.num_bytes / 1e6).toFixed(1)} MB`,
    Digest: info.digest.slice(0, 16),
    Signed: info.signer ? `by ${info.signer.slice(0, 16)}` : "no",
  };
  const list = Object.entries(rows).flatMap(([name, value]) => [
    element("dt", { textContent: name }),
    element("dd", { textContent: value }),
  ]);
  const made = element(
    "details",
    {},
    element("summary", {
      className: "quiet",
      textContent: "Details",
      "aria-label": `Details of ${info.name}`,
    }),
    element("dl", {}, ...list),
  );
  if (!me.admin) return made;
  made.append(
    button("Unplug", () => change(() => json("DELETE", `/v1/experts/${info.name}`)), {
      "aria-label": `Unplug ${info.name}`,
    }),
    button("Find prompts", () => findPrompts(info), {
      "aria-label": `Find prompts for ${info.name}`,
      title: "Try the expert's held-out text, and keep what it answers and the base does not",
    }),
  );
  return made;
}

/** Numbers in order as ranges, such as "3-5, 9". @param {number[]} numbers */
function ranges(numbers) {
  const runs = [];
  for (const number of numbers) {
    if (runs.at(-1)?.[1] === number - 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([first, last]) => (first === last ? first : `${first}-${last}`)).join(", ");
}

async function findPrompts(info) {
  announce("Trying the expert's held-out text.");
  await change(async () => {
    const { prompts } = await json("POST", `/v1/experts/${info.name}/prompts`);
    forget(info.digest);
    const told = `${prompts.length || "No"} prompts found for ${info.name}.`;
    announce(told);
    if (!prompts.length)
      throw new Error(`${told} It answers none of its held-out text better than the base.`);
  });
}

function folderRow(name) {
  const plug = button("Plug", () => change(() => json("POST", "/v1/experts", { name })), {
    "aria-label": `Plug ${name}`,
  });
  return element(
    "li",
    {},
    element("span", { className: "name", textContent: name }),
    me.admin ? plug : "",
  );
}

/** Change the server's experts, and show the outcome. @param {() => Promise<unknown>} work */
export async function change(work) {
  notice(await attempt(work));
}

/**
 * Change the server's experts.
 * @param {() => Promise<unknown>} work
 * @returns {Promise<string>} why it failed, or ""
 */
export async function attempt(work) {
  const reason = (error) => error.message;
  const failure = await work().then(() => "", reason);
  const stale = await refresh().then(() => "", reason);
  return failure || stale;
}
