"use strict";
// A conversation over /v1/chat/completions, and what /stats tells of the engine once a second.

const at = (id) => document.getElementById(id);
const POLL_MS = 1000;
let messages = []; // of the conversation on the page
let model = "";
let answer = null; // the AbortController of the answer that is coming
let last = null; // the stats before, for rates

// By its whole address: the page's own may hold the key (http://x:KEY@host), and fetch refuses what is relative to that.
const request = (path, options) => fetch(location.origin + path, options);

const inputs = () => [...at("parameters").querySelectorAll("input[name]")];

// What is not a number has the value "" as if it were not given: the user is told instead.
const areNumbers = () => inputs().every((input) => !input.validity.badInput || input.reportValidity());

function parameters() {
  const given = inputs().filter((input) => input.value !== "");
  return Object.fromEntries(given.map((input) => [input.name, Number(input.value)]));
}

function addTurn(role, text) {
  const turn = document.createElement("p");
  turn.className = "turn";
  turn.dataset.role = role;
  turn.textContent = text;
  at("conversation").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

async function reason(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

// The data lines of a stream of server-sent events, until [DONE].
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
  const conversation = messages; // a new one may begin before this answer has ended
  conversation.push({ role: "user", content: question });
  addTurn("you", question);
  const turn = addTurn(model || "model", "");
  answer = new AbortController();
  at("send").disabled = true;
  at("stop").hidden = false;
  try {
    const body = JSON.stringify({ model: model || undefined, messages, stream: true, ...parameters() });
    const headers = { "Content-Type": "application/json" };
    const response = await request("/v1/chat/completions", { method: "POST", headers, body, signal: answer.signal });
    if (!response.ok) throw new Error(await reason(response));
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
      at("question").value ||= question; // to be asked again
    } else conversation.push({ role: "assistant", content: turn.textContent });
    answer = null;
    at("send").disabled = false;
    at("stop").hidden = true;
    at("question").focus();
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
  const seconds = last ? (now.at - last.at) / 1000 : 0;
  const rate = (name) => (seconds ? (now[name] - last[name]) / seconds : 0);
  const steps = rate("steps");
  at("state").textContent = stats.reason ? `${stats.state}: ${stats.reason}` : stats.state;
  fill(at("engine"), [
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
  fill(at("ranks"), stats.ranks.map((r) => [`${r.rank} on ${r.host}, pid ${r.pid}`, r.state]));
  last = now;
}

async function poll() {
  try {
    const response = await request("/stats");
    if (!response.ok) throw new Error(await reason(response));
    show(await response.json());
    if (!model) {
      const models = await (await request("/v1/models")).json();
      model = models.data[0].id;
      at("model").textContent = model;
    }
  } catch (error) {
    at("state").textContent = error.message;
    last = null;
  }
  setTimeout(poll, POLL_MS);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (question && !answer && areNumbers()) {
    at("question").value = "";
    ask(question);
  }
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => answer?.abort());
at("clear").addEventListener("click", () => {
  answer?.abort();
  messages = [];
  at("conversation").replaceChildren();
});
poll();
