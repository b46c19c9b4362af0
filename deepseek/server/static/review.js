// Two answers, one choice: stored pairs or fresh answers, into the preference database.

import { json } from "/static/api.js";
import { choice, modelOf } from "/static/experts.js";
import { conversation } from "/static/chat.js";
import { byId, element, notice } from "/static/dom.js";

/** @typedef {{id: number | null, prompt: {role: string, content: string}[], answers: string[]}} Pair `id` null: fresh answers */

/** @type {Pair | null} */
let pair = null;
let seen = 0;

export function setUp(me) {
  byId("tab-review").hidden = !me.admin; // pairs are of everyone's prompts and answers
  byId("next").addEventListener("click", next);
  byId("skip").addEventListener("click", next);
  byId("compare").addEventListener("submit", (event) => {
    event.preventDefault();
    ask().catch((error) => notice(error.message));
  });
  for (const number of [0, 1])
    byId(`answer-${number}`).addEventListener("click", () => choose(number));
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    if (event.repeat || typing || event.ctrlKey || event.metaKey || byId("review").hidden || byId("pair").hidden)
      return;
    if (event.key === "1" || event.key === "2") choose(Number(event.key) - 1);
    if (event.key === "s") next();
  });
}

/** Show the next stored pair. */
export async function next() {
  try {
    const told = await json("GET", `/v1/preferences?after=${seen}`);
    byId("review-count").textContent = `${told.reviewed} of ${told.pairs} pairs reviewed.`;
    seen = told.pair?.id ?? 0;
    show(told.pair);
  } catch (error) {
    notice(error.message);
  }
}

async function ask() {
  const prompt = [{ role: "user", content: byId("question").value }];
  const model = modelOf(conversation);
  const experts = model.includes("+") ? {} : { experts: choice(conversation) };
  const { choices } = await json("POST", "/v1/chat/completions", {
    model,
    messages: prompt,
    n: 2,
    temperature: 1,
    max_tokens: 200,
    ...experts,
  });
  show({ id: null, prompt, answers: choices.map((one) => one.message.content) });
}

/** @param {Pair | null} given */
function show(given) {
  pair = given;
  byId("pair").hidden = !pair;
  byId("pair-none").hidden = Boolean(pair);
  if (!pair) return;
  const turns = pair.prompt.map(({ role, content }) =>
    element("p", {}, element("span", { className: "quiet", textContent: `${role}  ` }), content),
  );
  byId("pair-prompt").replaceChildren(...turns);
  for (const number of [0, 1])
    byId(`answer-${number}`).querySelector(".text").textContent = pair.answers[number];
  byId("answer-0").focus({ preventScroll: true });
}

async function choose(number) {
  const chosen = pair;
  if (!chosen) return; // it is being stored
  pair = null;
  try {
    if (chosen.id === null) {
      await json("POST", "/v1/preferences", {
        prompt: chosen.prompt,
        chosen: chosen.answers[number],
        rejected: chosen.answers[1 - number],
      });
    } else await json("POST", `/v1/preferences/${chosen.id}`, { choice: number });
    notice("");
    await next();
  } catch (error) {
    pair = chosen;
    notice(error.message);
  }
}
