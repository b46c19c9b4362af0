// Settings of the page, kept in the browser, and the dialog behind the gear.

import { byId } from "/static/dom.js";

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
    const found = JSON.parse(localStorage.getItem(KEY) ?? "{}");
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
  apply();
  for (const [name, value] of Object.entries(settings)) show(byId(`set-${name}`), value);
  byId("gear").addEventListener("click", () => byId("settings").showModal());
  byId("settings").addEventListener("change", (event) => take(event.target));
  byId("set-reset").addEventListener("click", () => {
    Object.assign(settings, DEFAULTS);
    for (const [name, value] of Object.entries(settings)) show(byId(`set-${name}`), value);
    keep();
  });
}

/** Keep what was typed into a field, unless it is out of range. */
function take(field) {
  const name = field.id.replace("set-", "");
  if (!(name in settings)) return;
  if (!field.reportValidity()) return;
  if (typeof DEFAULTS[name] === "boolean") settings[name] = field.checked;
  else if (typeof DEFAULTS[name] === "number") settings[name] = Number(field.value);
  else settings[name] = field.value;
  keep();
}

function keep() {
  localStorage.setItem(KEY, JSON.stringify(settings));
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
