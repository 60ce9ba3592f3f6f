"use strict";
// A conversation over /v1/chat/completions, and the engine's /stats once a second.

const element = (id) => document.getElementById(id);
const POLL_MS = 1000;
let messages = []; // the conversation on the page
let model = "";
let answer = null; // the AbortController of the answer that is streaming
let previous = null; // the last stats, for rates

// An absolute address: the page's own may hold the key (http://x:KEY@host), and fetch refuses addresses relative to it.
const request = (path, options) => fetch(location.origin + path, options);

const inputs = () => [...element("parameters").querySelectorAll("input[name]")];

// An input that is not a number has the value "", like an empty one; reportValidity shows the user which.
const areNumbers = () => inputs().every((input) => !input.validity.badInput || input.reportValidity());

function parameters() {
  const filled = inputs().filter((input) => input.value !== "");
  return Object.fromEntries(filled.map((input) => [input.name, Number(input.value)]));
}

function addTurn(role, text) {
  const turn = document.createElement("p");
  turn.className = "turn";
  turn.dataset.role = role;
  turn.textContent = text;
  element("conversation").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

async function errorMessage(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

// Yields the data of server-sent events until [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server cut the answer off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(question) {
  const conversation = messages; // "New conversation" replaces messages before the answer has ended
  conversation.push({ role: "user", content: question });
  addTurn("you", question);
  const turn = addTurn(model || "model", "");
  answer = new AbortController();
  element("send").disabled = true;
  element("stop").hidden = false;
  try {
    const body = JSON.stringify({ model: model || undefined, messages, stream: true, ...parameters() });
    const headers = { "Content-Type": "application/json" };
    const response = await request("/v1/chat/completions", { method: "POST", headers, body, signal: answer.signal });
    if (!response.ok) throw new Error(await errorMessage(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      turn.textContent += event.choices[0]?.delta?.content ?? "";
      turn.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      turn.classList.add("error");
      turn.textContent += `${turn.textContent ? "\n" : ""}${error.message}`;
    }
  } finally {
    if (turn.classList.contains("error")) {
      conversation.pop();
      element("question").value ||= question; // to be sent again
    } else conversation.push({ role: "assistant", content: turn.textContent });
    answer = null;
    element("send").disabled = false;
    element("stop").hidden = true;
    element("question").focus();
  }
}

function fill(table, rows) {
  table.replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(
        ...cells.map((text) => {
          const cell = document.createElement("td");
          cell.textContent = text;
          return cell;
        }),
      );
      return row;
    }),
  );
}

function show(stats) {
  const now = { ...stats, at: performance.now() };
  const seconds = previous ? (now.at - previous.at) / 1000 : 0;
  const rate = (name) => (seconds ? (now[name] - previous[name]) / seconds : 0);
  const steps = rate("steps");
  element("state").textContent = stats.reason ? `${stats.state}: ${stats.reason}` : stats.state;
  fill(element("engine"), [
    ["running", stats.running],
    ["waiting", stats.waiting],
    ["KV cache in use", `${(100 * stats.kv_usage).toFixed(1)} %`],
    ["prompt tokens found in it", stats.cached_tokens],
    ["output tokens/s", rate("output_tokens").toFixed(0)],
    ["prompt tokens/s", rate("prompt_tokens").toFixed(0)],
    ["ms a step", steps ? (1000 / steps).toFixed(2) : "idle"],
    ["preemptions", stats.preemptions],
    ["restarts", stats.restarts],
  ]);
  fill(element("ranks"), stats.ranks.map((r) => [`${r.rank} on ${r.host}, pid ${r.pid}`, r.state]));
  previous = now;
}

async function poll() {
  try {
    const response = await request("/stats");
    if (!response.ok) throw new Error(await errorMessage(response));
    show(await response.json());
    if (!model) {
      const models = await (await request("/v1/models")).json();
      model = models.data[0].id;
      element("model").textContent = model;
    }
  } catch (error) {
    element("state").textContent = error.message;
    previous = null;
  }
  setTimeout(poll, POLL_MS);
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = element("question").value.trim();
  if (question && !answer && areNumbers()) {
    element("question").value = "";
    ask(question);
  }
});
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("ask").requestSubmit();
  }
});
element("stop").addEventListener("click", () => answer?.abort());
element("clear").addEventListener("click", () => {
  answer?.abort();
  messages = [];
  element("conversation").replaceChildren();
});
poll();
