// The list of kept conversations: open, search, delete, export.

import * as chat from "/static/chat.js";
import * as store from "/static/conversations.js";
import { byId, download, button, element, refill } from "/static/dom.js";

export function setUp() {
  byId("search").addEventListener("input", showHistory);
  byId("export").addEventListener("click", () =>
    download("conversations.jsonl", store.asJsonLines()),
  );
}

export function showHistory() {
  const wanted = byId("search").value;
  const found = store.search(wanted);
  refill(byId("chat-list"), found.map(row));
  byId("chat-count").textContent = String(store.all().length || "");
  byId("export").disabled = !store.all().length;
  byId("chat-none").hidden = Boolean(found.length);
  byId("chat-none").textContent = wanted
    ? "No chat has these words."
    : "Chats are kept in this browser.";
}

function row(conversation) {
  // An answer may have been added since the list was made.
  const open = () => chat.show(store.read(conversation.id) ?? conversation);
  const title = button(store.title(conversation), open, { className: "plain chosen", dir: "auto" });
  if (conversation.id === chat.conversation.id) title.setAttribute("aria-current", "true");
  const away = button("×", () => drop(conversation), {
    className: "plain small",
    "aria-label": `Delete the chat: ${store.title(conversation)}`,
  });
  return element("li", {}, title, away);
}

function drop(conversation) {
  store.remove(conversation.id);
  if (conversation.id === chat.conversation.id) chat.show(store.fresh());
  else showHistory();
  byId("search").focus();
}
