"""A scripted engine that plays the model of an agent."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.outputs import Event
from lockstep.runtime.request import NO_ORIGIN, Origin, PromptFields
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import FakeService


class ScriptedAgent(FakeService):
    """Calls one tool, and says that it is done when it gets the result."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        super().__init__(Tokenizer(Path(DEMO_MODEL)))
        self.limits = replace(self.limits, max_model_len=1_000_000, num_pages=100_000)
        self.call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    async def generate(
        self, prompt: Sequence[int] | PromptFields, params: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> AsyncGenerator[Event, None]:
        assert not isinstance(prompt, dict), "agents send no salt"
        text = self._sync.decode(list(prompt), skip_special_tokens=False)
        self.script = "Done." if "<tool_response>" in text[text.rindex("<|user|>") :] else self.call
        async for event in super().generate(prompt, params, origin):
            yield event
