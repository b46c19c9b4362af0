// The teach form, and how a training goes: stage, progress, loss curve.

import { byId, element, events, json, notice } from "/static/api.js";
import { refresh } from "/static/experts.js";

const SVG = "http://www.w3.org/2000/svg";
const IN_THE_PAGE = ["name", "kind", "path", "minutes", "layers"]; // arguments with a place of their own in the form
const TITLES = { running: "", stopped: "Stopped", failed: "Failed", plugged: "Plugged" };

export async function setUp(me) {
  const allowed = me.admin && me.teach;
  byId("teach-off").hidden = allowed;
  byId("lesson").hidden = !allowed;
  if (!allowed) return;
  await addArguments();
  byId("lesson").addEventListener("submit", start);
  byId("lesson-stop").addEventListener("click", () => json("DELETE", "/v1/teach").catch((error) => notice(error.message)));
  const lesson = await json("GET", "/v1/teach");
  if (lesson.state === "running") follow(); // begun before the page was opened
  else if (lesson.state !== "none") show(lesson);
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
    ? element("select", {}, ...type.enum.map((value) => element("option", { value, textContent: value })))
    : element("input", { type: number ? "number" : "text", placeholder: field.default ?? "", autocomplete: "off" });
  if (number) Object.assign(input, { step: type.type === "integer" ? 1 : "any", min: type.minimum ?? "", max: type.maximum ?? "" });
  input.name = name;
  return element("label", { title: field.description }, `${name.replaceAll("_", " ")} `, input);
}

function furtherArguments() {
  const filled = [...byId("lesson-arguments").querySelectorAll("[name]")].filter((input) => input.value !== "");
  return Object.fromEntries(filled.map((input) => [input.name, input.type === "number" ? Number(input.value) : input.value]));
}

async function start(event) {
  event.preventDefault();
  const value = (id) => byId(`lesson-${id}`).value;
  const body = {
    name: value("name"), kind: value("kind"), path: value("path"), minutes: Number(value("minutes")), layers: value("layers"),
    ...furtherArguments(),
  };
  try {
    await json("POST", "/v1/teach", body);
    notice("");
    await follow();
  } catch (error) {
    notice(error.message);
  }
}

async function follow() {
  for await (const lesson of events("GET", "/v1/teach/events")) show(lesson);
  await refresh(true);
}

function show(lesson) {
  const running = lesson.state === "running";
  byId("lesson-state").hidden = false;
  byId("lesson-start").disabled = running;
  byId("lesson-stop").hidden = !running;
  byId("lesson-stage").textContent = `${lesson.name}: ${TITLES[lesson.state] || lesson.stage}`;
  byId("lesson-count").textContent = running && lesson.total ? `${lesson.done} of ${lesson.total}` : "";
  const silent = lesson.armed ? "" : " It is plugged but not armed: name it to let it speak.";
  byId("lesson-message").textContent = lesson.verdict
    ? `The expert is ${lesson.verdict} on text it was not trained on.${silent}`
    : lesson.message;
  const bar = byId("lesson-progress");
  if (running && !lesson.total) bar.removeAttribute("value");
  else [bar.max, bar.value] = running ? [lesson.total, lesson.done] : [1, lesson.state === "plugged" ? 1 : 0];
  draw(lesson.losses, lesson.held_out);
}

function draw(losses, heldOut) {
  const points = [...losses, ...heldOut];
  if (!points.length) return byId("curve").replaceChildren();
  const steps = points.map(([step]) => step), values = points.map(([, value]) => value);
  const last = Math.max(...steps, 1), low = Math.min(...values), high = Math.max(...values, low + 0.01);
  const x = (step) => 46 + (step / last) * 580, y = (value) => 12 + ((high - value) / (high - low)) * 176;
  const line = (rows, kind) => node("polyline", { class: kind, points: rows.map(([s, v]) => `${x(s)},${y(v)}`).join(" ") });
  const labels = [low, (low + high) / 2, high].flatMap((value) => [
    node("line", { class: "grid", x1: 46, x2: 626, y1: y(value), y2: y(value) }),
    node("text", { x: 40, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)),
  ]);
  byId("curve").replaceChildren(
    ...labels, line(losses, "train"), line(heldOut, "held"),
    ...heldOut.map(([s, v]) => node("circle", { cx: x(s), cy: y(v), r: 3 })),
    node("text", { x: 46, y: 210 }, "step 0"), node("text", { x: 626, y: 210, "text-anchor": "end" }, `${last}`),
  );
  byId("curve").setAttribute("aria-label", `Loss from step 0 to ${last}, latest ${values[losses.length - 1]?.toFixed(3) ?? ""}`);
}

function node(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}
