"""The tools of a request, and their JSON schemas as grammars take them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..sampling.neutral_rules import VALUES, without_neutral_rules, without_rules

REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")
ANNOTATIONS = frozenset({"title", "description", "examples", "default", "$comment", "deprecated"})
TEXT_RULES = frozenset({"pattern", "format", "minLength", "maxLength", "$ref", "anyOf", "oneOf", "allOf", "not", "if"})
OBJECT_RULES = frozenset({
    "$ref", "anyOf", "oneOf", "allOf", "not", "if", "patternProperties", "minProperties", "propertyNames",
    "dependentRequired", "dependentSchemas", "unevaluatedProperties",
})  # fmt: skip


@dataclass(frozen=True)
class ToolSchema:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The parameters for a grammar: of type object, without annotations, and with the listed properties only."""
        schema: dict[str, Any] = closed(without_annotations(without_neutral_rules(self.parameters)))
        return {"type": "object"} | schema

    @property
    def text_parameters(self) -> frozenset[str]:
        """The parameters whose values are any text, or one of several texts."""
        properties = self.schema.get("properties")
        named = properties.items() if isinstance(properties, dict) else ()
        return frozenset(name for name, schema in named if is_text(schema))

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it, which is OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}

    def for_parser(self) -> dict[str, Any]:
        """Return the tool as transformers' parser takes it, which finds no types behind references."""
        properties = self.parameters.get("properties")
        if not isinstance(properties, dict):
            return self.for_template()
        resolved = {name: definition_of(schema, self.parameters) or schema for name, schema in properties.items()}
        return replace(self, parameters=self.parameters | {"properties": resolved}).for_template()


def definition_of(schema: Any, root: dict[str, Any]) -> Any:
    """Return the definition to which a schema refers and nothing else; None for other schemas."""
    reference = schema.get("$ref") if isinstance(schema, dict) and len(schema) == 1 else None
    match = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    definitions = root.get(match[1]) if match else None
    return definitions.get(match[2]) if match and isinstance(definitions, dict) else None


def parameters_of(schema: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Yield the name and the schema of each parameter, and whether it is required.

    Raises ValueError for rules beside the properties, which formats with a tag for each parameter cannot express.
    """
    if broken := OBJECT_RULES & schema.keys():
        raise ValueError(f"it has {min(broken)} beside its properties")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError("its properties are no object, or its required ones are no list")
    if not all(isinstance(name, str) for name in required):
        raise ValueError("its required properties are not all named by texts")
    for name in dict.fromkeys([*properties, *required]):
        yield name, properties.get(name, True), name in required


def with_definitions(schema: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a part of the arguments, with the definitions to which it refers.

    Raises ValueError for the schema false, and for a reference to another place, which the part does not have.
    """
    if schema is False:
        raise ValueError("a required parameter has the schema false, so that no call is valid")
    if not isinstance(schema, dict):
        return dict(definitions)
    for reference in _references([schema, definitions]):
        if not REFERENCE.match(str(reference)):
            raise ValueError(f"its $ref {str(reference)!r:.64} is neither in $defs nor in definitions")
    return schema | definitions


def _references(schemas: Sequence[Any]) -> Iterator[Any]:
    for schema in schemas:
        if isinstance(schema, dict):
            if "$ref" in schema:
                yield schema["$ref"]
            yield from _references([value for name, value in schema.items() if name not in VALUES])
        elif isinstance(schema, list):
            yield from _references(schema)


def without_annotations(schema: Any) -> Any:
    """Return a JSON schema without titles, descriptions and the like, which agents send by the 10,000 characters."""
    return without_rules(schema, lambda rule, value: rule in ANNOTATIONS)


def closed(schema: Any) -> Any:
    """Return a schema whose objects have only the properties that it lists, where that is the schema's own choice.

    The values that it allows are a part of those before. Schemas that apply together with others are left as they are.
    """
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {key: closed(item) for key, item in schema["properties"].items()}
    if "items" in schema:
        made["items"] = closed(schema["items"])
    if "properties" in schema and not (OBJECT_RULES | {"additionalProperties"}) & schema.keys():
        made["additionalProperties"] = False
    if isinstance(schema.get("anyOf"), list) and not {"properties", "$ref", "allOf"} & schema.keys():
        made["anyOf"] = [closed(item) for item in schema["anyOf"]]
    return made


def is_text(schema: Any) -> bool:
    """Return whether a parameter's value is a string that XML formats write without quotes."""
    if not isinstance(schema, dict) or schema.get("type") != "string" or TEXT_RULES & schema.keys():
        return False
    return all(isinstance(text, str) and text.strip("\n") == text for text in text_choices(schema) or ())


def text_choices(schema: dict[str, Any]) -> Sequence[Any] | None:
    """Return the only values of a schema, if it lists them."""
    if "const" in schema:
        return [schema["const"]]
    choices = schema.get("enum")
    return choices if isinstance(choices, list) else None
