"""From a request of any chat API to its prompt, the parser of its answers, and the constraint that its tools make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from ...runtime.chat.chat_formats import CALL_FORMATS, ChatFormat, Thinking, find_format
from ...runtime.chat.output_parser import AnswerParser
from ...runtime.chat.tool_grammar import ToolRules
from ...runtime.chat.tool_schemas import ToolSchema
from ...runtime.structured_outputs import StructuredOutputsParams
from ...runtime.text_worker import MAX_TOKENS
from ..engine.async_tokenizer import AsyncTokenizer
from .api_errors import ApiError, from_validation_error, invalid
from .protocol.anthropic_models import CountTokensRequest
from .protocol.message_models import NamedTool
from .protocol.request_models import ChatRequest, TemplateFields, TokenizeRequest, fields_of
from .protocol.responses_models import ResponsesRequest
from .server_config import ServerConfig
from .tool_constraint import CheckGrammar, ToolConstraint

PROMPT_END_TOKENS = 256  # enough for the beginning of the assistant's turn


@dataclass(frozen=True)
class PreparedChat:
    """The prompt of a chat request, and the format of its answer.

    new_parser             returns the parser for one of the n answers; None if their text is content as it is
    keeps_special_tokens   the text of the answers must have special tokens, because markers are such tokens
    echo                   text that each answer repeats first
    """

    prompt: list[int]
    new_parser: Callable[[], AnswerParser | None]
    constraint: StructuredOutputsParams | None
    keeps_special_tokens: bool
    id_length: int
    echo: str


def as_chat(body: ResponsesRequest | CountTokensRequest) -> ChatRequest:
    """Return the chat that computes the answer to a request of another API; errors name fields of that request."""
    try:
        return ChatRequest.model_validate(body.chat_fields())
    except ValidationError as error:
        raise from_validation_error(error, fields_of(ChatRequest)) from None


class ChatPreparer:
    """Prepares chats in the model's format, which the options of the server or the chat template decide.

    Raises ValueError for options that do not fit the model.
    """

    def __init__(self, tokenizer: AsyncTokenizer, check_grammar: CheckGrammar, config: ServerConfig) -> None:
        source = tokenizer.source
        self.format = find_format(
            config.tool_call_parser, config.reasoning_parser, source.chat_template, source.response_template,
            source.special_tokens,
        )  # fmt: skip
        self._tokenizer, self._check_grammar = tokenizer, check_grammar
        self._template_kwargs = config.template_kwargs

    def check(self, body: ChatRequest) -> None:
        """Raise ApiError for fields that contradict each other, or that this model's format cannot serve."""
        names = [tool.function.name for tool in body.tools or ()]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise invalid("tools", f"has several tools named {min(repeated)!r}; give each one a name")
        for index, tool in enumerate(body.tools or ()):
            if (tool.function.parameters or {}).get("type", "object") != "object":
                raise invalid(f"tools[{index}].function.parameters", "must be a schema of type object")
        if body.tool_choice not in (None, "none", "auto") and not names:
            raise invalid("tool_choice", "needs tools")
        if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
            raise invalid(
                "tool_choice", f"names the tool {body.tool_choice.function.name[:64]!r}, which is not in tools"
            )
        if body.continue_final_message and body.add_generation_prompt:
            raise invalid("continue_final_message", "excludes add_generation_prompt; set one of them")
        if names and body.tool_choice != "none":
            self._check_format(body)

    def _check_format(self, body: ChatRequest) -> None:
        chosen = _is_required(body)
        if not self.format.has_tools and not chosen:
            message = (
                "its chat template shows no format of calls that is known; start the server with --tool-call-parser"
            )
            raise ApiError(
                400, f"This model cannot call tools: {message}.", param="tools", code="unsupported_parameter"
            )
        template = self.format.template
        if template is None or (reason := template.cannot_require if chosen else template.cannot_begin) is None:
            return
        strict = any(tool.function.strict for tool in body.tools or ())
        for field, is_set in (
            ("tool_choice", chosen), ("tools", strict), ("parallel_tool_calls", body.parallel_tool_calls is False)
        ):  # fmt: skip
            if is_set:
                rule = f"constrains calls, which this model's response_template does not allow: {reason}"
                raise invalid(
                    field, f"{rule}; use tool_choice auto without strict, or start the server with --tool-call-parser"
                )

    async def prompt(self, body: ChatRequest | TokenizeRequest, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Return the token ids of the conversation; refuses one that cannot fit into `max_tokens`."""
        messages = [self.format.message(message.for_template()) for message in body.messages or ()]
        return await self._tokenizer.encode_chat(
            messages, self._template_variables(body), max_tokens, add_special_tokens=bool(body.add_special_tokens)
        )

    async def prepare(self, body: ChatRequest, answer: StructuredOutputsParams | None, max_tokens: int) -> PreparedChat:
        """Return the prompt, the parser and the constraint; `answer` is the constraint of the answer's text.

        Raises ApiError for a tool that cannot be constrained although it must be.
        """
        ids, chat_format = await self.prompt(body, max_tokens), self.format
        tools = _callable_tools(body)
        if tools and not chat_format.has_tools:
            chat_format = replace(chat_format, calls=CALL_FORMATS["hermes"])  # the grammar makes any model write it
        end = await self._prompt_end(ids, body)
        continues_reasoning = _ends_in_reasoning(body, chat_format)
        thinking: Thinking = "open" if continues_reasoning else chat_format.thinking(end)
        constraint = await self._constraint(body, chat_format, tools, thinking, answer)
        return PreparedChat(
            ids,
            lambda: chat_format.parser(tools, end, in_reasoning=continues_reasoning),
            constraint,
            chat_format.needs_special_tokens(tools),
            chat_format.id_length,
            body.messages[-1].text if body.echo and body.messages[-1].role == "assistant" else "",
        )

    def _template_variables(self, body: TemplateFields) -> dict[str, Any]:
        """Return the arguments of the template: the server's, then those of the request."""
        options = dict(self._template_kwargs)
        if isinstance(body, ChatRequest) and body.reasoning_effort is not None:
            options["reasoning_effort"] = body.reasoning_effort
            if body.reasoning_effort == "none":
                options["enable_thinking"] = False
        options |= body.chat_template_kwargs or {}
        if tools := _listed_tools(body):
            options["tools"] = [tool.for_template() for tool in tools]
        if body.continue_final_message:
            return options | {"continue_final_message": True, "add_generation_prompt": False}
        return options | {"add_generation_prompt": body.add_generation_prompt is not False}

    async def _prompt_end(self, ids: Sequence[int], body: ChatRequest) -> str:
        if not self.format.has_reasoning:
            return ""
        tokens = ids if body.continue_final_message else ids[-PROMPT_END_TOKENS:]
        return await self._tokenizer.decode(tokens, skip_special_tokens=False)

    async def _constraint(
        self, body: ChatRequest, chat_format: ChatFormat, tools: Sequence[ToolSchema], thinking: Thinking,
        answer: StructuredOutputsParams | None,
    ) -> StructuredOutputsParams | None:  # fmt: skip
        """Return the constraint of calls and answer; schemas that no grammar can express are relaxed if they may be."""
        required = _is_required(body)
        if not tools and (answer is None or thinking == "closed"):
            return answer
        if chat_format.template and chat_format.template.cannot_begin and not required:
            tools = ()  # calls are parsed only
        if body.ignore_eos and answer is None and not required:
            return None  # a grammar ends with the EOS token
        if answer is not None:
            await self._check_grammar(answer)
        is_named = isinstance(body.tool_choice, NamedTool)  # one call, as in OpenAI's API
        rules = ToolRules(tools, required, body.parallel_tool_calls is not False and not is_named)
        return await ToolConstraint(self._check_grammar, chat_format, thinking, answer).build(rules)


def _listed_tools(body: TemplateFields) -> list[ToolSchema]:
    """Return the tools that the prompt lists."""
    is_none = isinstance(body, ChatRequest) and body.tool_choice == "none"
    return [] if is_none else [tool.function.schema_of_tool() for tool in body.tools or ()]


def _callable_tools(body: ChatRequest) -> list[ToolSchema]:
    """Return the tools that the model may call."""
    tools, choice = _listed_tools(body), body.tool_choice
    return [tool for tool in tools if tool.name == choice.function.name] if isinstance(choice, NamedTool) else tools


def _is_required(body: ChatRequest) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def _ends_in_reasoning(body: ChatRequest, chat_format: ChatFormat) -> bool:
    """Return whether the message to continue is within its reasoning."""
    if not body.continue_final_message or chat_format.reasoning is None:
        return False
    text = body.messages[-1].text
    return text.rfind(chat_format.reasoning.open) > text.rfind(chat_format.reasoning.close)
