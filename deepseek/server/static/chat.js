// The open conversation: ask, stop, try again, edit, write on, compare.

import { openEditor, showAnswer, turnElement } from "/static/answer.js";
import { announceOutcome, comparison, rivalOf } from "/static/compare.js";
import * as store from "/static/conversations.js";
import { announce, byId, composing, notice, refill } from "/static/dom.js";
import { showExamples } from "/static/examples.js";
import { choice, contextLength, modelOf, refresh, showChoice } from "/static/experts.js";
import { blank, generate } from "/static/generate.js";
import { showHistory } from "/static/history.js";
import { ofTab } from "/static/storage.js";

/** @typedef {import("/static/conversations.js").Conversation} Conversation */
/** @typedef {import("/static/conversations.js").Turn} Turn */

const DRAFT = "draft";
const KEEP_EVERY = 3000; // milliseconds between two times that a growing answer is kept
const NEAR = 40; // px above the end at which a reader still follows the answer
const MOST_SAID = 1500; // characters of an answer that a screen reader is given at once

/** @type {Conversation} */
export let conversation = store.current();
/** @type {AbortController | null} */
let running = null;
let follows = true;
/** Whether the server has told its models. */
let ready = false;
/** Whether the page is about to be left or loaded anew, which breaks off its answers. */
let leaving = false;

/** Listen to the composer. What is typed before `begin` waits in it. */
export function setUp() {
  const words = byId("words");
  words.value ||= ofTab.read(DRAFT) ?? ""; // some have begun to type
  words.addEventListener("input", () => draft(words.value));
  words.addEventListener("keydown", (event) => {
    if (composing(event) || event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    byId("ask").requestSubmit();
  });
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  addEventListener("keydown", (event) => {
    // Escape also closes the settings and the field in which a message is edited.
    const closes = byId("settings").open || event.target.closest?.(".editor");
    if (!composing(event) && event.key === "Escape" && !closes) running?.abort();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  addEventListener("beforeunload", () => (leaving = true));
}

/** Show the conversation, and let questions be asked. */
export function begin() {
  byId("fresh").addEventListener("click", () => show(store.fresh()));
  const log = byId("log");
  log.addEventListener(
    "scroll",
    () => (follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR),
  );
  store.listen(changedElsewhere);
  ready = true;
  byId("send").disabled = false;
  present();
}

/** Put words into the composer, and keep them over a reload. */
function draft(text) {
  if (byId("words").value !== text) byId("words").value = text;
  try {
    ofTab.write(DRAFT, text);
  } catch {
    // A text too long for the storage stays in the composer alone.
  }
}

/** Ask what was typed. Without an answer it goes back where it was typed. */
async function send() {
  const typed = byId("words").value;
  if (!ready || running || !typed.trim()) return;
  const asked = conversation;
  draft("");
  if (await ask(typed.trim(), "chat")) return;
  if (asked === conversation && !byId("words").value) draft(typed);
}

/** Open a conversation. The one that is open stays as it is, for it may be being answered. @param {Conversation} other */
export function show(other) {
  if (other.id === conversation.id) return;
  running?.abort();
  conversation = other;
  present();
}

function present() {
  store.open(conversation);
  follows = true;
  draw();
  showChoice(conversation);
  showHistory();
}

/** Take over what another tab has done to a conversation. */
function changedElsewhere(id, found) {
  if (id === conversation.id && !found) return show(store.fresh());
  if (id === conversation.id && !running) {
    conversation = found;
    draw();
    showChoice(conversation);
  }
  showHistory();
}

/** Keep a conversation, and show it in the list. */
export function keep(kept = conversation) {
  tryToKeep(kept);
  if (kept === conversation) store.open(kept);
  showHistory();
}

function tryToKeep(kept) {
  try {
    store.keep(kept);
  } catch (error) {
    notice(error.message);
  }
}

/** Draw the whole conversation anew. Messages that are being edited stay so. */
export function draw() {
  const log = byId("log");
  const editors = log.dataset.chat === conversation.id ? openEditors(log) : [];
  log.dataset.chat = conversation.id;
  const exchanges = conversation.turns.map((turn) => turnElement(turn, actions(turn)));
  refill(log, exchanges, true);
  for (const { place, text, selection } of editors) {
    if (!exchanges[place]) continue;
    const field = openEditor(exchanges[place], text);
    if (selection) field.setSelectionRange(...selection);
    else field.blur();
  }
  if (!conversation.turns.length) showExamples(log, ask);
  showContext();
  scroll();
}

/** The fields in which messages are edited, the one with the focus last. */
function openEditors(log) {
  const found = [...log.children].flatMap((exchange, place) => {
    const field = exchange.querySelector(".editor textarea");
    if (!field) return [];
    const focused = field === document.activeElement;
    const selection = focused ? [field.selectionStart, field.selectionEnd] : null;
    return [{ place, text: field.value, selection }];
  });
  return found.sort((a, b) => Number(Boolean(a.selection)) - Number(Boolean(b.selection)));
}

/**
 * Ask something in the open conversation.
 * @param {string} question
 * @param {"chat" | "text"} kind
 * @param {boolean} [again] whether kept turns make room for this one
 * @returns {Promise<boolean>} whether there is an answer
 */
export async function ask(question, kind, again = false) {
  if (running) return false;
  const turn = { kind, question, answer: blank(modelOf(conversation), choice(conversation)) };
  conversation.turns.push(turn);
  return answer(turn, again);
}

/**
 * Let a turn's answer be written, from where it is.
 * @param {Turn} turn
 * @param {boolean} [again] whether kept turns make room for this one
 * @returns {Promise<boolean>} whether there is an answer
 */
async function answer(turn, again = false) {
  const asked = conversation;
  const before = { ...turn.answer };
  const begun = turn.answer.tokens.length; // more than none if it goes on
  follows = true;
  turn.answer.finish = "";
  draw();
  announce("The answer is being written.");
  const exchange = byId("log").lastElementChild;
  // What is kept stays until there is something to put in its place.
  const worthKeeping = () => turn.answer.tokens.length > begun || !(again || begun);
  const failure = await run(
    (signal, paint) => {
      const changed = () => {
        delete turn.answer.rival; // it was compared with the answer as it was
        paint();
      };
      return keeping(asked, worthKeeping, generate(asked, turn, turn.answer, signal, changed));
    },
    () => {
      exchange.querySelector(".comparison")?.remove();
      showAnswer(exchange, turn);
    },
  );
  if (failure && leaving) turn.answer.finish = "stopped";
  const broken = failure || turn.answer.finish === "stopped";
  if (begun && broken && turn.answer.tokens.length === begun) Object.assign(turn.answer, before);
  const answered = turn.answer.tokens.length > 0 || turn.answer.finish === "stop";
  if (!answered && asked === conversation)
    asked.turns = asked.turns.filter((other) => other !== turn);
  if (answered || !again) keep(asked);
  // An expert may have been unplugged, or forbidden, since the page asked.
  if ([403, 404].includes(failure?.status)) await refresh().catch(() => {});
  if (asked !== conversation) return answered;
  draw();
  if (failure) notice(failure.message);
  else announce(store.textOf(turn.answer).slice(0, MOST_SAID) || "The answer is empty.");
  return answered;
}

/**
 * Keep a conversation at once and now and then while it is answered: a page may be closed, or break.
 * @param {Conversation} asked
 * @param {() => boolean} worthKeeping
 * @param {Promise<void>} written
 */
async function keeping(asked, worthKeeping, written) {
  const keepSoFar = () => {
    if (worthKeeping()) tryToKeep(asked);
  };
  const timer = setInterval(keepSoFar, KEEP_EVERY);
  addEventListener("pagehide", keepSoFar);
  keepSoFar();
  showHistory();
  try {
    await written;
  } finally {
    clearInterval(timer);
    removeEventListener("pagehide", keepSoFar);
  }
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
    retry: last ? () => again(turn) : undefined,
    proceed: last ? () => proceed(turn) : undefined,
    compare: () => compare(turn),
  };
}

/**
 * Ask a turn's question again, or another one in its place. If there is an answer, the turns after it
 * go; otherwise all is as it was, and the other question is still being edited.
 * @param {Turn} turn
 * @param {string} [edited]
 */
async function again(turn, edited) {
  if (running) return;
  const asked = conversation;
  const before = asked.turns;
  const place = before.indexOf(turn);
  if (edited !== undefined) byId("log").children[place].querySelector(".editor").remove();
  asked.turns = before.slice(0, place);
  if (await ask(edited ?? turn.question, turn.kind, true)) return;
  asked.turns = before;
  keep(asked);
  if (asked !== conversation) return;
  draw();
  if (edited !== undefined) openEditor(byId("log").children[place], edited);
}

function proceed(turn) {
  if (!running) answer(turn);
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
  const exchange = byId("log").children[conversation.turns.indexOf(turn)];
  const place = exchange.querySelector(".assistant");
  const paint = () => {
    place.querySelector(".comparison")?.remove();
    place.append(comparison(turn.answer, rival, false));
  };
  paint();
  announce("The base is being asked the same.");
  const failure = await run((signal, later) => generate(asked, turn, rival, signal, later), paint);
  // One that was stopped half way would look like an answer that differs.
  const whole = !failure && rival.finish !== "stopped" && rival.tokens.length > 0;
  if (whole) turn.answer.rival = rival;
  keep(asked);
  if (asked !== conversation) return;
  draw();
  if (failure) notice(failure.message);
  else if (whole) announceOutcome(turn.answer);
}

function showContext() {
  // An answer that was stopped has no count; that of the one before is the last known.
  const counted = conversation.turns.findLast((turn) => turn.answer.used);
  byId("context").parentElement.hidden = conversation.turns.length > 0 && !counted;
  const used = counted?.answer.used ?? 0;
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
  const [shown, hidden] = controller ? ["stop", "send"] : ["send", "stop"];
  const focused = document.activeElement === byId(hidden);
  byId(shown).hidden = false;
  byId(hidden).hidden = true;
  if (focused) byId(shown).focus();
  byId("log").setAttribute("aria-busy", String(Boolean(controller)));
}
