"""Generate offline: a batch of prompts, a stream, and a conversation.

    python examples/offline.py [MODEL] [--tp N]

Without MODEL the bundled demo model runs, on a CPU too.
"""

from __future__ import annotations

import argparse

from lockstep import LLM, Config, SamplingParams
from lockstep.runtime.outputs import RequestOutput


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=Config().model)
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()

    params = SamplingParams(temperature=0.8, max_tokens=32, seed=1)
    with LLM(args.model, tensor_parallel_size=args.tp) as llm:
        # A prompt is a text or a list of token ids; results come in the order of the prompts.
        prompts = ["In the beginning", "And the king said unto", llm.tokenizer.encode("Blessed is the man")]
        for result in llm.generate(prompts, params, use_tqdm=False):
            output = result.outputs[0]
            print(f"{len(result.prompt_token_ids)} prompt tokens -> {output.text!r} ({output.finish_reason})")

        # A stream yields new text as soon as it is final, then the whole result.
        for event in llm.stream("The LORD is my", params):
            if isinstance(event, RequestOutput):
                print(f"\n{len(event.outputs[0].token_ids)} tokens")
            else:
                print(event.text, end="", flush=True)

        # A conversation goes through the model's chat template.
        answer = llm.chat([{"role": "user", "content": "And God said unto Noah,"}], params, use_tqdm=False)[0]
        print(f"chat: {answer.outputs[0].text!r}")


if __name__ == "__main__":
    main()
