// The page: who we are talking to, tabs, colours.

import { byId, json, notice } from "/static/api.js";
import * as chat from "/static/chat.js";
import * as experts from "/static/experts.js";
import * as review from "/static/review.js";
import * as teach from "/static/teach.js";

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  byId("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[theme]}`);
}

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

setTheme(localStorage.getItem("theme") in THEMES ? localStorage.getItem("theme") : "auto");
byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
});
setUpTabs();
const me = await whoAmI();
notice("");
byId("model").textContent = me.model;
byId("model").title = me.licence;
experts.setUp();
chat.setUp(me.model);
review.setUp(me.model);
await experts.refresh(me.admin);
await teach.setUp(me);
byId("words").focus();
