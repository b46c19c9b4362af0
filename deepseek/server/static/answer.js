// How one turn of a conversation looks: question, answer, legend, buttons.

import { legend, marker } from "/static/attribution.js";
import { comparison } from "/static/compare.js";
import { textOf } from "/static/conversations.js";
import { button, composing, copy, element } from "/static/dom.js";
import { render } from "/static/markdown.js";

/** @typedef {import("/static/conversations.js").Answer} Answer */
/** @typedef {import("/static/conversations.js").Turn} Turn */

/**
 * What can be done with a turn.
 * @typedef {object} Actions
 * @property {() => void} [retry]
 * @property {(text: string) => void} [edit]
 * @property {() => void} [proceed] write on where the answer was cut
 * @property {() => void} [compare]
 */

/**
 * Make the elements of a turn.
 * @param {Turn} turn
 * @param {Actions} actions
 */
export function turnElement(turn, actions) {
  const question = element(
    "div",
    { className: "turn user" },
    element("h3", { className: "who", textContent: "You" }),
  );
  showQuestion(question, turn, actions.edit);
  const answer = element(
    "div",
    { className: "turn assistant" },
    element("h3", { className: "who", textContent: turn.answer.model }),
    element("div", { className: "said" }),
  );
  const made = element("div", { className: "exchange" }, question, answer);
  showAnswer(made, turn);
  if (turn.answer.finish) answer.append(...foot(turn, actions));
  if (turn.answer.rival) answer.append(comparison(turn.answer, turn.answer.rival, true));
  return made;
}

/**
 * Show the answer as far as it is.
 * @param {any} exchange made by `turnElement`
 * @param {Turn} turn
 */
export function showAnswer(exchange, turn) {
  const said = exchange.querySelector(".assistant .said");
  const { tokens, digests, finish } = turn.answer;
  const mark = marker(tokens, digests);
  const text = textOf(turn.answer);
  said.classList.toggle("waiting", !text && !finish);
  said.classList.toggle("raw", turn.kind === "text");
  said.replaceChildren(...(turn.kind === "text" ? mark(0, text.length) : [render(text, mark)]));
}

function showQuestion(place, turn, edit) {
  const words = { className: "said", dir: "auto", textContent: turn.question };
  const text = { ...words, tabIndex: 0, role: "group", "aria-label": "Beginning of a text" };
  const said = turn.kind === "text" ? element("pre", text) : element("div", words);
  place.append(said);
  if (!edit) return;
  const open = button("Edit", () => editor(place, said, open, edit), { className: "plain small" });
  place.append(open);
}

/** Put a field in place of a question, until it is sent or given up. */
function editor(place, said, open, edit) {
  const field = element("textarea", {
    value: said.textContent,
    dir: "auto",
    "aria-label": "Edit the message",
  });
  const close = () => {
    form.replaceWith(said, open);
    open.focus();
  };
  const form = element(
    "form",
    { className: "editor" },
    field,
    element(
      "div",
      { className: "row" },
      element("span", { className: "space" }),
      button("Cancel", close),
      element("button", { type: "submit", className: "main", textContent: "Send" }),
    ),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) edit(field.value);
  });
  field.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (event.key === "Escape") close();
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    form.requestSubmit();
  });
  open.remove();
  said.replaceWith(form);
  field.focus();
}

/**
 * Open the field in which the question of a turn is edited.
 * @param {any} exchange made by `turnElement`
 * @param {string} text what the field holds
 */
export function openEditor(exchange, text) {
  exchange.querySelector(".user > button").click();
  const field = exchange.querySelector(".editor textarea");
  field.value = text;
  return field;
}

/** The number of tokens of an answer, as the server counted them. @param {Answer} answer */
const tokensOf = (answer) => Object.values(answer.counts).reduce((sum, count) => sum + count, 0);

function foot(turn, actions) {
  const { answer } = turn;
  const told = [legend(answer)];
  if (!answer.tokens.length) told.push(element("span", { textContent: "an empty answer" }));
  if (answer.rate)
    told.push(
      element("span", { textContent: `${answer.rate.toFixed(answer.rate < 10 ? 1 : 0)} tokens/s` }),
    );
  if (answer.finish === "length")
    told.push(
      element("span", {
        className: "cut",
        textContent: `cut at ${tokensOf(answer)} tokens`,
      }),
    );
  if (answer.finish === "failed")
    told.push(element("span", { className: "failed", textContent: "broken off" }));
  if (answer.finish === "stopped") told.push(element("span", { textContent: "stopped" }));
  const small = { className: "plain small" };
  const buttons = [
    button("Copy", () => copy(textOf(answer)), { ...small, "aria-label": "Copy the answer" }),
  ];
  if (actions.retry) buttons.push(button("Retry", actions.retry, small));
  if (actions.proceed && answer.finish !== "stop")
    buttons.push(button("Continue", actions.proceed, small));
  if (actions.compare && !answer.rival)
    buttons.push(button("Compare with base", actions.compare, small));
  return [
    element("div", { className: "facts" }, ...told),
    element("div", { className: "actions", role: "group", "aria-label": "Answer" }, ...buttons),
  ];
}
