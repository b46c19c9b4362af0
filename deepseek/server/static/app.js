// The page: whose server this is, tabs, and the parts in order.

import { json } from "/static/api.js";
import * as chat from "/static/chat.js";
import { byId, notice } from "/static/dom.js";
import * as experts from "/static/experts.js";
import * as files from "/static/files.js";
import * as history from "/static/history.js";
import * as review from "/static/review.js";
import * as settings from "/static/settings.js";
import * as teach from "/static/teach.js";

function select(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  teach.attend();
  if (tab.id === "tab-review" && byId("pair").hidden) review.next();
}

function setUpTabs() {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const tabs = [...document.querySelectorAll("[role=tab]:not([hidden])")];
      const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
      select(next);
      next.focus();
    });
  }
}

/** Ask until there is an answer: the model may still be loaded. @param {() => Promise<any>} ask */
async function patiently(ask) {
  while (true) {
    try {
      const told = await ask();
      notice("");
      return told;
    } catch (error) {
      notice(error.message);
      await new Promise((wake) => setTimeout(wake, 1000));
    }
  }
}

// No form is for the browser to send: that would load the page anew and lose what was typed.
addEventListener("submit", (event) => {
  if (event.target.getAttribute("method") !== "dialog") event.preventDefault();
});
settings.setUp();
setUpTabs();
chat.setUp();
const me = await patiently(() => json("GET", "/v1/me"));
byId("model").textContent = me.model;
byId("model").title = me.licence;
experts.setUp(me);
await patiently(experts.load);
history.setUp();
chat.begin();
files.setUp();
review.setUp(me);
await teach.setUp(me).catch((error) => notice(error.message));
// A reader who already types elsewhere keeps the focus.
if (document.activeElement === document.body) byId("words").focus();
