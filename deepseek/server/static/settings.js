// Settings of the page, kept in the browser, and the dialog behind the gear.

import { byId, notice } from "/static/dom.js";
import { lasting } from "/static/storage.js";

/**
 * @typedef {object} Settings
 * @property {string} system system prompt; "" for none
 * @property {number} temperature
 * @property {number} topP
 * @property {number} tokens most tokens of an answer
 * @property {string} seed "" for a new one with every answer
 * @property {string} stop texts that end an answer, one a line
 * @property {boolean} attribution whether experts' words are underlined
 * @property {string} theme
 */

const KEY = "settings";
const THEMES = ["auto", "light", "dark"];

/** @type {Settings} */
const DEFAULTS = {
  system: "",
  temperature: 0.6,
  topP: 1,
  tokens: 256,
  seed: "",
  stop: "",
  attribution: true,
  theme: "auto",
};

/** @type {Settings} */
export const settings = { ...DEFAULTS, ...stored() };

function stored() {
  try {
    const found = JSON.parse(lasting.read(KEY) ?? "{}");
    const known = Object.entries(found).filter(
      ([name, value]) => typeof value === typeof DEFAULTS[name],
    );
    return Object.fromEntries(known);
  } catch {
    return {};
  }
}

/** Sampling fields of a request, a seed of its own included. */
export function sampling() {
  const stop = settings.stop
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0];
  return {
    temperature: settings.temperature,
    top_p: settings.topP,
    max_tokens: settings.tokens,
    seed: settings.seed === "" ? drawn : Number(settings.seed),
    ...(stop.length ? { stop } : {}),
  };
}

export function setUp() {
  showAll();
  addEventListener("storage", ({ key }) => {
    if (key !== KEY) return; // otherwise another tab has changed them
    Object.assign(settings, DEFAULTS, stored());
    showAll();
  });
  byId("gear").addEventListener("click", () => byId("settings").showModal());
  byId("settings").addEventListener("change", (event) => take(event.target));
  byId("set-reset").addEventListener("click", () => {
    keep(DEFAULTS);
    showAll();
  });
}

function showAll() {
  apply();
  for (const [name, value] of Object.entries(settings)) show(byId(`set-${name}`), value);
}

/** Keep what was typed into a field, unless it is out of range. */
function take(field) {
  const name = field.id.replace("set-", "");
  if (!(name in settings)) return;
  if (!field.reportValidity()) return;
  let value = field.value;
  if (typeof DEFAULTS[name] === "boolean") value = field.checked;
  else if (typeof DEFAULTS[name] === "number") value = Number(field.value);
  keep({ [name]: value });
}

/** Change some settings. The others are as another tab may have kept them. */
function keep(changes) {
  Object.assign(settings, stored(), changes);
  try {
    lasting.write(KEY, JSON.stringify(settings));
  } catch {
    notice("The browser's storage for this page is full, so the settings last until it is closed.");
  }
  apply();
}

function show(field, value) {
  if (field.type === "checkbox") field.checked = value;
  else field.value = value;
}

function apply() {
  const root = document.documentElement.dataset;
  root.theme = THEMES.includes(settings.theme) ? settings.theme : "auto";
  root.attribution = settings.attribution ? "on" : "off";
}
