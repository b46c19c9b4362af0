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
  if (tab.id === "tab-review" && byId("pair").hidden) review.next();
}

function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(place + step + tabs.length) % tabs.length];
      select(next);
      next.focus();
    });
  });
}

async function whoAmI() {
  while (true) {
    try {
      return await json("GET", "/v1/me");
    } catch (error) {
      notice(error.message); // the model is being loaded
      await new Promise((wake) => setTimeout(wake, 1000));
    }
  }
}

settings.setUp();
setUpTabs();
const me = await whoAmI();
notice("");
byId("model").textContent = me.model;
byId("model").title = me.licence;
await experts.setUp(me);
history.setUp();
chat.setUp();
files.setUp();
review.setUp();
await teach.setUp(me);
byId("words").focus();
