"""Checks that read all of a checkpoint: every tensor, and the chat template. They import torch and transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

from ...comm.message_text import first_line, format_bytes
from ...runtime.model.checkpoint import read_model
from ...runtime.model.tensor_files import TensorFiles, not_finite
from ..signals import signals_wait
from .finding import Finding, fail, ok, warn
from .planned_start import PlannedStart

READ_S = 30.0  # only the weights that can be read in this time are checked
UNREAD_BYTES = 100 * 2**20  # headers and unused tensors may take this much of the files


def check_weights(start: PlannedStart) -> Finding:
    """Check that every tensor has its name and shape, and that its numbers are finite."""
    if start.config.load_format == "dummy":
        return ok("skipped: load_format is dummy")
    with signals_wait():
        import torch

        from ...comm.base import SingleRank
        from ...runtime.model.decoder import Decoder
        from ...runtime.model.weights import check_files, is_finite

    model = read_model(start.config, start.folder)
    decoder = Decoder(model, SingleRank(), dtype=torch.bfloat16, device=torch.device("meta"), max_positions=1)
    with ExitStack() as stack:
        tensors = TensorFiles(start.folder, "pt", stack)
        check_files(decoder.weights, tensors)
        wrong, num_bytes = list[str](), 0
        for name in _within(tensors, READ_S):
            tensor = tensors[name][...]
            num_bytes += tensor.nbytes
            if not is_finite(tensor):
                wrong.append(name)
    if wrong:
        message, _, remedy = not_finite(tensors.path(wrong[0]), wrong).partition("; ")
        return fail(message, remedy)
    total = sum(path.stat().st_size for path in tensors.paths)
    part = "all" if total - num_bytes < UNREAD_BYTES else f"the first {format_bytes(num_bytes)} of"
    return ok(f"{len(tensors)} tensors with the names and shapes of config.json; {part} {format_bytes(total)} finite")


def check_chat_template(start: PlannedStart) -> Finding:
    """Check that the chat template is valid Jinja."""
    with signals_wait():
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        from ...runtime.tokenizer_loader import load_tokenizer

        template = load_tokenizer(start.folder).chat_template
    if not template:
        return ok("none: the model has no chats")
    templates = template if isinstance(template, dict) else {"": template}
    for name, text in templates.items():
        try:
            _compile_jinja_template(text)
        except TemplateSyntaxError as error:
            finding = f"the chat template {name} is not valid Jinja: line {error.lineno}: {first_line(error)}"
            return warn(finding.replace("  ", " "), "fetch the file again, or give another one with --chat-template")
    return ok(f"{len(templates)} templates" if len(templates) > 1 else "valid Jinja")


def _within(names: TensorFiles, seconds: float) -> Iterator[str]:
    until = time.monotonic() + seconds
    for name in names:
        if time.monotonic() > until:
            return
        yield name
