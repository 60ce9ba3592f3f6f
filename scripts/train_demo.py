"""Train the demo model of launch/demo, a small Llama on the King James Bible, in minutes.

    apt-get install bible-kjv && bible -f 'Gen1:1-Rev22:21' > kjv.txt
    python scripts/train_demo.py --text kjv.txt --output launch/demo

The only input is a text in the public domain with one verse a line, `Ge1:1 In the beginning ...`. A document is a
passage of a chapter, plain or as a dialogue of a user and an assistant. It ends with <|eos|>, so the model learns to
stop, and to answer with a verse. Every epoch cuts the chapters at new places. The output has the layout of Hugging
Face's `LlamaForCausalLM`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
BOS, EOS, USER, ASSISTANT = range(4)  # the ids of SPECIAL_TOKENS

CONTEXT = 2048  # tokens of a training row; the model sees no later position
CONFIG: dict[str, Any] = {  # keys as transformers 4 writes them; transformers 5 reads them too
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,  # splits over 1, 2 and 4 ranks
    "num_key_value_heads": 2,  # with 4 ranks, two share each one
    "head_dim": 64,  # the smallest that FlashInfer compiles
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.08,  # about hidden_size ** -0.5; from 0.02 attention takes hundreds of steps to form
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "bfloat16",
}
GENERATION = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.7, "top_p": 0.9}

CHAT_TEMPLATE = (  # builds the text of `dialogue`; a system message looks like the user's, tools are in Hermes format
    "{{ bos_token }}{% if tools %}{{ '<|user|># Tools\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    '{{ \'Answer with <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call> to call one.\n\' }}{% endif %}'
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

PASSAGE_VERSES = (1, 2, 3, 4, 5, 20)  # all equally likely: short ones teach ends, long ones teach context
DIALOGUE_SHARE = 0.33  # share of the passages of two verses and more
VALIDATION_STRIDE = 20  # every 20th chapter is held out

PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1.5  # strong, because the run has dozens of epochs over four megabytes
WARMUP = 0.02  # share of the run

Verse = list[int]


def main() -> None:
    args = parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    chapters = read_chapters(args.text)
    held_out = chapters[VALIDATION_STRIDE - 1 :: VALIDATION_STRIDE]
    trained_on = [chapter for i, chapter in enumerate(chapters, 1) if i % VALIDATION_STRIDE]
    tokenizer = train_tokenizer(trained_on)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float().to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")
    train(model, tokenizer, trained_on, held_out, args)

    model.to(torch.bfloat16)
    print(f"validation in bf16: {bits_per_byte(model, tokenizer, held_out):.4f} bits per byte")
    save(model, tokenizer, args.output)
    print_samples(model, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="one verse a line, after its reference")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--device", default="auto", help="auto takes CUDA where there is one")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end after this time, with the learning rate decayed"
    )
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {CONTEXT} tokens in a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def read_chapters(path: Path) -> list[list[str]]:
    """Return the verses of each chapter, in order, without their references."""
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    by_chapter = groupby(lines, key=lambda line: line[0].rsplit(":", 1)[0])
    return [[verse.strip() for _, verse in chapter] for _, chapter in by_chapter]


def train_tokenizer(chapters: list[list[str]]) -> Tokenizer:
    """Train byte-level BPE, which encodes and decodes every text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(chapter) for chapter in chapters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def batches(chapters: list[list[Verse]], newline: int, rows: int, device: str) -> Iterator[Tensor]:
    """Yield [rows, CONTEXT + 1] of concatenated documents without end; each row starts at the start of a document."""
    span = torch.arange(CONTEXT + 1, device=device)
    while True:
        stream = torch.tensor(list(chain.from_iterable(documents(chapters, newline))), device=device)
        starts = (stream[: -len(span)] == BOS).nonzero()  # [documents, 1]
        for _ in range(len(stream) // (rows * CONTEXT)):
            row_starts = starts[torch.randint(len(starts), (rows,), device=device)]
            yield stream[row_starts + span]


def documents(chapters: list[list[Verse]], newline: int) -> list[list[int]]:
    """Return the chapters cut into passages of random lengths, plain or as dialogues, in random order."""
    passages = [passage for chapter in chapters for passage in cut(chapter)]
    random.shuffle(passages)
    return [
        dialogue(verses) if len(verses) > 1 and random.random() < DIALOGUE_SHARE else [BOS, *join(verses, newline), EOS]
        for verses in passages
    ]


def dialogue(verses: list[Verse]) -> list[int]:
    """Return the verses as questions and answers by turns; a last question without an answer is left out."""
    exchanges = zip(verses[::2], verses[1::2], strict=False)
    return [BOS, *chain.from_iterable([USER, *question, ASSISTANT, *answer, EOS] for question, answer in exchanges)]


def cut(chapter: list[Verse]) -> Iterator[list[Verse]]:
    start = 0
    while start < len(chapter):
        stop = start + random.choice(PASSAGE_VERSES)
        yield chapter[start:stop]
        start = stop


def join(verses: list[Verse], newline: int) -> list[int]:
    return [token for verse in verses for token in (newline, *verse)][1:]


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    trained_on: list[list[str]],
    held_out: list[list[str]],
    args: argparse.Namespace,
) -> None:
    """Train with AdamW; the learning rate reaches zero at the last step or the last minute, whichever is first."""
    chapters = [[verse.ids for verse in tokenizer.encode_batch(c, add_special_tokens=False)] for c in trained_on]
    [newline] = tokenizer.encode("\n", add_special_tokens=False).ids
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    started = time.monotonic()
    for step, rows in enumerate(batches(chapters, newline, args.rows, args.device), 1):
        elapsed_s = time.monotonic() - started
        progress = max(step / args.steps, elapsed_s / (60 * args.minutes))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # [rows, CONTEXT, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or progress >= 1:
            validation = bits_per_byte(model, tokenizer, held_out)
            print(f"step {step}  {elapsed_s:.0f} s  loss {loss.item():.3f}  validation {validation:.4f} bits per byte")
        if progress >= 1:
            return


def learning_rate(progress: float) -> float:
    """Return the learning rate: a linear warm-up, then a cosine to zero at progress 1."""
    return PEAK_LEARNING_RATE * min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, chapters: list[list[str]]) -> float:
    """Return the cost in bits per byte of text; each chapter is a document with <|eos|>, cut off at CONTEXT tokens."""
    nats, num_bytes = 0.0, 0
    for chapter in chapters:
        ids = [*tokenizer.encode("\n".join(chapter)).ids, EOS][:CONTEXT]
        row = torch.tensor([ids], device=model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        nats += F.cross_entropy(logits.float(), row[0, 1:], reduction="sum").item()
        num_bytes += len(tokenizer.decode(ids).encode())
    return nats / math.log(2) / num_bytes


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[BOS],
            "eos_token": SPECIAL_TOKENS[EOS],
            "pad_token": SPECIAL_TOKENS[EOS],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def print_samples(model: LlamaForCausalLM, folder: Path) -> None:
    """Print two continuations and one answer, generated from the saved tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "Who is the king of this land?"}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    for prompt in ("<|bos|>In the beginning", "<|bos|>And the king said unto", chat):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, pad_token_id=EOS, **GENERATION
        )
        print(f"--- {tokenizer.decode(out[0])}")


if __name__ == "__main__":
    main()
