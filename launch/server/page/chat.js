// The conversation over /v1/chat/completions: Markdown, folded thinking, tool calls, edit and regenerate.

import { element, errorMessage, events, make, request } from "./api.js";

// Raw HTML in an answer is shown as text, and links with a script are refused by markdown-it.
const markdown = window.markdownit({ html: false, linkify: true, breaks: true });
// An image in an answer would tell another host that the answer was read: it becomes a link.
markdown.renderer.rules.image = (tokens, index, options, env, self) => {
  const source = markdown.utils.escapeHtml(tokens[index].attrGet("src") ?? "");
  const text = self.renderInlineAsText(tokens[index].children, options, env);
  return `<a href="${source}">${markdown.utils.escapeHtml(text || source)}</a>`;
};
markdown.renderer.rules.link_open = (tokens, index, options, env, self) => {
  tokens[index].attrSet("target", "_blank");
  tokens[index].attrSet("rel", "noopener noreferrer");
  return self.renderToken(tokens, index, options);
};

const conversation = element("conversation");
let turns = []; // { role, content, reasoning, toolCalls, failure, node, figures }
let running = null; // the AbortController of the answer that streams
let model = "";

export function setModel(name) {
  model = name;
}

const inputs = () => [...element("parameters").querySelectorAll("input, select")];

// Returns the tools of the user; undefined for text that is not a JSON list.
function tools() {
  try {
    const list = JSON.parse(element("tools").value.trim() || "[]");
    return Array.isArray(list) ? list : undefined;
  } catch {
    return undefined;
  }
}

// An input that is not a number has the value "", like an empty one; reportValidity shows the user which.
function areValid() {
  element("tools").setCustomValidity(tools() ? "" : "This is not a JSON list.");
  const wrong = [...inputs(), element("tools")].find(({ validity }) => validity.badInput || validity.customError);
  if (!wrong) return true;
  element("settings").open = true;
  return wrong.reportValidity();
}

function parameters() {
  const filled = inputs().filter((input) => input.value !== "");
  const fields = filled.map(({ name, type, value }) => [name, type === "number" ? Number(value) : value]);
  return Object.fromEntries(tools().length ? [...fields, ["tools", tools()]] : fields);
}

// Returns the messages of a turn: an answer with calls is followed by their results.
function messagesOf({ role, content, toolCalls }) {
  if (!toolCalls.length) return [{ role, content }];
  const calls = toolCalls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  const results = toolCalls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result }));
  return [{ role, content, tool_calls: calls }, ...results];
}

function messages() {
  const system = element("system").value.trim();
  const kept = turns.filter((turn) => !turn.failure && (turn.role === "user" || turn.done));
  const sent = kept.flatMap(messagesOf);
  return system ? [{ role: "system", content: system }, ...sent] : sent;
}

const atBottom = () => conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 60;
const toBottom = () => (conversation.scrollTop = conversation.scrollHeight);

function addTurn(role, content = "") {
  const node = make("article", { className: "turn" });
  node.dataset.role = role === "user" ? "you" : model || "model";
  const turn = { role, content, reasoning: "", toolCalls: [], failure: "", figures: "", done: false, node };
  turns.push(turn);
  conversation.append(node);
  show(turn);
  toBottom();
  return turn;
}

// Draws a turn; the parts that have not changed stay, so that a fold which the user has opened stays open.
function show(turn) {
  const { node } = turn;
  const part = (name, tag, className) => {
    turn[name] ??= node.appendChild(make(tag, { className }));
    return turn[name];
  };
  if (turn.reasoning) {
    const fold = part("thinkingNode", "details", "thinking");
    if (!fold.firstChild) {
      fold.append(make("summary"), make("p"));
      node.prepend(fold);
    }
    fold.firstChild.textContent = turn.content || turn.done ? "Thinking" : "Thinking …";
    fold.lastChild.textContent = turn.reasoning;
  }
  const body = part("bodyNode", "div", "body");
  if (turn.role === "user") body.textContent = turn.content;
  else body.innerHTML = markdown.render(turn.content);
  turn.toolCalls.forEach((call, index) => {
    const fold = part(`callNode${index}`, "details", "call");
    if (!fold.firstChild) {
      const oninput = (event) => (call.result = event.target.value);
      fold.append(make("summary"), make("pre", {}, make("code")), make("textarea", { rows: 1, placeholder: "Result", oninput }));
      fold.lastChild.setAttribute("aria-label", "Result");
    }
    fold.firstChild.textContent = `Tool call: ${call.name}`;
    fold.querySelector("code").textContent = call.arguments;
  });
  if (turn.failure) part("failureNode", "p", "failure").textContent = turn.failure;
  node.classList.toggle("error", Boolean(turn.failure));
  if (turn.done || turn.role === "user") addTools(turn, part("toolsNode", "div", "tools"), body);
}

function addTools(turn, bar, body) {
  const button = (textContent, onclick) => make("button", { type: "button", textContent, onclick });
  const copy = (text) => (event) =>
    navigator.clipboard.writeText(text()).then(() => (event.target.textContent = "Copied"));
  const first = turn.role === "user" ? button("Edit", () => edit(turn)) : button("Copy", copy(() => turn.content));
  const results = turn.toolCalls.length ? [button("Send results", () => sendResults(turn))] : [];
  bar.replaceChildren(first, ...results, turn.figures);
  for (const block of body.querySelectorAll("pre"))
    if (!block.querySelector("button")) block.append(button("Copy", copy(() => block.querySelector("code").textContent)));
}

// Draws the turn with the next frame: an answer of many tokens a frame is drawn once.
function showSoon(turn) {
  turn.frame ??= requestAnimationFrame(() => {
    turn.frame = undefined;
    const follow = atBottom();
    show(turn);
    if (follow) toBottom();
  });
}

function take(turn, delta) {
  turn.content += delta.content ?? "";
  turn.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const call of delta.tool_calls ?? []) {
    const known = (turn.toolCalls[call.index] ??= { id: call.id, name: "", arguments: "", result: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
}

function figures(usage, started, first) {
  if (!usage || first === null) return "";
  const { completion_tokens: tokens } = usage;
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${tokens} token${tokens === 1 ? "" : "s"}, first after ${((first - started) / 1000).toFixed(2)} s${rate}`;
}

function setBusy(busy) {
  element("send").disabled = busy;
  element("stop").hidden = !busy;
  element("regenerate").disabled = busy || !turns.some((turn) => turn.role === "user");
}

// Streams the answer to the conversation as it is.
async function answer() {
  const body = { model: model || undefined, messages: messages(), stream: true, ...parameters() };
  body.stream_options = { include_usage: true };
  const turn = addTurn("assistant");
  const controller = (running = new AbortController());
  const started = performance.now();
  let [first, usage] = [null, null];
  element("hint")?.remove();
  setBusy(true);
  try {
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(body), signal: controller.signal };
    const response = await request("/v1/chat/completions", options);
    if (!response.ok) throw new Error(await errorMessage(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      if (!event.choices.length) continue;
      first ??= performance.now();
      take(turn, event.choices[0].delta);
      showSoon(turn);
    }
  } catch (error) {
    if (error.name !== "AbortError") turn.failure = error.message;
  } finally {
    turn.done = true;
    turn.figures = figures(usage, started, first);
    cancelAnimationFrame(turn.frame);
    const follow = atBottom();
    show(turn);
    if (follow) toBottom();
    if (running === controller) {
      running = null;
      setBusy(false);
      if (turn.failure) restore();
      element("question").focus();
    }
  }
}

// Puts the question of a failed answer back, to be sent again.
function restore() {
  const last = turns.findLast((turn) => turn.role === "user");
  if (!last) return;
  last.failure = "not sent";
  element("question").value ||= last.content;
}

function cut(count) {
  for (const turn of turns.splice(count)) turn.node.remove();
}

function edit(turn) {
  if (running) return;
  element("question").value = turn.content;
  cut(turns.indexOf(turn));
  setBusy(false);
  element("question").focus();
}

function ask(question) {
  addTurn("user", question);
  answer();
}

// Continues behind the calls of the last answer.
function sendResults(turn) {
  if (!running && turn === turns.at(-1) && areValid()) answer();
}

function regenerate() {
  const last = turns.findLastIndex((turn) => turn.role === "user");
  if (running || last < 0 || !areValid()) return;
  cut(last + 1);
  turns[last].failure = "";
  answer();
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = element("question").value.trim();
  if (question && !running && areValid()) {
    element("question").value = "";
    ask(question);
  }
});
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("ask").requestSubmit();
  } else if (event.key === "ArrowUp" && !element("question").value) {
    const last = turns.findLast((turn) => turn.role === "user");
    if (last) edit(last);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
element("stop").addEventListener("click", () => running?.abort());
element("regenerate").addEventListener("click", regenerate);
element("clear").addEventListener("click", () => {
  running?.abort();
  running = null; // what comes of the old answer no longer changes the buttons
  cut(0);
  setBusy(false);
});
