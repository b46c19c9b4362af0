// Two answers, one choice: stored pairs or fresh answers, into the preference database.

import { json } from "/static/api.js";
import { choice, modelOf } from "/static/experts.js";
import { conversation } from "/static/chat.js";
import { byId, element, notice } from "/static/dom.js";

/** @typedef {{id: number | null, prompt: {role: string, content: string}[], answers: string[]}} Pair `id` null: fresh answers */

/** @type {Pair | null} */
let pair = null;
let seen = 0;
let busy = false;

export function setUp(me) {
  byId("tab-review").hidden = !me.admin; // pairs are of everyone's prompts and answers
  byId("next").addEventListener("click", next);
  byId("skip").addEventListener("click", next);
  byId("compare").addEventListener("submit", (event) => {
    event.preventDefault();
    alone(ask);
  });
  for (const number of [0, 1])
    byId(`answer-${number}`).addEventListener("click", () => choose(number));
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    if (event.repeat || typing || event.ctrlKey || event.metaKey || byId("review").hidden || byId("pair").hidden)
      return;
    if (event.key === "1" || event.key === "2") choose(Number(event.key) - 1);
    if (event.key.toLowerCase() === "s") next();
  });
}

/**
 * Do one thing at a time: a late reply would put another pair under a reader who is choosing.
 * @param {() => Promise<void>} work
 */
async function alone(work) {
  if (busy) return;
  setBusy(true);
  try {
    await work();
  } catch (error) {
    notice(error.message);
  } finally {
    setBusy(false);
  }
}

// Buttons that are really disabled would lose the focus.
function setBusy(now) {
  busy = now;
  for (const one of byId("review").querySelectorAll("button"))
    one.setAttribute("aria-disabled", String(now));
}

/** Show the next stored pair. */
export const next = () => alone(load);

async function load() {
  const told = await json("GET", `/v1/preferences?after=${seen}`);
  byId("review-count").textContent = `${told.reviewed} of ${told.pairs} pairs reviewed.`;
  seen = told.pair?.id ?? 0;
  show(told.pair);
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
  notice("");
  show({ id: null, prompt, answers: choices.map((one) => one.message.content) });
}

/** @param {Pair | null} given */
function show(given) {
  pair = given;
  byId("pair").hidden = !pair;
  byId("pair-none").hidden = Boolean(pair);
  if (!pair) return;
  const turns = pair.prompt.map(({ role, content }) =>
    element(
      "p",
      {},
      element("span", { className: "quiet", textContent: `${role}  ` }),
      element("bdi", { textContent: content }),
    ),
  );
  byId("pair-prompt").replaceChildren(...turns);
  for (const number of [0, 1])
    byId(`answer-${number}`).querySelector(".text").textContent = pair.answers[number];
  byId("answer-0").focus({ preventScroll: true });
}

function choose(number) {
  const chosen = pair;
  if (!chosen) return;
  alone(async () => {
    await judge(chosen, number);
    notice("");
    await load();
  });
}

/** Store which answer of a pair is the better one. */
function judge({ id, prompt, answers }, number) {
  if (id !== null) return json("POST", `/v1/preferences/${id}`, { choice: number });
  const [chosen, rejected] = [answers[number], answers[1 - number]];
  return json("POST", "/v1/preferences", { prompt, chosen, rejected });
}
