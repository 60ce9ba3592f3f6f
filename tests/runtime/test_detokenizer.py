"""Incremental detokenization against transformers' decode of the whole, over tokenizers of every kind."""

from __future__ import annotations

import re
from copy import copy
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.detokenizer import Detokenizer, TokenBytes, locate_tokens
from lockstep.runtime.tokenizer import Tokenizer

from small_tokenizers import PADDED, SMALL_TOKENIZERS

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WITH_BYTES = {"llama", "gemma", "unigram-bytes"}
kinds = pytest.mark.parametrize("kind", SMALL_TOKENIZERS)


@cache
def transformers_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=SMALL_TOKENIZERS[kind]())


@cache
def token_bytes(kind: str) -> TokenBytes:
    return TokenBytes(SMALL_TOKENIZERS[kind]())


@cache
def id_lists(kind: str, max_size: int = 14) -> st.SearchStrategy[list[int]]:
    """Ids with as many special, unknown and text tokens as bytes, which would be nearly all of the vocabulary."""
    tokenizer = SMALL_TOKENIZERS[kind]()
    size = tokenizer.get_vocab_size()
    others = [i for i in range(size) if not re.match("<0x|^.$", tokenizer.id_to_token(i) or "")]
    in_characters = [i for i in range(size) if tokenizer.id_to_token(i) in {"<0xE2>", "<0x82>", "<0xAC>", "<0x20>"}]
    ids = st.sampled_from(others) | st.integers(0, size - 1) | st.integers(size, PADDED)
    return st.lists(ids | st.sampled_from(in_characters) if in_characters else ids, max_size=max_size)


def expected_text(kind: str, ids: list[int], *, skip: bool) -> str:
    """The text of `ids` by transformers; a run of byte tokens by brute force, as valid characters are shown at once."""
    tokenizer = transformers_tokenizer(kind)
    if kind not in WITH_BYTES:
        return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))
    backend = tokenizer.backend_tokenizer
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    names = [backend.id_to_token(i) for i in ids if not (skip and i in special)]
    data = b"".join(
        bytes.fromhex(name[3:5]) if re.fullmatch("<0x..>", name) else name.replace("▁", " ").encode()
        for name in names if name is not None
    )  # fmt: skip
    text = decode_bytes(data)
    return text.removeprefix(" ") if kind != "gemma" else text


def decode_bytes(data: bytes) -> str:
    """Valid characters, and one replacement character for every other byte."""
    text, start = "", 0
    while start < len(data):
        for length in (1, 2, 3, 4):
            try:
                text, start = text + data[start : start + length].decode(), start + length
                break
            except UnicodeDecodeError:
                continue
        else:
            text, start = text + REPLACEMENT, start + 1
    return text


def pieces_of(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@kinds
@given(data=st.data(), skip=st.booleans())
def test_pieces_join_to_decode_of_the_whole(kind: str, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(id_lists(kind))
    pieces = pieces_of(Detokenizer(token_bytes(kind), skip_special_tokens=skip), ids)
    assert pieces == expected_text(kind, ids, skip=skip)


@pytest.mark.parametrize("kind", sorted(WITH_BYTES))
@given(data=st.data(), skip=st.booleans())
def test_valid_byte_tokens_equal_transformers(kind: str, data: st.DataObject, skip: bool) -> None:
    """The brute force above is what transformers does, as long as runs of byte tokens are valid UTF-8."""
    tokenizer, backend = transformers_tokenizer(kind), SMALL_TOKENIZERS[kind]()
    others = [i for i in range(backend.get_vocab_size()) if "<0x" not in (backend.id_to_token(i) or "")]
    character = st.characters(exclude_categories=["Cs"]).map(
        lambda c: [backend.token_to_id(f"<0x{byte:02X}>") for byte in c.encode()]
    )
    parts = data.draw(st.lists(character | st.sampled_from([*others, PADDED]).map(lambda i: [i]), max_size=20))
    ids = [i for part in parts for i in part]
    whole = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert pieces_of(Detokenizer(token_bytes(kind), skip_special_tokens=skip), ids) == whole
    assert expected_text(kind, ids, skip=skip) == whole


@kinds
@given(data=st.data(), skip=st.booleans())
def test_output_continues_the_prompt(kind: str, data: st.DataObject, skip: bool) -> None:
    """Prompt and output together read as one text; the beginning of a character in the prompt comes with its rest."""
    prompt, output = data.draw(id_lists(kind)), data.draw(id_lists(kind))
    whole = Detokenizer(token_bytes(kind), skip_special_tokens=skip)
    before = "".join(map(whole.push, prompt))
    known = [i for i in prompt if token_bytes(kind)[i]]
    assume(not known or known[-1] not in whole.skipped_ids or whole.flush() == "")  # it ends the character before it
    whole = Detokenizer(token_bytes(kind), skip_special_tokens=skip)
    detokenizer = Detokenizer(token_bytes(kind), prompt, skip_special_tokens=skip)
    another = copy(detokenizer)
    expected = pieces_of(whole, prompt + output).removeprefix(before)
    assert pieces_of(detokenizer, output) == expected
    assert pieces_of(another, output) == expected, "the outputs of a prompt share nothing"


@kinds
@given(data=st.data(), skip=st.booleans())
def test_offsets_and_bytes_of_tokens(kind: str, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(id_lists(kind))
    detokenizer, starts, pieces, text = Detokenizer(token_bytes(kind), skip_special_tokens=skip), [], [], ""
    for token in ids:
        piece, num_before = detokenizer.peek(token)
        starts.append(len(text) + num_before)
        pieces.append(piece)
        text += detokenizer.push(token)
    text += detokenizer.flush()
    assert b"".join(pieces).decode(errors=token_bytes(kind).errors) == text
    assert starts == sorted(starts)
    for start, piece in zip(starts, pieces, strict=True):
        shown = piece.decode(errors=token_bytes(kind).errors)
        if REPLACEMENT not in shown:
            assert text[start:].startswith(shown)


def test_issue_of_skipped_tokens() -> None:
    tokenizer = SMALL_TOKENIZERS["llama"]()
    names = ["▁Hello", "[TOOL]", "▁world", "</s>", "▁good", "day"]
    ids = [tokenizer.token_to_id(name) for name in names]
    assert pieces_of(Detokenizer(token_bytes("llama")), ids) == "Hello world goodday"
    with_unknown = [i for pair in zip(ids, [PADDED] * len(ids), strict=True) for i in pair]
    assert pieces_of(Detokenizer(token_bytes("llama")), with_unknown) == "Hello world goodday"
    shown = Detokenizer(token_bytes("llama"), skip_special_tokens=False)
    assert pieces_of(shown, ids) == "Hello[TOOL] world</s> goodday"


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_characters_of_several_tokens_come_at_once(kind: str) -> None:
    tokenizer = SMALL_TOKENIZERS[kind]()
    names = ["<0xE2>", "<0x82>", "<0xAC>"] if kind == "llama" else ["â", "Ĥ", "¬"]
    ids = [tokenizer.token_to_id(name) for name in names]
    detokenizer = Detokenizer(token_bytes(kind))
    assert [detokenizer.push(i) for i in [*ids, *ids]] == ["", "", "€"] * 2, "a valid character is not taken back"
    assert [detokenizer.push(ids[0]), detokenizer.flush()] == ["", REPLACEMENT]
    assert [detokenizer.push(i) for i in ids[1:]] == [REPLACEMENT] * 2, "nothing is carried over a flush"
    for split in (1, 2):
        completion = Detokenizer(token_bytes(kind), [1, *ids[:split]])
        assert pieces_of(completion, ids[split:]) == "€", "the prompt ends within the character"
    assert pieces_of(Detokenizer(token_bytes(kind), ids), []) == ""


@given(text=st.text(max_size=60), prompt=st.text(max_size=10))
def test_texts_come_back(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer.token_bytes, tokenizer.encode(prompt))
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert all(REPLACEMENT not in p for p in pieces) or REPLACEMENT in text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(DEMO_MODEL))


# -- the places of a prompt's tokens


@kinds
@given(data=st.data())
def test_places_in_a_prompt_of_ids(kind: str, data: st.DataObject) -> None:
    ids = data.draw(id_lists(kind))
    located = locate_tokens(token_bytes(kind), ids)
    detokenizer = Detokenizer(token_bytes(kind), skip_special_tokens=False)
    assert located.text == "".join(map(detokenizer.push, ids)), "the beginning of a character comes with the output"
    for offset, piece in zip(located.offsets, located.pieces, strict=True):
        shown = piece.decode(errors="replace")
        assert REPLACEMENT in shown or located.text[offset:].startswith(shown)


@given(text=st.text(max_size=40))
def test_places_in_a_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    located = locate_tokens(tokenizer.token_bytes, ids, text)
    assert located.text == text
    assert located.offsets[:1] == [0]
    assert tokenizer.token_bytes[ids[0]] == b"<|bos|>", "it is in no prompt and has the place of the token after it"
    assert b"".join(located.pieces[1:]).decode() == text
    for offset, piece in zip(located.offsets[1:], located.pieces[1:], strict=True):
        shown = piece.decode(errors="replace")
        assert REPLACEMENT in shown or text[offset:].startswith(shown)


def test_places_of_tokens_after_a_space_that_the_tokenizer_adds() -> None:
    tokenizer = SMALL_TOKENIZERS["llama"]()
    ids = [tokenizer.token_to_id(name) for name in ("<s>", "▁Hello", "▁world", "</s>", "▁good")]
    located = locate_tokens(token_bytes("llama"), ids, "Hello world</s> good")
    assert located.pieces == [b"<s>", b"Hello", b" world", b"</s>", b" good"]
    assert located.offsets == [0, 0, 5, 11, 15]
    assert locate_tokens(token_bytes("llama"), ids).text == "<s> Hello world</s> good"
    lower = locate_tokens(token_bytes("llama"), ids[1:3], "HELLO WORLD")
    assert lower.offsets == [0, 5], "lengths of the tokens, where the text is not theirs"
