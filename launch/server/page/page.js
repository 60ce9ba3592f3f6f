// The page's two views, its theme, and the state of the server once a second.

import { element, getJson } from "./api.js";
import { setModel } from "./chat.js";
import { drawCharts, forgetLast, showStats } from "./engine.js";

const POLL_MS = 1000;
const THEMES = ["auto", "light", "dark"];
let model = "";

function showView() {
  const view = location.hash === "#engine" ? "engine" : "chat";
  for (const name of ["chat", "engine"]) {
    element(name).hidden = name !== view;
    element(`to-${name}`).toggleAttribute("aria-current", name === view);
  }
  if (view === "engine") drawCharts();
  else element("question").focus();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  element("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("theme", theme);
  drawCharts();
}

function setState(state, reason) {
  element("state").dataset.state = state;
  element("state").textContent = reason ? `${state}: ${reason}` : state;
}

async function poll() {
  try {
    const stats = await getJson("/stats");
    setState(stats.state, stats.reason);
    showStats(stats);
    if (!model) {
      model = (await getJson("/v1/models")).data[0].id;
      element("model").textContent = model;
      setModel(model);
    }
  } catch (error) {
    setState("no connection", error.message);
    forgetLast();
  }
  setTimeout(poll, POLL_MS);
}

element("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
window.addEventListener("hashchange", showView);
window.addEventListener("resize", drawCharts);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
setTheme(localStorage.getItem("theme") ?? "auto");
showView();
poll();
