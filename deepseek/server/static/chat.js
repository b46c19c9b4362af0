// The conversation: streamed, each token in the colour of the expert that spoke.

import { byId, element, events } from "/static/api.js";
import { colour, denied } from "/static/experts.js";

let messages = [];
let running = null;

export function setUp(model) {
  const words = byId("words");
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && words.value.trim()) answer(model);
  });
  words.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  byId("stop").addEventListener("click", () => running?.abort());
  byId("fresh").addEventListener("click", () => {
    running?.abort();
    messages = [];
    byId("log").replaceChildren();
    words.focus();
  });
}

function turn(role, name) {
  const said = element("div", { className: "said" });
  const made = element("div", { className: `turn ${role}` }, element("div", { className: "who", textContent: name }), said);
  byId("log").querySelector(".empty")?.remove();
  byId("log").append(made);
  return { made, said };
}

async function answer(model) {
  const text = byId("words").value.trim();
  byId("words").value = "";
  const asked = { role: "user", content: text };
  turn("user", "you").said.textContent = text;
  const { made, said } = turn("assistant", model);
  let spoken = new Map();
  let whole = "";
  busy(new AbortController());
  try {
    const body = {
      model, messages: [...messages, asked], stream: true, stream_options: { include_usage: true }, experts: { deny: denied() },
      temperature: Number(byId("temperature").value), max_tokens: Number(byId("tokens").value),
    };
    for await (const chunk of events("POST", "/v1/chat/completions", body, running.signal)) {
      if (chunk.usage) spoken = counted(chunk);
      const [choice] = chunk.choices;
      const piece = choice?.delta.content;
      if (!piece) continue;
      whole += piece;
      spoken.set(choice.expert, (spoken.get(choice.expert) ?? 0) + 1);
      say(said, piece, choice.expert);
    }
  } catch (error) {
    if (error.name !== "AbortError") made.append(element("p", { className: "failed", textContent: error.message }));
  }
  messages.push(asked, { role: "assistant", content: whole });
  made.append(legend(spoken));
  busy(null);
}

// Tokens without a text of their own (parts of a character) count too, so the server's word goes over ours.
function counted({ usage, experts }) {
  const byExperts = Object.values(experts).reduce((sum, count) => sum + count, 0);
  return new Map([...Object.entries(experts), [null, usage.completion_tokens - byExperts]].filter(([, count]) => count));
}

function say(said, piece, expert) {
  const log = byId("log");
  const following = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const name = expert ?? "";
  if (said.lastElementChild?.dataset.expert === name) said.lastElementChild.append(piece);
  else {
    const span = element("span", { textContent: piece, className: expert ? colour(expert) : "", title: expert ?? "base model" });
    span.dataset.expert = name;
    said.append(span);
  }
  if (following) log.scrollTop = log.scrollHeight;
}

function legend(spoken) {
  const rows = [...spoken].sort((a, b) => b[1] - a[1]).map(([expert, count]) =>
    element(
      "span", {}, element("span", { className: `dot ${expert ? colour(expert) : ""}` }),
      `${expert ?? "base"} ${count} ${count === 1 ? "token" : "tokens"}`,
    ));
  return element("div", { className: "legend" }, ...rows);
}

function busy(controller) {
  running = controller;
  byId("stop").hidden = !controller;
  byId("send").disabled = Boolean(controller);
}
