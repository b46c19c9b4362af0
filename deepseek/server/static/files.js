// Files that are dropped or chosen: packs are plugged, text goes into the message.

import { call } from "/static/api.js";
import { announce, byId, notice } from "/static/dom.js";
import { attempt } from "/static/experts.js";

const MOST_BYTES = 1 << 18; // of a text in a message
const PACK = /\.safetensors$/i;

export function setUp() {
  for (const id of ["pack", "text-file"])
    byId(id).addEventListener("change", (event) => {
      takeAll([...event.target.files]);
      event.target.value = "";
    });
  byId("attach").addEventListener("click", () => byId("text-file").click());
  // The whole page takes files, so that a near miss does not make the browser leave for the file.
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return; // a text may go into the message
      event.preventDefault();
      document.body.classList.toggle("over", kind === "dragover");
    });
  }
  addEventListener("drop", (event) => takeAll([...event.dataTransfer.files]));
}

/** Take files one after another, and tell of all that failed at the end. @param {File[]} files */
async function takeAll(files) {
  const failures = [];
  for (const file of files) failures.push(await take(file));
  notice(failures.filter(Boolean).join(" "));
}

/** @param {File} file @returns {Promise<string>} why it was not taken, or "" */
async function take(file) {
  if (!PACK.test(file.name)) return addText(file);
  if (byId("drop").hidden) return "Only the admin key may plug packs.";
  const failure = await attempt(() => call("POST", "/v1/experts/upload", file));
  return failure && `${file.name}: ${failure}`;
}

/**
 * Put a text file into the message, as code under its name.
 * @param {File} file
 * @returns {Promise<string>} why it was not taken, or ""
 */
async function addText(file) {
  if (file.size > MOST_BYTES)
    return `${file.name} has more than ${MOST_BYTES / 1024} KiB; take a part of it.`;
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    text = "\0";
  }
  if (text.includes("\0")) return `${file.name} is not a text in UTF-8.`;
  const words = byId("words");
  const fence = "`".repeat(
    Math.max(3, ...[...text.matchAll(/`+/g)].map(([ticks]) => ticks.length + 1)),
  );
  const ending = file.name.split(".").at(-1);
  words.value = `${words.value}${words.value ? "\n\n" : ""}${file.name}:\n${fence}${ending}\n${text.trimEnd()}\n${fence}\n`;
  words.dispatchEvent(new Event("input"));
  words.focus();
  announce(`${file.name} is in the message.`);
  return "";
}
