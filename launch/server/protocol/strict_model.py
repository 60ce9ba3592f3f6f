"""The base of all request models: strict types, and no field that would be ignored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

NEUTRAL_ONLY = "neutral only"  # marks a field that is not implemented: it takes only the values that change nothing


def _require_boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # pydantic takes 0.0 for Literal[False]
        raise ValueError("it must be a boolean")
    return value


FalseOnly = Annotated[Literal[False], BeforeValidator(_require_boolean)]
TrueOnly = Annotated[Literal[True], BeforeValidator(_require_boolean)]
NeutralFalse = Annotated[FalseOnly | None, NEUTRAL_ONLY]
NeutralTrue = Annotated[TrueOnly | None, NEUTRAL_ONLY]


class StrictModel(BaseModel):
    """A model without type coercion that refuses unknown fields, and unsupported fields that are not null."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _refuse_other_fields(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in self.UNSUPPORTED:
                raise PydanticCustomError("unknown_parameter", "unknown field", {"name": name})
            if value is not None:
                raise PydanticCustomError("unsupported_parameter", "unsupported field", {"name": name})
        return self
