"""Constrain outputs: a JSON schema, a regular expression, a choice.

    python examples/structured.py [MODEL]

The demo model writes nonsense, but nonsense that matches.
"""

from __future__ import annotations

import json
import sys

from lockstep import LLM, Config, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 969},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "json": StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    "regex": StructuredOutputsParams(regex=r"[A-Z][a-z]{2,8} begat [A-Z][a-z]{2,8}"),
    "choice": StructuredOutputsParams(choice=["yea", "nay"]),
}


def main() -> None:
    with LLM(sys.argv[1] if len(sys.argv) > 1 else Config().model) as llm:
        for kind, constraint in CONSTRAINTS.items():
            params = SamplingParams(temperature=0.7, max_tokens=128, seed=3, structured_outputs=constraint)
            output = llm.generate("And his son was", params, use_tqdm=False)[0].outputs[0]
            print(f"{kind}: {output.text} ({output.finish_reason})")
            if kind == "json" and output.finish_reason == "stop":
                print("parsed:", json.loads(output.text))


if __name__ == "__main__":
    main()
