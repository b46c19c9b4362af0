// The panel of experts: who is plugged, who may speak in this conversation, plugging and unplugging.

import { byId, call, element, json, notice } from "/static/api.js";

const colours = new Map(); // a name keeps its colour for as long as the page lives
const silenced = new Set();

export function colour(name) {
  if (!colours.has(name)) colours.set(name, `e${colours.size % 8}`);
  return colours.get(name);
}

export const denied = () => [...silenced];

export async function refresh(admin) {
  const { data, available } = await json("GET", "/v1/experts");
  byId("expert-count").textContent = data.length ? `${data.length} plugged` : "none plugged";
  byId("plugged").replaceChildren(...data.map((info) => row(info, admin)));
  byId("available").replaceChildren(...available.map((name) => folderRow(name, admin)));
  byId("available-part").hidden = !available.length || !admin;
  byId("drop").hidden = !admin;
}

function row(info, admin) {
  const toggle = element("input", { type: "checkbox", className: "switch", checked: !silenced.has(info.name) });
  toggle.setAttribute("role", "switch");
  toggle.setAttribute("aria-label", `${info.name} may speak`);
  toggle.addEventListener("change", () => (toggle.checked ? silenced.delete(info.name) : silenced.add(info.name)));
  const silent = info.armed ? "" : "not armed";
  const size = `${(info.num_bytes / 1e6).toFixed(1)} MB`;
  const about = [info.domain, info.verdict, silent, `${info.layers.length} layers`, size, info.licence];
  return element(
    "li", {},
    element("span", { className: `dot ${colour(info.name)}` }),
    element("span", { className: "name", textContent: info.name, title: info.digest }),
    toggle,
    admin ? button("Unplug", `Unplug ${info.name}`, () => change(() => json("DELETE", `/v1/experts/${info.name}`))) : "",
    element("span", { className: "about", textContent: about.filter(Boolean).join(", ") }),
  );
}

function folderRow(name, admin) {
  return element(
    "li", {}, element("span"), element("span", { className: "name", textContent: name }), element("span"),
    admin ? button("Plug", `Plug ${name}`, () => change(() => json("POST", "/v1/experts", { name }))) : "",
  );
}

function button(text, label, act) {
  const made = element("button", { type: "button", textContent: text });
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

async function change(work) {
  try {
    await work();
    notice("");
  } catch (error) {
    notice(error.message);
  }
  await refresh(true);
}

const upload = (file) => change(() => call("POST", "/v1/experts/upload", file));

export function setUp() {
  const drop = byId("drop");
  if (matchMedia("(max-width: 46rem)").matches) byId("experts").open = false;
  byId("pack").addEventListener("change", (event) => {
    for (const file of event.target.files) upload(file);
    event.target.value = "";
  });
  // The whole page takes packs, so that a near miss does not make the browser leave for the file.
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
    });
  }
  addEventListener("drop", (event) => {
    if (!drop.hidden) for (const file of event.dataTransfer.files) upload(file);
  });
}
