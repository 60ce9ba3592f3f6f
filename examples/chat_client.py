"""Talk to a running server with the openai package, as a stream.

    lockstep serve --port 8000
    python examples/chat_client.py http://127.0.0.1:8000 "And God said unto Noah,"

If the server has keys, set OPENAI_API_KEY to one of them.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main() -> None:
    url, question = sys.argv[1], sys.argv[2]
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "unused"))
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 40},  # fields that OpenAI does not have take vLLM's names
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated")


if __name__ == "__main__":
    main()
