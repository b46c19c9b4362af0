// Two answers, one choice: stored pairs or fresh answers, into the preference database.

import { byId, element, json, notice } from "/static/api.js";
import { denied } from "/static/experts.js";

let pair = null; // {id, prompt, answers}; id null: fresh answers
let seen = 0;

export function setUp(model) {
  byId("next").addEventListener("click", next);
  byId("skip").addEventListener("click", next);
  byId("compare").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(model).catch((error) => notice(error.message));
  });
  for (const choice of [0, 1]) byId(`answer-${choice}`).addEventListener("click", () => choose(choice));
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    if (typing || event.ctrlKey || event.metaKey || byId("review").hidden || byId("pair").hidden) return;
    if (event.key === "1" || event.key === "2") choose(Number(event.key) - 1);
    if (event.key === "s") next();
  });
}

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

async function ask(model) {
  const prompt = [{ role: "user", content: byId("question").value }];
  const body = { model, messages: prompt, n: 2, temperature: 1, max_tokens: 200, experts: { deny: denied() } };
  const { choices } = await json("POST", "/v1/chat/completions", body);
  show({ id: null, prompt, answers: choices.map((choice) => choice.message.content) });
}

function show(given) {
  pair = given;
  byId("pair").hidden = !pair;
  byId("pair-none").hidden = Boolean(pair);
  if (!pair) return;
  const turns = pair.prompt.map(({ role, content }) => element("p", {}, element("span", { className: "quiet", textContent: `${role}  ` }), content));
  byId("pair-prompt").replaceChildren(...turns);
  for (const choice of [0, 1]) byId(`answer-${choice}`).querySelector(".text").textContent = pair.answers[choice];
  byId("answer-0").focus();
}

async function choose(choice) {
  try {
    if (pair.id === null) {
      await json("POST", "/v1/preferences", { prompt: pair.prompt, chosen: pair.answers[choice], rejected: pair.answers[1 - choice] });
    } else await json("POST", `/v1/preferences/${pair.id}`, { choice });
    notice("");
    await next();
  } catch (error) {
    notice(error.message);
  }
}
