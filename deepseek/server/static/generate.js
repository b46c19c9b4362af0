// One answer of the server: the request, and its tokens as they arrive.

import { events } from "/static/api.js";
import { messages, textOf } from "/static/conversations.js";
import { experts, refresh } from "/static/experts.js";
import { sampling, settings } from "/static/settings.js";

/** @typedef {import("/static/conversations.js").Answer} Answer */
/** @typedef {import("/static/conversations.js").Conversation} Conversation */
/** @typedef {import("/static/conversations.js").Turn} Turn */

/**
 * An answer that has no token yet.
 * @param {string} model
 * @param {object} choice field `experts` of the request
 * @returns {Answer}
 */
export const blank = (model, choice) => ({
  model,
  experts: choice,
  sampling: sampling(),
  system: settings.system.trim(),
  tokens: [],
  finish: "",
  counts: {},
  digests: {},
  rate: 0,
  used: 0,
});

/**
 * Ask for the answer of a conversation's turn, or for more of it, and add the tokens as they come.
 * @param {Conversation} conversation
 * @param {Turn} turn
 * @param {Answer} answer the turn's own, or another one to the same question
 * @param {AbortSignal} signal
 * @param {() => void} changed called after each token
 */
export async function generate(conversation, turn, answer, signal, changed) {
  const earlier = answer.counts;
  const begun = answer.tokens.length;
  const known = recogniser(answer, changed);
  let counted = false;
  let finished = false;
  let first = 0;
  let last = 0;
  answer.finish = "stopped"; // unless the server says otherwise
  try {
    for await (const chunk of events(
      "POST",
      path(turn),
      request(conversation, turn, answer),
      signal,
    )) {
      if (chunk.usage) {
        count(answer, chunk, earlier);
        counted = true;
      }
      const choice = chunk.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) {
        answer.finish = choice.finish_reason;
        finished = true;
      }
      const text = choice.delta ? choice.delta.content : choice.text;
      if (!text) continue;
      last = performance.now();
      first ||= last;
      answer.tokens.push([text, choice.expert ?? null]);
      known(choice.expert);
      changed();
    }
    if (!finished) throw new Error("The connection broke off before the answer was whole.");
  } catch (error) {
    if (error.name === "AbortError") return;
    answer.finish = "failed";
    throw error;
  } finally {
    const made = answer.tokens.length - begun;
    answer.rate = made > 1 && last > first ? (1000 * (made - 1)) / (last - first) : 0;
    if (!counted) recount(answer, earlier, begun);
    await Promise.all(Object.keys(answer.counts).map(known));
  }
}

/**
 * A function that notes the digest of an expert's pack, from which its colour follows, as soon as it
 * writes. The experts are asked for once if one is unknown: it was plugged after the page was opened.
 * @param {Answer} answer
 * @param {() => void} changed
 */
function recogniser(answer, changed) {
  /** @type {Promise<void> | null} */
  let asked = null;
  return async (name) => {
    if (!name || Object.hasOwn(answer.digests, name)) return;
    if (!experts.has(name)) await (asked ??= refresh().catch(() => {})); // without a colour, then
    if (!experts.has(name)) return;
    answer.digests[name] = experts.get(name).digest;
    changed();
  };
}

const path = (turn) => (turn.kind === "text" ? "/v1/completions" : "/v1/chat/completions");

function request(conversation, turn, answer) {
  const body = {
    model: answer.model,
    stream: true,
    stream_options: { include_usage: true },
    ...answer.sampling,
  };
  if (!/\+/.test(answer.model)) body.experts = answer.experts;
  const text = textOf(answer);
  if (turn.kind === "text") return { ...body, prompt: turn.question + text };
  const place = conversation.turns.indexOf(turn);
  const before = messages(conversation, place < 0 ? undefined : place);
  const system = answer.system ? [{ role: "system", content: answer.system }] : [];
  const begun = text ? [{ role: "assistant", content: text }] : [];
  return {
    ...body,
    messages: [...system, ...before, { role: "user", content: turn.question }, ...begun],
    ...(text ? { continue_final_message: true } : {}),
  };
}

// Tokens without a text of their own (parts of a character) count too, so the server's word goes over ours.
function count(answer, { usage, experts: written }, earlier) {
  const byExperts = Object.values(written).reduce((sum, tokens) => sum + tokens, 0);
  answer.counts = added(earlier, [
    ...Object.entries(written),
    ["", usage.completion_tokens - byExperts],
  ]);
  answer.used = usage.total_tokens;
}

/** Count the tokens from `begun` on ourselves: the server did not come to it. */
function recount(answer, earlier, begun) {
  const written = answer.tokens.slice(begun).map(([, expert]) => [expert ?? "", 1]);
  answer.counts = added(earlier, written);
}

/** Counts with others added. Nothing is inherited, for an expert may be named `constructor`. */
function added(earlier, more) {
  const counts = Object.assign(Object.create(null), earlier);
  for (const [name, tokens] of more) counts[name] = (counts[name] ?? 0) + tokens;
  return counts;
}
