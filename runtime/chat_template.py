"""Chat templates: a conversation becomes the text of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..comm.message_text import first_line

MAX_REASON = 300  # characters of a template's error that a message repeats

Message = dict[str, Any]
RESERVED_TEMPLATE_KWARGS = frozenset({  # arguments of transformers' functions, and what templates always get
    "conversation", "conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "self",
})  # fmt: skip


def render_chat(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    """Return the text of a conversation in a Jinja template.

    variables  JSON values for the template, and the arguments of transformers' apply_chat_template:
               add_generation_prompt, continue_final_message, tools, documents
    Keys of messages whose value is None are left out. Raises ValueError if the template rejects the messages or fails.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # takes 1 s to import

    try:
        conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
        texts, _ = render_jinja_template(conversations=[conversation], chat_template=template, **variables)
    except Exception as error:  # a template is a program: it raises any class
        reason = first_line(error)[:MAX_REASON]
        raise ValueError(f"the chat template does not accept these messages: {reason}") from error
    return str(texts[0])
