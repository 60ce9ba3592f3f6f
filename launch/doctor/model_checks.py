"""Checks of the model: tensor-parallel size, checkpoint, tokenizer and memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import tokenizers

from ...comm.message_text import first_line, format_bytes
from ...runtime.config import Config
from ...runtime.memory.memory_plan import MemoryPlan, check_kv_cache, check_weights, plan_weights
from ...runtime.model.checkpoint import fit_weights
from ...runtime.model.generation_config import RECOMMENDED, default_sampling_params, generation_fields
from ...runtime.model.model_config import ModelConfig
from ...runtime.model.tensor_files import TensorFiles
from ...runtime.model.tokenizer_files import check_tokenizer_files
from ...runtime.sampling_params import SamplingParams
from ...runtime.tokenizer import Tokenizer
from ...runtime.tokenizer_loader import check_backend
from .finding import Finding, fail, ok, warn
from .planned_start import PlannedStart


def check_tensor_parallel(start: PlannedStart) -> Finding:
    """Check that the model can be split over the ranks."""
    model, ranks = start.model, start.config.tensor_parallel_size
    model.check_tensor_parallel(ranks)
    experts = f"; {model.experts.note(ranks)}" if model.experts is not None and model.experts.parallel else ""
    return ok(f"{ranks}, and at most {model.max_tensor_parallel_size} are possible{experts}")


def check_checkpoint(start: PlannedStart) -> Finding:
    """Check that the headers of the checkpoint's files fit config.json."""
    if start.config.load_format == "dummy":
        return ok("skipped: load_format is dummy")
    model = fit_weights(ModelConfig.from_config_file(start.folder), start.folder)
    with ExitStack() as stack:
        files = TensorFiles(start.folder, "np", stack).paths
    size = format_bytes(sum(file.stat().st_size for file in files))
    return ok("; ".join((f"{len(files)} safetensors, {size}, headers fit config.json", *model.notes)))


def check_generation_config(start: PlannedStart) -> Finding:
    """Check the sampling defaults that the checkpoint recommends."""
    choice = start.config.generation_config
    generation_fields(start.folder, choice).integers("eos_token_id")
    params, plain = default_sampling_params(start.folder, choice), SamplingParams()
    values = {name: getattr(params, name) for name in RECOMMENDED.values()}
    changed = [f"{name} {value}" for name, value in values.items() if value != getattr(plain, name)]
    return ok(f"{', '.join(changed) or 'no recommendation'}, generation_config={choice}")


def check_tokenizer(start: PlannedStart) -> Finding:
    """Check that the tokenizer can be loaded."""
    check_tokenizer_files(start.folder)
    path = start.folder / "tokenizer.json"
    if not path.is_file():
        Tokenizer(start.folder)
        return ok("no tokenizer.json, so transformers converts what there is at every start")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))  # transformers, which only wraps it, takes two seconds
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception
        return fail(
            f"{path} cannot be read by tokenizers {tokenizers.__version__} ({first_line(error)})",
            "fetch the file again, or install the version that wrote it",
        )
    check_backend(backend, start.folder)
    return ok(f"tokenizer.json, {backend.get_vocab_size():,} tokens")


def check_memory(start: PlannedStart) -> Finding:
    """Check that weights and KV cache fit into the memory of a rank."""
    model, config = start.model, start.config
    resolved = config.resolved(model, cuda=start.gpus > 0)
    plan = plan_weights(resolved, model)
    if start.gpus:
        from ...runtime.memory import gpu  # imports torch

        plans = [gpu.plan_on_gpu(plan, resolved, device) for device in gpu.devices(start.gpus)]
        plan = min(plans, key=lambda plan: plan.room or 0)
    if resolved.device == "cuda" and plan.total is None:
        weights = format_bytes(plan.weights)
        return warn(f"{weights} of weights on each rank, and no GPU here to hold them", "see devices")
    return memory_finding(config, resolved, plan, _available_host_memory())


def memory_finding(config: Config, resolved: Config, plan: MemoryPlan, host: int) -> Finding:
    """Return the finding for the plan of the rank with the least room; `host`: available bytes for ranks on CPUs."""
    check_weights(plan)
    plan = plan.with_pages(resolved)
    check_kv_cache(config, plan)
    assert resolved.max_model_len is not None
    context = plan.longest_context(resolved.max_model_len)
    reserve = "" if plan.total is None else ", less what graphs and activations will take"
    text = (
        f"each rank on {plan.place}: {format_bytes(plan.weights)} of weights, {format_bytes(plan.kv_cache)} of KV cache"
        f" for {plan.tokens:,} tokens{reserve}, longest context {context:,}"
    )
    needed = (plan.weights + plan.kv_cache) * resolved.tensor_parallel_size
    if plan.total is None and needed > host:
        total = f"in all {format_bytes(needed)}, and {format_bytes(host)} are available"
        return warn(f"{text}; {total}", "lower --kv-cache-memory")
    if context < resolved.max_model_len:
        return warn(f"{text} of the model's {resolved.max_model_len:,}", "give the KV cache more room")
    return ok(text)


def _available_host_memory() -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 2**10
