// Which folder below the teach root to learn from, and how much text it holds.

import { json } from "/static/api.js";
import { byId, button, element, notice } from "/static/dom.js";

const BYTES_A_TOKEN = 4; // of prose and code, roughly

/**
 * @typedef {object} Folder
 * @property {string} path
 * @property {boolean} repository whether it has a git history
 * @property {{name: string, repository: boolean}[]} folders
 * @property {number} files
 * @property {number} bytes
 * @property {boolean} complete whether all files could be counted
 */

/** @param {(folder: Folder) => void} chosen called with the folder that is shown */
export async function setUp(chosen) {
  const open = async (path) => {
    try {
      const folder = await json("GET", `/v1/teach/folders?path=${encodeURIComponent(path)}`);
      notice("");
      show(folder, open);
      chosen(folder);
    } catch (error) {
      notice(error.message);
    }
  };
  byId("lesson-path").addEventListener("change", () => open(byId("lesson-path").value || "."));
  await open(byId("lesson-path").value);
}

/** @param {Folder} folder @param {(path: string) => void} open */
function show(folder, open) {
  const focused = byId("folders").contains(document.activeElement);
  const inside = (name) => (folder.path === "." ? name : `${folder.path}/${name}`);
  const up = folder.path.includes("/") ? folder.path.slice(0, folder.path.lastIndexOf("/")) : ".";
  const above =
    folder.path === "."
      ? []
      : [button("↑ Up", () => open(up), { "aria-label": "To the folder above" })];
  const rows = folder.folders.map(({ name, repository }) =>
    button(`${name}/${repository ? " (git)" : ""}`, () => open(inside(name))),
  );
  byId("folders").replaceChildren(...[...above, ...rows].map((one) => element("li", {}, one)));
  byId("lesson-path").value = folder.path;
  byId("folder-size").textContent = size(folder);
  if (focused) (byId("folders").querySelector("button") ?? byId("lesson-path")).focus();
}

function size({ files, bytes, complete, repository }) {
  const tokens = Math.round(bytes / BYTES_A_TOKEN / 1000);
  const least = complete ? "" : "more than ";
  const git = repository ? " It has a git history, from which commits can be learned too." : "";
  const megabytes = (bytes / 1e6).toFixed(bytes < 1e6 ? 2 : 1);
  return `${least}${files.toLocaleString("en")} files, ${megabytes} MB, about ${tokens.toLocaleString("en")} thousand tokens.${git}`;
}
