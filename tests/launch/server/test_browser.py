"""The page in headless Chromium, on `lockstep serve` with the demo model, compared with the API."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

pytest.importorskip("websockets", reason="the tests of the page need websockets: pip install lockstep[test]")
from browser import PROGRAM, Browser, chromium
from fake_engine import KEY, Running, fake
from small import COMMAND
from streams import begun_stream
from waiting import wait_until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.serial,
    pytest.mark.skipif(PROGRAM is None, reason="the tests of the page need chromium"),
]
SERVE = ["serve", "--device=cpu", "--port=0", "--num-pages=2048", "--max-num-seqs=4", "--served-model-name=demo"]
USAGE = {"stream_options": {"include_usage": True}}
QUESTION = "Who was Moses?"
# Records the stats that the page reads and their times, so that the test computes rates from the same values.
RECORD = """
window.seen = [];
const json = Response.prototype.json;
Response.prototype.json = async function () {
  const body = await json.call(this);
  if (this.url.endsWith("/stats")) window.seen.push({ ...body, at: performance.now() });
  return body;
};
"""
# Records every text of the last turn.
WATCH = """
window.texts = [];
new MutationObserver(() => {
  const text = document.querySelector("#conversation").lastChild?.querySelector?.(".body")?.textContent.trim();
  if (text && text !== window.texts.at(-1)) window.texts.push(text);
}).observe(document.querySelector("#conversation"), { childList: true, subtree: true, characterData: true });
"""
ROWS = "[...document.querySelectorAll('TABLE')].map((row) => [...row.children].map((cell) => cell.textContent))"
FIGURES, RANKS = ROWS.replace("TABLE", "#figures div"), ROWS.replace("TABLE", "#ranks tr")
IDLE = "document.querySelector('#stop').hidden && document.querySelectorAll('.turn').length > 1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """URL and pid."""
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = {name: value for name, value in os.environ.items() if name != "LOCKSTEP_API_KEY"}
    command = [*COMMAND, *SERVE]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        wait_until(lambda: "on http://" in log.read_text() or process.poll() is not None, 60)
        address = re.search(r"on (http://\S+)", log.read_text())
        assert address, log.read_text()
        yield address[1], process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=RECORD)
        yield browser


@pytest.fixture
def page(browser: Browser, server: tuple[str, int]) -> Iterator[Browser]:
    """Open the page anew; after the test, it must have no errors and no requests to other hosts."""
    browser.open(server[0])
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    yield browser
    assert browser.complaints() == []
    outside = [r["url"] for r in browser.requests() if not r["url"].startswith((server[0], "data:"))]
    assert outside == []


def choose(page: Browser, **parameters: object) -> None:
    page.evaluate("document.querySelector('#settings').open = true")
    for name, value in parameters.items():
        page.type(f"input[name={name}]", str(value))


def ask(page: Browser, question: str = QUESTION) -> None:
    page.type("#question", question)
    page.click("#send")


def turns(page: Browser) -> list[tuple[str, str]]:
    """Return the role and the text of each turn, or why it failed; Markdown joins white space."""
    text = "(turn.querySelector('.failure') ?? turn.querySelector('.body')).textContent"
    script = f"[...document.querySelectorAll('.turn')].map((turn) => [turn.dataset.role, {text}])"
    return [(role, joined(text)) for role, text in page.evaluate(script)]


def joined(text: str) -> str:
    """Return the text with single spaces."""
    return " ".join(text.split())


def sent(page: Browser) -> dict[str, Any]:
    """Return the body of the last request."""
    return dict(json.loads(page.requests("/v1/chat/completions")[-1]["postData"]))


def reply(url: str, messages: list[dict[str, str]], **parameters: Any) -> str:
    """Return the API's answer to the same conversation."""
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, **parameters}, timeout=60)
    return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])


def gauges(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^lockstep:(\w+)\{\S*\} (\S+)$", text, re.M)}


def test_answer_streams_and_conversation_continues(page: Browser, server: tuple[str, int]) -> None:
    choose(page, temperature=0, max_tokens=60)
    page.evaluate(WATCH)
    page.type("#question", QUESTION)
    page.press("Enter")
    page.wait(IDLE)
    conversation = [{"role": "user", "content": QUESTION}]
    first = reply(server[0], conversation, temperature=0, max_tokens=60)
    assert turns(page) == [("you", QUESTION), ("demo", joined(first))]
    texts = [text for text in page.evaluate("window.texts") if text != QUESTION]
    assert len(texts) > 5, "it came in pieces"
    assert all(after.startswith(before) for before, after in pairwise(texts))
    conversation += [{"role": "assistant", "content": first}, {"role": "user", "content": "And <b>who</b> was Aaron?"}]
    ask(page, "And <b>who</b> was Aaron?")
    page.wait("document.querySelectorAll('.turn').length === 4 && document.querySelector('#stop').hidden")
    assert sent(page)["messages"] == conversation
    assert turns(page)[2:] == [
        ("you", "And <b>who</b> was Aaron?"),
        ("demo", joined(reply(server[0], conversation, temperature=0, max_tokens=60))),
    ]


def test_parameters_reach_the_request(page: Browser, server: tuple[str, int]) -> None:
    parameters = {"temperature": 1.3, "top_p": 0.85, "max_tokens": 21, "seed": 7}
    choose(page, **parameters)
    ask(page)
    page.wait(IDLE)
    messages = [{"role": "user", "content": QUESTION}]
    assert sent(page) == {"model": "demo", "messages": messages, "stream": True, **USAGE, **parameters}
    first = reply(server[0], messages, **parameters)
    assert turns(page)[1] == ("demo", joined(first))
    choose(page, temperature="", top_p="", max_tokens=2, seed="")
    ask(page)
    page.wait("document.querySelectorAll('.turn').length === 4 && document.querySelector('#stop').hidden")
    assert sent(page) == {
        "model": "demo", "stream": True, **USAGE, "max_tokens": 2,
        "messages": [*messages, {"role": "assistant", "content": first}, *messages],
    }  # fmt: skip


def test_invalid_number_is_not_sent(page: Browser) -> None:
    choose(page, max_tokens="1e")
    ask(page)
    page.wait("document.activeElement.name === 'max_tokens'")
    assert page.requests("/v1/chat/completions") == []
    assert page.evaluate("document.querySelector('#question').value") == QUESTION


def test_stop_button_cancels_the_output(page: Browser, server: tuple[str, int]) -> None:
    choose(page, temperature=2, max_tokens=600, seed=1)  # at this temperature the output is long
    ask(page)
    page.wait("document.querySelector('.turn:last-child').dataset.role === 'demo' && window.seen.at(-1).running === 1")
    page.wait("document.querySelector('.turn:last-child').textContent.length > 40")
    assert gauges(server[0])["num_requests_running"] == 1
    page.click("#stop")
    page.wait(IDLE)
    wait_until(lambda: gauges(server[0])["num_requests_running"] == 0)
    assert gauges(server[0])["num_requests_waiting"] == 0
    shown, body = turns(page)[1][1], {**sent(page), "stream": False, "stream_options": None}
    choose(page, temperature=0, max_tokens=5)
    ask(page)
    page.wait("document.querySelectorAll('.turn').length === 4 && document.querySelector('#stop').hidden")
    kept = sent(page)["messages"][1]
    answer = reply(server[0], **body)
    assert kept["role"] == "assistant"
    assert answer.startswith(kept["content"])
    assert 30 < len(shown) <= len(kept["content"]) < len(answer), "what had come stays"


def test_new_conversation_forgets_the_old_one(page: Browser, server: tuple[str, int]) -> None:
    choose(page, temperature=2, max_tokens=600, seed=1)
    ask(page)
    page.wait("document.querySelector('.turn:last-child').textContent.length > 40")
    page.click("#clear")
    page.wait("document.querySelector('#stop').hidden")
    assert turns(page) == []
    wait_until(lambda: gauges(server[0])["num_requests_running"] == 0)
    choose(page, temperature=0, max_tokens=5)
    ask(page)
    page.wait(IDLE)
    assert sent(page)["messages"] == [{"role": "user", "content": QUESTION}]


def shown(stats: dict[str, Any], before: dict[str, Any]) -> dict[str, str]:
    """Return the rows that the table must show."""
    seconds = (stats["at"] - before["at"]) / 1000
    steps = stats["steps"] - before["steps"]
    return {
        "running": str(stats["running"]), "waiting": str(stats["waiting"]),
        "KV cache in use": f"{100 * stats['kv_usage']:.1f} %", "prefix cache hits, tokens": str(stats["cached_tokens"]),
        "output tokens/s": f"{(stats['output_tokens'] - before['output_tokens']) / seconds:.0f}",
        "prompt tokens/s": f"{(stats['prompt_tokens'] - before['prompt_tokens']) / seconds:.0f}",
        "ms a step": f"{1000 * seconds / steps:.2f}" if steps else "idle",
        "preemptions": str(stats["preemptions"]), "restarts": str(stats["restarts"]),
    }  # fmt: skip


def agree(page: Browser) -> dict[str, Any]:
    """Compare the page's table with the stats that it read last, and return these."""
    before, stats, rows = page.evaluate(f"[...window.seen.slice(-2), {FIGURES}]")
    cells, expected = dict(rows), shown(stats, before)
    assert cells.keys() == expected.keys()
    for name, text in expected.items():
        numbers = [re.match(r"[\d.]+", t) for t in (cells[name], text)]
        if numbers[0] and numbers[1]:
            assert float(numbers[0][0]) == pytest.approx(float(numbers[1][0]), rel=0.02, abs=1.01), name
        else:
            assert cells[name] == text
    return dict(stats)


def test_live_view_agrees_with_metrics(page: Browser, server: tuple[str, int]) -> None:
    url, pid = server
    body = {"prompt": ["In the beginning"] * 6, "max_tokens": 1500, "ignore_eos": True}
    with httpx.Client(base_url=url, timeout=60) as client, begun_stream(client, body):
        page.wait("window.seen.at(-1).running === 4 && window.seen.at(-2)?.running === 4")
        stats = agree(page)
        assert page.text("#state") == "ready"
        metrics = gauges(url)
        assert (stats["running"], stats["waiting"]) == (4, 2)
        assert (metrics["num_requests_running"], metrics["num_requests_waiting"]) == (4, 2)
        assert 0 < stats["kv_usage"] <= metrics["kv_cache_usage_perc"] < 1, "it grows"
        assert page.evaluate(f"Number({FIGURES}[4][1])") > 0, "tokens/s"
    page.wait("window.seen.at(-1).running === 0 && window.seen.at(-1).steps === window.seen.at(-2).steps")
    stats, metrics = agree(page), gauges(url)
    for name, metric in {
        "running": "num_requests_running", "waiting": "num_requests_waiting", "kv_usage": "kv_cache_usage_perc",
        "cached_tokens": "prefix_cache_hits_total", "steps": "engine_steps_total",
        "preemptions": "num_preemptions_total", "restarts": "engine_restarts_total",
    }.items():  # fmt: skip
        assert stats[name] == metrics[metric], name
    (rank,) = page.evaluate(f"{RANKS}.slice(1)")
    assert (rank[0], rank[2], rank[3], rank[-1]) == ("0", str(pid), "the CPU", "running")


def test_refusal_is_shown_and_question_restored(browser: Browser, server: tuple[str, int]) -> None:
    browser.open(server[0])
    choose(browser, temperature=9)
    ask(browser)
    browser.wait("document.querySelector('.turn.error')")
    assert "temperature" in turns(browser)[1][1]
    assert browser.evaluate("document.querySelector('#question').value") == QUESTION
    choose(browser, temperature=0, max_tokens=3)
    browser.click("#send")
    browser.wait("document.querySelectorAll('.turn').length === 4 && document.querySelector('#stop').hidden")
    assert sent(browser)["messages"] == [{"role": "user", "content": QUESTION}]


def test_interrupted_stream_is_reported(browser: Browser, run: Callable[..., Running]) -> None:
    running = run()
    fake(running).step_s = 0.02
    browser.open(running.url)
    choose(browser, max_tokens=500)
    ask(browser)
    browser.wait("document.querySelector('.turn:last-child').textContent.length > 20")
    for connection in list(running.server.server_state.connections):
        connection.loop.call_soon_threadsafe(connection.transport.abort)
    browser.wait("document.querySelector('.turn.error')")


def test_key_in_the_address_is_enough(browser: Browser, run: Callable[..., Running]) -> None:
    running = run(api_key=[KEY], served_model_name=["demo"])
    browser.open(running.url.replace("://", f"://anybody:{KEY}@"))
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    choose(browser, max_tokens=3)
    ask(browser)
    browser.wait(IDLE)
    assert turns(browser)[1][1]
    assert browser.complaints() == []


# One answer of the API with each part that the page draws, as server-sent events.
DELTAS = [
    {"role": "assistant", "reasoning_content": "Let me "},
    {"reasoning_content": "think."},
    {"content": "# Title\n\n**bold** `code` <b>tag</b> [a](https://a.example) [b](javascript:alert(1)) "},
    {"content": "![i](https://b.example/i.png)\n\n```\nx = 1\n```\n"},
    {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "find", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]},
]
ANSWER = "".join(f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n" for delta in DELTAS)
REPLACE_ANSWER = """
const sendRequest = window.fetch;
window.bodies = [];
window.fetch = async (url, options) => {
  if (!String(url).endsWith("/v1/chat/completions")) return sendRequest(url, options);
  window.bodies.push(JSON.parse(options.body));
  return new Response(ANSWER);
};
"""


def test_markdown_thinking_and_tool_calls_are_drawn(page: Browser) -> None:
    page.evaluate(REPLACE_ANSWER.replace("ANSWER", json.dumps(ANSWER + "data: [DONE]\n\n")))
    ask(page)
    page.wait(IDLE)
    answer = "document.querySelector('.turn:last-child')"
    assert page.evaluate(f"{answer}.querySelector('.thinking p').textContent") == "Let me think."
    assert page.evaluate(f"{answer}.querySelector('.thinking').open") is False
    assert page.evaluate(f"[...{answer}.children].map((node) => node.className)") == [
        "thinking",
        "body",
        "call",
        "tools",
    ]
    assert page.evaluate(f"{answer}.querySelector('.call summary').textContent") == "Tool call: find"
    assert page.evaluate(f"{answer}.querySelector('.call code').textContent") == '{"a": 1}'
    page.click(".call summary")
    page.type(".call textarea", "5 found")
    page.click(".turn:last-child .tools button:nth-child(2)")
    page.wait("document.querySelectorAll('.turn').length === 3 && document.querySelector('#stop').hidden")
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
    *_, called, result = page.evaluate("window.bodies.at(-1)")["messages"]
    assert called["tool_calls"] == [call]
    assert result == {"role": "tool", "tool_call_id": "c", "content": "5 found"}
    body = page.evaluate(f"{answer}.querySelector('.body').innerHTML")
    for html in ("<h1>Title</h1>", "<strong>bold</strong>", "<code>code</code>", "&lt;b&gt;tag&lt;/b&gt;", "x = 1"):
        assert html in body, html
    links = page.evaluate(f"[...{answer}.querySelectorAll('a')].map((a) => a.href)")
    assert links == ["https://a.example/", "https://b.example/i.png"], "no script, and no image from another host"
    assert "<img" not in body


def test_tools_and_thinking_reach_the_request(page: Browser) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    page.evaluate("document.querySelector('#settings').open = true")
    page.type("#tools", "[{")
    ask(page)
    page.wait("document.activeElement.id === 'tools'")
    assert page.requests("/v1/chat/completions") == []
    page.type("#tools", json.dumps(tools))
    page.evaluate("document.querySelector('[name=reasoning_effort]').value = 'none'")
    choose(page, max_tokens=3)
    page.click("#send")
    page.wait(IDLE)
    assert sent(page)["tools"] == tools
    assert sent(page)["reasoning_effort"] == "none"


def test_edit_and_regenerate(page: Browser, server: tuple[str, int]) -> None:
    choose(page, temperature=0, max_tokens=5)
    ask(page)
    page.wait(IDLE)
    first = turns(page)
    page.click("#regenerate")
    page.wait(f"performance.getEntriesByName('{server[0]}/v1/chat/completions').length === 2 && {IDLE}")
    assert turns(page) == first
    page.click(".turn .tools button")
    assert page.evaluate("document.querySelector('#question').value") == QUESTION
    assert turns(page) == []
    ask(page, "Who was Aaron?")
    page.wait(IDLE)
    assert sent(page)["messages"] == [{"role": "user", "content": "Who was Aaron?"}]


def test_views_themes_and_phone_width(page: Browser) -> None:
    page.click("#to-engine")
    page.wait("document.querySelectorAll('#charts canvas').length === 4")
    page.wait("Number(document.querySelector('#charts .u-series:nth-child(2) .u-value').textContent) >= 0")
    assert not page.evaluate("document.querySelector('#question').offsetParent")
    parts = page.evaluate(
        "[...document.querySelectorAll('#charts figure:last-child .u-label')].map((l) => l.textContent)"
    )
    assert parts[1:] == ["GEMMs and the rest", "attention", "communication", "host"]
    grounds = []
    for theme in ("light", "dark", "auto"):
        page.click("#theme")
        assert page.text("#theme") == f"Theme: {theme}"
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    for view in ("engine", "chat"):
        page.click(f"#to-{view}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
    page.call("Emulation.clearDeviceMetricsOverride")
