// Conversations, kept in this browser alone: one entry of its storage each.

import { lasting, ofTab } from "/static/storage.js";

/**
 * A token of an answer: its text, and the expert that wrote it, or null for the base.
 * @typedef {[string, string | null]} Token
 *
 * @typedef {object} Answer
 * @property {string} model the model that was asked
 * @property {object} experts field `experts` of the request
 * @property {object} sampling sampling fields of the request, the seed included
 * @property {string} system system prompt of the request
 * @property {Token[]} tokens
 * @property {string} finish "stop", "length", "stopped" by the user, or "failed"
 * @property {Record<string, number>} counts tokens of each expert, of the base under ""
 * @property {Record<string, string>} digests digest of each expert's pack
 * @property {number} rate tokens a second, without the time to the first one; 0: unknown
 * @property {number} used tokens of the context that prompt and answer fill; 0: unknown
 * @property {{model: string, tokens: Token[]}} [rival] the answer that it was compared with
 *
 * @typedef {object} Turn
 * @property {"chat" | "text"} kind whether the words are a message, or the beginning of a text
 * @property {string} question
 * @property {Answer} answer
 *
 * @typedef {object} Conversation
 * @property {string} id
 * @property {number} changed milliseconds since 1970
 * @property {string} model "" for the server's base
 * @property {string[]} denied experts that are switched off
 * @property {string[]} added experts that are switched on though the server does not arm them
 * @property {Turn[]} turns
 */

const PREFIX = "chat:";
/** Ids of conversations that were deleted: an answer that is still written must not bring them back. */
const removed = new Set();
const CURRENT = "current chat";

/** @returns {Conversation} */
export const fresh = () => ({
  id: `${Date.now()}-${crypto.getRandomValues(new Uint32Array(1))[0]}`,
  changed: Date.now(),
  model: "",
  denied: [],
  added: [],
  turns: [],
});

/** @param {Answer} answer */
export const textOf = (answer) => answer.tokens.map(([text]) => text).join("");

/** The first words of a conversation. @param {Conversation} conversation */
export function title(conversation) {
  const words = conversation.turns[0]?.question.trim().replace(/\s+/g, " ") ?? "";
  return words.length > 60 ? `${words.slice(0, 59)}…` : words || "New chat";
}

/**
 * Hear of conversations that other tabs have changed or deleted.
 * @param {(id: string, found: Conversation | null) => void} tell
 */
export function listen(tell) {
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(PREFIX)) return;
    const id = key.slice(PREFIX.length);
    if (newValue === null) removed.add(id);
    else removed.delete(id);
    tell(id, read(id));
  });
}

/** A conversation as it is kept. @param {string} id @returns {Conversation | null} */
export function read(id) {
  try {
    const found = JSON.parse(lasting.read(PREFIX + id) ?? "null");
    return Array.isArray(found?.turns) ? { ...fresh(), ...found } : null;
  } catch {
    return null;
  }
}

/** All kept conversations, the latest first. */
export function all() {
  const keys = lasting.keys().filter((key) => key.startsWith(PREFIX));
  return keys
    .map((key) => read(key.slice(PREFIX.length)))
    .filter(Boolean)
    .sort((a, b) => b.changed - a.changed);
}

/** Conversations in which all words of a search occur. @param {string} wanted */
export function search(wanted) {
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  return all().filter((conversation) => {
    const said = conversation.turns.flatMap((turn) => [turn.question, textOf(turn.answer)]);
    const text = said.join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

/** The conversation that was open last, in this tab before others, or a new one. */
export const current = () => read(ofTab.read(CURRENT) ?? lasting.read(CURRENT) ?? "") ?? fresh();

/** Remember which conversation is open. @param {Conversation} conversation */
export function open(conversation) {
  try {
    ofTab.write(CURRENT, conversation.id);
    lasting.write(CURRENT, conversation.id);
  } catch {
    // The storage is full, which matters when a conversation is kept and is told then.
  }
}

/**
 * Keep a conversation. One without a turn is not worth keeping.
 * @param {Conversation} conversation
 */
export function keep(conversation) {
  if (removed.has(conversation.id)) return;
  if (!conversation.turns.length) return forget(conversation.id);
  conversation.changed = Date.now();
  try {
    lasting.write(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch {
    throw new Error(
      "The browser's storage for this page is full; export old chats and delete them.",
    );
  }
}

/** @param {string} id */
const forget = (id) => lasting.remove(PREFIX + id);

/** Delete a conversation for good. @param {string} id */
export function remove(id) {
  removed.add(id);
  forget(id);
}

/**
 * Messages of the turns before `end`, as requests have them.
 * @param {Conversation} conversation
 * @param {number} [end]
 */
export const messages = (conversation, end = conversation.turns.length) =>
  conversation.turns
    .slice(0, end)
    .filter((turn) => textOf(turn.answer))
    .flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: textOf(turn.answer) },
    ]);

/** All conversations with an answer as JSONL, a format that `deepseek expert train` reads. */
export const asJsonLines = () =>
  all()
    .map((conversation) => messages(conversation))
    .filter((said) => said.length)
    .map((said) => `${JSON.stringify({ messages: said })}\n`)
    .join("");
