// The open conversation: ask, stop, try again, edit, write on, compare.

import { showAnswer, turnElement } from "/static/answer.js";
import { announceOutcome, comparison, rivalOf } from "/static/compare.js";
import * as store from "/static/conversations.js";
import { announce, byId, notice } from "/static/dom.js";
import { showExamples } from "/static/examples.js";
import { choice, contextLength, modelOf, showChoice } from "/static/experts.js";
import { blank, generate } from "/static/generate.js";
import { showHistory } from "/static/history.js";

/** @typedef {import("/static/conversations.js").Conversation} Conversation */
/** @typedef {import("/static/conversations.js").Turn} Turn */

const DRAFT = "draft";
const NEAR = 40; // px above the end at which a reader still follows the answer
const MOST_SAID = 1500; // characters of an answer that a screen reader is given at once

/** @type {Conversation} */
export let conversation = store.current();
/** @type {AbortController | null} */
let running = null;
let follows = true;

export function setUp() {
  const words = byId("words");
  words.value = sessionStorage.getItem(DRAFT) ?? "";
  words.addEventListener("input", () => sessionStorage.setItem(DRAFT, words.value));
  words.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("ask").requestSubmit();
  });
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && words.value.trim()) ask(words.value.trim(), "chat");
  });
  addEventListener("keydown", (event) => {
    // Escape also closes the settings and the field in which a message is edited.
    const closes = byId("settings").open || event.target.closest?.(".editor");
    if (event.key === "Escape" && !closes) running?.abort();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("fresh").addEventListener("click", () => show(store.fresh()));
  const log = byId("log");
  log.addEventListener(
    "scroll",
    () => (follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR),
  );
  show(conversation);
}

/** Open a conversation. @param {Conversation} other */
export function show(other) {
  running?.abort();
  conversation = other;
  store.open(conversation);
  follows = true;
  draw();
  showChoice(conversation);
  showHistory();
}

/** Keep what was chosen for the open conversation. */
export function keep() {
  try {
    store.keep(conversation);
    store.open(conversation);
  } catch (error) {
    notice(error.message);
  }
  showHistory();
}

/** Draw the whole conversation anew. */
export function draw() {
  byId("log").replaceChildren(
    ...conversation.turns.map((turn) => turnElement(turn, actions(turn))),
  );
  if (!conversation.turns.length) showExamples(byId("log"), ask);
  showContext();
  scroll();
}

/**
 * Ask something in the open conversation.
 * @param {string} question
 * @param {"chat" | "text"} kind
 * @returns {Promise<boolean>} whether there is an answer
 */
export async function ask(question, kind) {
  if (running) return false;
  const turn = { kind, question, answer: blank(modelOf(conversation), choice(conversation)) };
  conversation.turns.push(turn);
  byId("words").value = "";
  sessionStorage.removeItem(DRAFT);
  return answer(turn);
}

/**
 * Let a turn's answer be written, from where it is.
 * @param {Turn} turn
 * @returns {Promise<boolean>} whether there is an answer
 */
async function answer(turn) {
  const asked = conversation;
  follows = true;
  turn.answer.finish = ""; // also of one that goes on
  draw();
  announce("The answer is being written.");
  const exchange = byId("log").lastElementChild;
  const failure = await run(
    (signal, paint) => generate(asked, turn, turn.answer, signal, paint),
    () => showAnswer(exchange, turn),
  );
  const answered = turn.answer.tokens.length > 0 || turn.answer.finish === "stop";
  if (!answered) giveBack(asked, turn);
  if (asked !== conversation) {
    store.keep(asked);
    return answered;
  }
  keep();
  draw();
  if (failure) notice(failure.message);
  else announce(store.textOf(turn.answer).slice(0, MOST_SAID) || "The answer is empty.");
  return answered;
}

/** A question that got no answer leaves the conversation, and its words go back where they were typed. */
function giveBack(asked, turn) {
  asked.turns = asked.turns.filter((other) => other !== turn);
  if (asked !== conversation || turn.kind !== "chat" || byId("words").value) return;
  byId("words").value = turn.question;
  sessionStorage.setItem(DRAFT, turn.question);
}

/**
 * Run a generation, which can be stopped, and paint at most once a frame.
 * @param {(signal: AbortSignal, paint: () => void) => Promise<void>} work
 * @param {() => void} paint
 * @returns {Promise<Error | null>} why it failed
 */
async function run(work, paint) {
  const controller = new AbortController();
  let frame = 0;
  const later = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      paint();
      scroll();
    });
  };
  busy(controller);
  notice("");
  try {
    await work(controller.signal, later);
    return null;
  } catch (error) {
    return error;
  } finally {
    cancelAnimationFrame(frame);
    if (running === controller) busy(null);
  }
}

/** @param {Turn} turn */
function actions(turn) {
  const last = turn === conversation.turns.at(-1);
  return {
    edit: (text) => again(turn, text),
    retry: last ? () => again(turn, turn.question) : undefined,
    proceed: last ? () => proceed(turn) : undefined,
    compare: () => compare(turn),
  };
}

/** Ask a turn's question again, or another one in its place. If there is an answer, the turns after it go. */
async function again(turn, question) {
  if (running) return;
  const asked = conversation;
  const before = asked.turns;
  asked.turns = before.slice(0, before.indexOf(turn));
  if (await ask(question, turn.kind)) return;
  asked.turns = before;
  store.keep(asked);
  if (asked === conversation) draw();
}

function proceed(turn) {
  if (running) return;
  delete turn.answer.rival;
  answer(turn);
}

/** Let the base answer the same question. @param {Turn} turn */
async function compare(turn) {
  if (running) return;
  const asked = conversation;
  const tokens = Math.max(turn.answer.sampling.max_tokens, turn.answer.tokens.length);
  const rival = {
    ...blank(rivalOf(turn.answer.model), {}),
    system: turn.answer.system,
    sampling: { ...turn.answer.sampling, max_tokens: tokens },
  };
  turn.answer.rival = rival;
  const exchange = byId("log").children[conversation.turns.indexOf(turn)];
  const place = exchange.querySelector(".assistant");
  const paint = (whole = false) => {
    place.querySelector(".comparison")?.remove();
    place.append(comparison(turn.answer, whole));
  };
  paint();
  announce("The base is being asked the same.");
  const failure = await run((signal, later) => generate(asked, turn, rival, signal, later), paint);
  if (failure || !rival.tokens.length) delete turn.answer.rival;
  if (asked !== conversation) return store.keep(asked);
  keep();
  draw();
  if (failure) notice(failure.message);
  else if (turn.answer.rival) announceOutcome(turn.answer);
}

function showContext() {
  const used = conversation.turns.at(-1)?.answer.used ?? 0;
  const most = contextLength();
  Object.assign(byId("context"), { max: most, high: most * 0.85, optimum: 0, value: used });
  byId("context-text").textContent =
    `${used.toLocaleString("en")} of ${most.toLocaleString("en")} tokens`;
}

function scroll() {
  const log = byId("log");
  if (follows && conversation.turns.length) log.scrollTop = log.scrollHeight;
}

function busy(controller) {
  running = controller;
  byId("stop").hidden = !controller;
  byId("send").hidden = Boolean(controller);
  byId("log").setAttribute("aria-busy", String(Boolean(controller)));
}
