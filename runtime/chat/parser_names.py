"""The names of the options that choose how answers are parsed; the module imports nothing slow."""

from __future__ import annotations

from typing import Literal

ToolCallParserName = Literal[
    "auto", "none", "response_template", "hermes", "qwen3_coder", "llama3_json", "mistral", "harmony", "glm45",
    "minimax_m2", "seed_oss",
]  # fmt: skip
ReasoningParserName = Literal[
    "auto", "none", "response_template", "qwen3", "deepseek_r1", "mistral", "harmony", "glm45", "minimax_m2",
    "seed_oss",
]  # fmt: skip
