"""The other chat APIs as chats: their requests become a ChatRequest, and errors name the fields of the request."""

from __future__ import annotations

from pydantic import ValidationError

from .api_errors import from_validation_error
from .protocol.anthropic_models import CountTokensRequest
from .protocol.request_models import ChatRequest, fields_of
from .protocol.responses_models import ResponsesRequest


def as_chat(body: ResponsesRequest | CountTokensRequest) -> ChatRequest:
    """Return the chat that computes the answer to a request of another API; raises ApiError."""
    try:
        return ChatRequest.model_validate(body.chat_fields())
    except ValidationError as error:
        raise from_validation_error(error, fields_of(ChatRequest)) from None
