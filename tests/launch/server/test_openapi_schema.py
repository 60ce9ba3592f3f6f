"""The API against its own OpenAPI schema, with generated requests within and outside of it."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from fake_engine import Running, fake

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection, unsupported_method,
]  # fmt: skip


POSTS = [
    "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/responses", "POST /v1/messages",
    "POST /v1/messages/count_tokens", "POST /tokenize", "POST /detokenize",
]  # fmt: skip
GETS = [
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /version",
    "GET /metrics",
    "GET /tokenizer_info",
]  # they take no input
WITHIN, OUTSIDE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("mode", "route"),
    [(WITHIN, route) for route in POSTS + GETS] + [(OUTSIDE, route) for route in POSTS],
    ids=lambda v: v.value if isinstance(v, GenerationMode) else v,
)
def test_api_conforms_to_its_openapi_schema(shared: Running, mode: GenerationMode, route: str) -> None:
    schema = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")
    operations = {operation.label: operation for operation in (result.ok() for result in schema.get_all_operations())}
    assert set(operations) == {*POSTS, *GETS}
    statuses: list[int] = []

    # Few random bodies fit the model, too: of those within the schema more are tried.
    @settings(
        max_examples=max(10, settings().max_examples // (2 if mode is WITHIN else 4)),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operations[route].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is WITHIN and isinstance(case.body, dict) and "/v1/messages" in route:
            case.body["model"] = "demo"  # no random name is that of a model
        statuses.append(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

    check()
    success = 404 if "{name}" in route else 200  # no random name is that of a model
    assert (success if mode is WITHIN else 400) in statuses
    assert fake(shared).live == 0


def test_routes_document_their_errors(shared: Running) -> None:
    described = shared.http.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        (operation,) = methods.values()
        assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(operation["responses"]), path
        assert "422" not in operation["responses"]
