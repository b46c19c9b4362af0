// The form that starts a training.

import { events, json } from "/static/api.js";
import { byId, element, notice } from "/static/dom.js";
import { refresh } from "/static/experts.js";
import * as folders from "/static/folders.js";
import { minutes, show } from "/static/lesson.js";

const IN_THE_PAGE = ["name", "kind", "path", "minutes", "layers"]; // arguments with a place of their own in the form
const AGAIN = 2000; // milliseconds before a stream that broke is opened again
const SELDOM = 15000; // milliseconds between two looks at a lesson that nobody watches
// Seconds before and after training, at least and at most, on a processor.
const AROUND = { "last:3": [60, 180], all: [120, 600] };

let allowed = false;
/** Whether a lesson is followed to its end. */
let following = false;
/** @type {AbortController | null} */
let stream = null;
/** Ends the pause before the next look. */
let wake = () => {};

export async function setUp(me) {
  allowed = Boolean(me.admin && me.teach);
  byId("teach-off").hidden = allowed;
  byId("lesson").hidden = !allowed;
  if (!allowed) return;
  await addArguments();
  await folders.setUp((folder) => {
    byId("lesson-kind").value = folder.repository ? "git" : "folder";
    const name = folder.path
      .split("/")
      .at(-1)
      .replace(/[^A-Za-z0-9._-]/g, "-")
      .replace(/^[^A-Za-z0-9]+/, "");
    byId("lesson-name").placeholder = name || "my-project";
  });
  byId("lesson").addEventListener("submit", start);
  byId("lesson").addEventListener("input", estimate);
  byId("lesson-stop").addEventListener("click", () =>
    json("DELETE", "/v1/teach").catch((error) => notice(error.message)),
  );
  document.addEventListener("visibilitychange", attend);
  estimate();
  await look();
}

/** Whether somebody may be watching the lesson. */
const watched = () => !document.hidden && !byId("teach").hidden;

/** Stream the lesson only while it is watched: a browser has few connections to a server for all its tabs. */
export function attend() {
  if (!allowed) return;
  if (!watched()) stream?.abort();
  else if (following) wake();
  else look().catch((error) => notice(error.message));
}

/** Show the lesson that is or was taught, which another tab may have begun. */
async function look() {
  if (following) return;
  const lesson = await json("GET", "/v1/teach");
  if (lesson.state === "running") follow().catch((error) => notice(error.message));
  else if (lesson.state !== "none") show(lesson);
}

function estimate() {
  const seconds = 60 * Number(byId("lesson-minutes").value);
  const [least, most] = AROUND[byId("lesson-layers").value].map((around) =>
    minutes(seconds + around),
  );
  byId("estimate").textContent =
    `About ${least} to ${most}: ${minutes(seconds)} to read and train, the rest to calibrate; a base's first lesson ` +
    "prepares everyday text for some minutes more. The server goes on answering.";
}

// One input for each further argument that the server declares for a training.
async function addArguments() {
  const { components } = await json("GET", "/openapi.json");
  const declared = Object.entries(components.schemas.TeachRequest.properties);
  const further = declared.filter(([name]) => !IN_THE_PAGE.includes(name));
  byId("lesson-arguments").append(...further.map(([name, field]) => labelled(name, field)));
}

function labelled(name, field) {
  const type = field.anyOf?.find((one) => one.type !== "null") ?? field;
  const number = type.type === "number" || type.type === "integer";
  const input = type.enum
    ? element(
        "select",
        {},
        ...type.enum.map((value) => element("option", { value, textContent: value })),
      )
    : element("input", {
        type: number ? "number" : "text",
        placeholder: field.default ?? "",
        autocomplete: "off",
      });
  if (number)
    Object.assign(input, {
      step: type.type === "integer" ? 1 : "any",
      min: type.minimum ?? "",
      max: type.maximum ?? "",
    });
  input.name = name;
  return element("label", { title: field.description }, `${name.replaceAll("_", " ")} `, input);
}

function furtherArguments() {
  const filled = [...byId("lesson-arguments").querySelectorAll("[name]")].filter(
    (input) => input.value !== "",
  );
  return Object.fromEntries(
    filled.map((input) => [
      input.name,
      input.type === "number" ? Number(input.value) : input.value,
    ]),
  );
}

async function start(event) {
  event.preventDefault();
  const value = (id) => byId(`lesson-${id}`).value;
  const body = {
    name: value("name"),
    kind: value("kind"),
    path: value("path"),
    minutes: Number(value("minutes")),
    layers: value("layers"),
    ...furtherArguments(),
  };
  try {
    await json("POST", "/v1/teach", body);
    notice("");
    await follow();
  } catch (error) {
    notice(error.message);
    if (error.status === 409) await look().catch(() => {}); // another one is being taught
  }
}

/** Show a lesson until it ends; a stream that breaks is opened again. */
async function follow() {
  if (following) return;
  following = true;
  byId("lesson-state").scrollIntoView({ block: "nearest" });
  let broken = false;
  for (let state = "running"; state === "running";) {
    try {
      for await (const lesson of heard()) {
        state = lesson.state;
        show(lesson);
      }
      if (broken) notice("");
      broken = false;
    } catch (error) {
      if (error.name === "AbortError") continue; // it is no longer watched
      notice(`The lesson is not heard of (${error.message}); trying again.`);
      broken = true;
    }
    if (state === "running") await pause(watched() ? AGAIN : SELDOM);
  }
  following = false;
  await refresh();
}

/** The states of the lesson as they come, or only the present one while nobody watches. */
async function* heard() {
  if (!watched()) return yield await json("GET", "/v1/teach");
  stream = new AbortController();
  yield* events("GET", "/v1/teach/events", undefined, stream.signal);
}

/** Wait until it is time, or until the lesson is watched again. @param {number} milliseconds */
const pause = (milliseconds) =>
  new Promise((end) => {
    wake = () => end(undefined);
    setTimeout(wake, milliseconds);
  });
