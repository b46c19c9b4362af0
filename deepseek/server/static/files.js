// Files that are dropped or chosen: packs are plugged, text goes into the message.

import { call } from "/static/api.js";
import { announce, byId, notice } from "/static/dom.js";
import { change } from "/static/experts.js";

const MOST_BYTES = 1 << 18; // of a text in a message
const PACK = /\.safetensors$/i;

export function setUp() {
  byId("pack").addEventListener("change", (event) => takeAll(event.target));
  byId("text-file").addEventListener("change", (event) => takeAll(event.target));
  byId("attach").addEventListener("click", () => byId("text-file").click());
  // The whole page takes files, so that a near miss does not make the browser leave for the file.
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return; // a text may go into the message
      event.preventDefault();
      document.body.classList.toggle("over", kind === "dragover");
    });
  }
  addEventListener("drop", (event) => [...event.dataTransfer.files].forEach(take));
}

function takeAll(field) {
  [...field.files].forEach(take);
  field.value = "";
}

/** @param {File} file */
async function take(file) {
  if (!PACK.test(file.name)) return addText(file);
  if (byId("drop").hidden) return notice("Only the admin key may plug packs.");
  await change(() => call("POST", "/v1/experts/upload", file));
}

/** Put a text file into the message, as code under its name. @param {File} file */
async function addText(file) {
  if (file.size > MOST_BYTES)
    return notice(`${file.name} has more than ${MOST_BYTES / 1024} KiB; take a part of it.`);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    text = "\0";
  }
  if (text.includes("\0")) return notice(`${file.name} is not a text in UTF-8.`);
  const words = byId("words");
  const fence = "`".repeat(
    Math.max(3, ...[...text.matchAll(/`+/g)].map(([ticks]) => ticks.length + 1)),
  );
  const ending = file.name.split(".").at(-1);
  words.value = `${words.value}${words.value ? "\n\n" : ""}${file.name}:\n${fence}${ending}\n${text.trimEnd()}\n${fence}\n`;
  words.dispatchEvent(new Event("input"));
  words.focus();
  notice("");
  announce(`${file.name} is in the message.`);
}
