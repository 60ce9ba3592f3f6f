"""Talk to a running server with the openai package, as a stream.

    lockstep serve --port 8000
    python examples/chat_client.py [URL] [QUESTION]

If the server has keys, set OPENAI_API_KEY to one of them.
"""

from __future__ import annotations

import argparse
import os

from openai import APIConnectionError, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("question", nargs="?", default="And God said unto Noah,")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "unused"))
    try:
        model = client.models.list().data[0].id
    except APIConnectionError:
        raise SystemExit(f"no server at {args.url}; start one with lockstep serve") from None
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": args.question}],
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
