// An empty conversation: prompts that the armed experts answer better than the base.

import { json } from "/static/api.js";
import { dot } from "/static/attribution.js";
import * as chat from "/static/chat.js";
import { button, element } from "/static/dom.js";
import { armed, base, showChoice } from "/static/experts.js";

/**
 * @typedef {object} Prompt
 * @property {"chat" | "text"} kind
 * @property {string} text
 */

/** @type {Map<string, Prompt[]>} */
const known = new Map(); // digest of a pack -> its prompts

/** Ask the server again for an expert's prompts. @param {string} digest */
export const forget = (digest) => known.delete(digest);

/**
 * Fill an empty conversation.
 * @param {HTMLElement} log
 * @param {(question: string, kind: "chat" | "text") => void} ask
 */
export async function showExamples(log, ask) {
  const place = element(
    "div",
    { className: "empty" },
    element("p", {
      textContent:
        "Ask something. Words that an expert wrote are underlined in its colour; the rest is the base model's.",
    }),
  );
  log.replaceChildren(place);
  for (const info of armed()) {
    const prompts = await promptsOf(info);
    if (!prompts.length) continue;
    if (!place.isConnected) return; // a question was asked meanwhile
    const start = (prompt) => {
      chat.conversation.model = `${base()}+${info.name}`;
      showChoice(chat.conversation);
      ask(prompt.text, prompt.kind);
    };
    place.append(
      element(
        "section",
        { className: "examples", "aria-label": `Prompts for ${info.name}` },
        element("h3", {}, dot(info.digest), `${info.name} knows this, the base does not`),
        ...prompts.map((prompt) => chip(prompt, () => start(prompt))),
      ),
    );
  }
}

/** @param {Prompt} prompt @param {() => void} act */
function chip(prompt, act) {
  if (prompt.kind === "chat") return button(prompt.text, act, { className: "example", dir: "auto" });
  const lines = prompt.text.trimEnd().split("\n");
  const made = button("Continue ", act, {
    className: "example",
    "aria-label": `Continue the text: ${lines.at(-1)}`,
  });
  made.append(element("code", { textContent: lines.slice(-2).join("\n") }));
  return made;
}

/** @returns {Promise<Prompt[]>} */
async function promptsOf(info) {
  if (!known.has(info.digest)) {
    const { prompts } = await json("GET", `/v1/experts/${info.name}/prompts`).catch(() => ({
      prompts: [],
    }));
    known.set(info.digest, prompts);
  }
  return known.get(info.digest);
}
