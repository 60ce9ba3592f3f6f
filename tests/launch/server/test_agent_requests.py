"""Bodies as agents send them: what they send by default is taken, what would change the answer is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT_BODY, Running, fake

COMMAND = {
    "type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}},
    "required": ["command"], "additionalProperties": False,
}  # fmt: skip
SHELL = {"type": "function", "name": "shell", "description": "Runs it.", "strict": False, "parameters": COMMAND}
ASK = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]}
CODEX: dict[str, Any] = {
    "model": "demo", "instructions": "You are a coding agent.",
    "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Ask."}]}, ASK],
    "tools": [SHELL], "tool_choice": "auto", "parallel_tool_calls": False, "store": False, "stream": False,
    "reasoning": {"effort": "medium", "summary": "auto"}, "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "019a", "client_metadata": {"session": "019a"}, "max_output_tokens": 2,
}  # fmt: skip
TURN = [
    ASK,
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Look."}], "content": None,
     "encrypted_content": "gAAAA"},
    {"type": "function_call", "name": "shell", "arguments": '{"command": ["ls"]}', "call_id": "call_1", "id": "fc_1",
     "status": "completed"},
    {"type": "function_call_output", "call_id": "call_1", "output": '{"output": "a", "metadata": {"exit_code": 0}}'},
    {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": "final_answer",
     "content": [{"type": "output_text", "text": "One file.", "annotations": [], "logprobs": []}]},
    ASK,
]  # fmt: skip
CODEX_TAKES: dict[str, dict[str, Any]] = {
    "the first request": {},
    "a turn sent back": {"input": TURN},
    "tiers": {"service_tier": "flex"},
    "another tier": {"service_tier": "priority"},
    "a search that is off": {"tools": [SHELL, {"type": "web_search", "external_web_access": False,
                                                "search_content_types": ["text", "image"]}]},
    "results of absent tools": {"include": ["web_search_call.action.sources", "code_interpreter_call.outputs"],
                                "max_tool_calls": 9},
    "no truncation": {"truncation": "disabled", "text": {"verbosity": "medium"}, "prompt_cache_retention": "24h"},
    "labels": {"metadata": {"a": "b"}, "safety_identifier": "x", "user": "y"},
    "tools that are not deferred": {"tools": [SHELL | {"defer_loading": False}]},
}  # fmt: skip
CODEX_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "freeform tools": ({"tools": [SHELL, {"type": "custom", "name": "apply_patch",
                                           "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}]},
                       "'tools[1]': expected .* but got 'custom'"),
    "a shell of the client": ({"tools": [{"type": "local_shell"}]}, "'tools[0]': expected .* but got 'local_shell'"),
    "a search": ({"tools": [{"type": "web_search"}]}, "external_web_access false, but got 'web_search'"),
    "freeform calls": ({"input": [ASK, {"type": "custom_tool_call", "call_id": "c", "name": "x", "input": "y"}]},
                       "'input[1]': expected .* but got 'custom_tool_call'"),
    "images of tools": ({"input": [ASK, TURN[2], {"type": "function_call_output", "call_id": "call_1", "output": [
        {"type": "input_image", "image_url": "data:"}]}]}, "'input[2].output': .* images, .* but got 'input_image'"),
    "a compaction": ({"input": [ASK, {"type": "compaction", "encrypted_content": "x"}]}, "but got 'compaction'"),
    "verbosity": ({"text": {"verbosity": "low"}}, "'text.verbosity' is not implemented"),
    "truncation": ({"truncation": "auto"}, "'truncation' is not implemented"),
    "storing": ({"store": True}, "'store' is not implemented"),
    "a stored response": ({"previous_response_id": "resp_1"}, "'previous_response_id' is not implemented"),
    "deferred tools": ({"tools": [SHELL | {"defer_loading": True}]}, "'tools[0].defer_loading' is not implemented"),
    "a choice of several": ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
                            "'tool_choice': expected .* but got 'allowed_tools'"),
}  # fmt: skip

BASH = {
    "name": "Bash", "description": "Runs it.",
    "input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
                     "properties": {"command": {"type": "string"}}, "required": ["command"],
                     "additionalProperties": False},
}  # fmt: skip
EPHEMERAL = {"type": "ephemeral", "ttl": "1h"}
CLAUDE: dict[str, Any] = {
    "model": "demo", "max_tokens": 2, "temperature": 1, "metadata": {"user_id": "user_1"}, "tools": [BASH],
    "system": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two.", "cache_control": EPHEMERAL}],
    "messages": [{"role": "user", "content": [
        {"type": "text", "text": "<system-reminder>x</system-reminder>"},
        {"type": "text", "text": "List the files.", "cache_control": EPHEMERAL}]}],
    "thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}  # fmt: skip
CALL = [
    {"role": "user", "content": "List the files."},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Look.", "signature": "c2ln"}, {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"},
         "caller": {"type": "direct"}}]},
]  # fmt: skip


def result(*content: dict[str, Any]) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": "toolu_1", "content": list(content), "cache_control": EPHEMERAL}
    return {"messages": [*CALL, {"role": "user", "content": [block]}]}


CLAUDE_TAKES: dict[str, dict[str, Any]] = {
    "the first request": {},
    "a turn sent back": result({"type": "text", "text": "a"}),
    "a budget": {"thinking": {"type": "enabled", "budget_tokens": 31_999}},
    "neutral options": {"mcp_servers": [], "speed": "standard", "service_tier": "auto", "container": None},
    "tools that are not deferred": {"tools": [BASH | {"defer_loading": False, "allowed_callers": ["direct"]}]},
}
CLAUDE_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "images of tools": (result({"type": "image", "source": {"type": "base64"}}),
                        r"'messages\[2\].content\[0\].content\[0\].type': .* but got 'image'"),
    "images": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "but got 'image'"),
    "documents": ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "but got 'document'"),
    "a search": ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]},
                 "but got 'web_search_20250305'"),
    "deferred tools": ({"tools": [BASH | {"defer_loading": True}]}, "defer_loading' is not implemented"),
    "servers of tools": ({"mcp_servers": [{"type": "url", "url": "x"}]}, "'mcp_servers' is not implemented"),
    "speed": ({"speed": "fast"}, "'speed' is not implemented"),
}  # fmt: skip


def check_refused(shared: Running, path: str, body: dict[str, Any], text: str) -> None:
    response = shared.post(path, body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    for part in text.split(".*"):
        assert part.replace("\\", "") in message
        message = message.partition(part.replace("\\", ""))[2]


@pytest.mark.parametrize("case", CODEX_TAKES)
def test_bodies_of_codex_are_taken(shared: Running, case: str) -> None:
    response = shared.post("/v1/responses", CODEX | CODEX_TAKES[case])
    assert response.status_code == 200, response.text
    assert (response.json()["service_tier"], response.json()["store"]) == ("default", False)


@pytest.mark.parametrize("case", CODEX_REFUSALS)
def test_what_would_change_answers_of_codex_is_refused(shared: Running, case: str) -> None:
    changes, text = CODEX_REFUSALS[case]
    check_refused(shared, "/v1/responses", CODEX | changes, text)


@pytest.mark.parametrize("case", CLAUDE_TAKES)
def test_bodies_of_claude_code_are_taken(shared: Running, case: str) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}
    response = shared.post("/v1/messages?beta=true", CLAUDE | CLAUDE_TAKES[case], headers=headers)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("case", CLAUDE_REFUSALS)
def test_what_would_change_answers_of_claude_code_is_refused(shared: Running, case: str) -> None:
    changes, text = CLAUDE_REFUSALS[case]
    check_refused(shared, "/v1/messages", CLAUDE | changes, text)


def test_tools_that_the_model_cannot_use_are_not_in_the_prompt(shared: Running) -> None:
    for tools in ([], CODEX_TAKES["a search that is off"]["tools"][1:]):
        assert shared.post("/v1/responses", CODEX | {"tools": tools}).status_code == 200
    (without, _), (offline, _) = fake(shared).asked[-2:]
    assert without == offline


def test_chat_takes_fields_without_effect(shared: Running) -> None:
    assert shared.post("/v1/chat/completions", CHAT_BODY).status_code == 200
    more = {"service_tier": "scale", "prompt_cache_retention": "24h", "prompt_cache_key": "k", "store": False}
    assert shared.post("/v1/chat/completions", CHAT_BODY | more).status_code == 200
    (plain, _), (labelled, _) = fake(shared).asked[-2:]
    assert plain == labelled


@pytest.mark.parametrize("beginning", ["The answer is", [{"type": "text", "text": "The answer is"}]])
def test_answer_continues_a_last_message_of_the_assistant(
    shared: Running, tokenizer: Tokenizer, beginning: Any
) -> None:
    """As in Anthropic's API. Messages of the assistant that are no text begin another turn."""
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": beginning}]
    body = {"model": "demo", "max_tokens": 1, "messages": messages}
    reply = shared.post("/v1/messages", body).json()
    prompt = fake(shared).asked[-1][0]
    assert tokenizer.decode(prompt, skip_special_tokens=False).endswith("<|assistant|>The answer is")
    assert reply["content"][0]["text"] not in ("", "The answer is"), "what was sent is not repeated"
    counted = shared.post("/v1/messages/count_tokens", {"model": "demo", "messages": messages}).json()
    assert counted["input_tokens"] == len(prompt)
    assert shared.post("/v1/messages", body | {"messages": CALL, "tools": [BASH]}).status_code == 200
    assert tokenizer.decode(fake(shared).asked[-1][0], skip_special_tokens=False).endswith("<|eos|><|assistant|>")
