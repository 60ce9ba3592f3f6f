"""Clients that people use, against a server of the demo model; the extra `clients` installs them.

The demo model cannot decide to call a tool, so that calls are required of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from lockstep.runtime.config import DEMO_NAME

from fake_engine import Running, demo_server

pytestmark = pytest.mark.clients
CHAT: list[Any] = [{"role": "user", "content": "Who was Moses?"}]
SCHEMA = {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
LONG = 600  # the demo model writes all the whitespace that the grammar of an answer allows
ONE_CALL: dict[str, Any] = {"model": DEMO_NAME, "max_tokens": 100, "parallel_tool_calls": False}


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Paris", "Rome"]
    is_large: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with demo_server() as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.openai


def test_openai_tools_and_parse(client: openai.OpenAI) -> None:
    function = openai.pydantic_function_tool(City)
    response = client.chat.completions.parse(messages=CHAT, tools=[function], tool_choice="required", **ONE_CALL)
    (call,) = response.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, City)
    parsed = client.chat.completions.parse(
        model=DEMO_NAME, messages=CHAT, response_format=City, max_tokens=LONG
    ).choices[0].message.parsed  # fmt: skip
    assert isinstance(parsed, City)
    answer = client.responses.parse(model=DEMO_NAME, input="Who?", text_format=City, max_output_tokens=LONG)
    assert isinstance(answer.output_parsed, City)


def test_openai_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=CHAT, tools=[WEATHER], tool_choice="required", **ONE_CALL) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert call.function.name == "get_weather"
    tool: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
    with client.responses.stream(
        model=DEMO_NAME, input="Who?", tools=[tool], tool_choice="required", parallel_tool_calls=False
    ) as events:
        (item,) = events.get_final_response().output
    assert item.type == "function_call"


def test_anthropic(server: Running) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the extra `clients` is not installed")
    client = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    request: dict[str, Any] = {
        "model": DEMO_NAME, "max_tokens": 100, "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
    }  # fmt: skip
    one_call = {"type": "any", "disable_parallel_tool_use": True}
    message = client.messages.create(messages=CHAT, tool_choice=one_call, **request)
    (call,) = message.content
    assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "get_weather")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    history = [*CHAT, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    with client.messages.stream(messages=history, tool_choice=one_call, **request) as stream:
        (call,) = stream.get_final_message().content
    assert call.input["city"] in ("Paris", "Rome")
    assert client.messages.count_tokens(model=DEMO_NAME, messages=CHAT).input_tokens > 0
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="other", max_tokens=1, messages=CHAT)
    assert caught.value.body["request_id"] == caught.value.response.headers["request-id"]
    beginning = client.messages.create(messages=[*CHAT, {"role": "assistant", "content": "He was"}], **request)
    assert beginning._request_id
    assert not beginning.content[0].text.startswith("He was")
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == (DEMO_NAME, "model", DEMO_NAME)
    assert client.models.retrieve(DEMO_NAME).created_at == model.created_at


@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai_default_output(server: Running, api: str) -> None:
    pytest.importorskip("pydantic_ai", reason="the extra `clients` is not installed")
    from pydantic_ai import Agent
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="unused")
    agent = Agent(getattr(models, api)(DEMO_NAME, provider=provider), output_type=City)
    settings: Any = {"max_tokens": 200, "parallel_tool_calls": False}
    assert isinstance(agent.run_sync("Where?", model_settings=settings).output, City)


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_openai_agents_tool_and_handoff(server: Running, api: str) -> None:
    agents = pytest.importorskip("agents", reason="the extra `clients` is not installed")
    agents.set_tracing_disabled(True)
    kind = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
    called: list[str] = []

    @agents.function_tool
    def now() -> str:
        """The time."""
        called.append("now")
        return "five"

    async def run(**options: Any) -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            model = kind(DEMO_NAME, client)
            if "handoffs" in options:  # the schema makes the demo model end
                settings = agents.ModelSettings(max_tokens=LONG)
                options["handoffs"] = [
                    agents.Agent(name="Other", model=model, model_settings=settings, output_type=City)
                ]
            forced = agents.ModelSettings(tool_choice="required", max_tokens=150, parallel_tool_calls=False)
            agent = agents.Agent(name="First", model=model, model_settings=forced, **options)
            return await agents.Runner.run(agent, "Where?", max_turns=3)

    result = asyncio.run(run(tools=[now], tool_use_behavior="stop_on_first_tool"))
    assert (called, result.final_output) == (["now"], "five")
    result = asyncio.run(run(handoffs=[]))
    assert result.last_agent.name == "Other"
    assert isinstance(result.final_output, City)


def test_instructor_default_mode(client: openai.OpenAI) -> None:
    instructor = pytest.importorskip("instructor", reason="the extra `clients` is not installed")
    made = instructor.from_openai(client).chat.completions.create(
        model=DEMO_NAME, response_model=City, messages=CHAT, max_tokens=LONG, max_retries=0
    )
    assert isinstance(made, City)


@pytest.mark.parametrize("use_responses", [False, True])
def test_langchain_bind_tools(server: Running, use_responses: bool) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="the extra `clients` is not installed")
    model = langchain.ChatOpenAI(
        model=DEMO_NAME, base_url=f"{server.url}/v1", api_key="unused", max_tokens=100,
        use_responses_api=use_responses, max_retries=0,
    )  # fmt: skip
    bound = model.bind_tools([WEATHER], tool_choice="any", parallel_tool_calls=False)
    (call,) = bound.invoke("Where?").tool_calls
    assert (call["name"], call["args"]["city"] in ("Paris", "Rome")) == ("get_weather", True)
    whole = None
    for chunk in bound.stream("Where?"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert [call["name"] for call in whole.tool_calls] == ["get_weather"]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm_tools(server: Running, provider: str) -> None:
    litellm = pytest.importorskip("litellm", reason="the extra `clients` is not installed")
    base = f"{server.url}/v1" if provider == "openai" else server.url
    response = litellm.completion(
        model=f"{provider}/{DEMO_NAME}", api_base=base, api_key="unused", messages=CHAT, tools=[WEATHER],
        tool_choice="required", parallel_tool_calls=False, max_tokens=100,
    )  # fmt: skip
    (call,) = response.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
