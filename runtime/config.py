"""The options of the runtime in one frozen dataclass; the command line is generated from its fields.

The help text of a field says its unit. "auto" and None are resolved once, into a new Config (`resolved`), never by
writing to a frozen one. No field is read from the environment, except RAY_ADDRESS where `ray_address` is None.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args, get_type_hints

from ..comm.all_reduce_names import AllReduceChoice

if TYPE_CHECKING:  # `lockstep --help` needs no torch
    import torch

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
KVLayout = Literal["layer-first", "page-first"]
LoadFormat = Literal["auto", "dummy"]
QuantizationChoice = Literal["auto", "fp8"]
KVCacheDType = Literal["auto", "fp8"]
SchedulingPolicy = Literal["fair", "fcfs", "priority"]
AttentionChoice = Literal["auto", "flashinfer", "torch"]

DEMO_MODEL = str(Path(__file__).parent.parent / "launch" / "demo")
DEMO_NAME = "lockstep-demo"  # its name in the API of a server


class ModelDefaults(Protocol):
    """The facts of a checkpoint that resolve a Config."""

    @property
    def dtype(self) -> str: ...

    @property
    def max_position_embeddings(self) -> int: ...


def option(
    default: Any, help: str, *flags: str, low: float | None = None, high: float | None = None, envvar: str | None = None
) -> Any:
    """Return a field of options with its help text.

    flags      further spellings beside the field's name
    low, high  bounds for `check_bounds`; without `low`, integers are at least 1
    envvar     a variable of the environment with the value
    """
    metadata = {"help": help, "flags": flags, "low": low, "high": high, "envvar": envvar}
    return field(default=default, metadata=metadata)


def check_bounds(options: Any, *, as_flags: bool = False) -> None:
    """Raise ValueError for a number in a dataclass of options that is out of its bounds; `as_flags` names the flag."""
    for f in dataclasses.fields(options):
        value, low, high = getattr(options, f.name), f.metadata.get("low"), f.metadata.get("high")
        if low is None and isinstance(value, int) and not isinstance(value, bool):
            low = 1
        if value is None or low is None or (low <= value < math.inf and (high is None or value <= high)):
            continue
        rule = f"between {low} and {high}" if high is not None else f"at least {low}"
        end = " and finite" if high is None and isinstance(value, float) else ""
        name = f"--{f.name.replace('_', '-')} " if as_flags else f"{f.name}="
        raise ValueError(f"{name}{value} must be {rule}{end}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options to load a model and run it; raises ValueError naming the field, the value and the rule."""

    model: str = option(
        DEMO_MODEL, "folder of a Hugging Face checkpoint, or a hub id; the bundled demo model if not given"
    )
    tensor_parallel_size: int = option(1, "number of ranks that share each layer, one per GPU", "--tp")
    enable_expert_parallel: bool = option(
        False, "give each rank whole experts of a mixture of experts, not a part of the features of every expert"
    )
    device: Device = option("auto", "where to run; auto is cuda where there is a GPU")
    dtype: DType = option("auto", "dtype of weights and activations; auto is the checkpoint's on cuda, float32 on cpu")
    max_model_len: int | None = option(None, "longest prompt plus output, in tokens; the model's own if not given")
    max_num_seqs: int = option(256, "outputs generated at once; a request with n > 1 has n of them")
    max_num_batched_tokens: int = option(8192, "tokens computed in one step, over all requests")
    scheduling_policy: SchedulingPolicy = option(
        "fair",
        "order of requests and division of steps: fair between clients, fcfs (first come, first served), or priority "
        "(the lowest `priority` of a request first)",
    )
    page_size: int = option(16, "tokens in one page of the KV cache")
    kv_layout: KVLayout = option("layer-first", "order of layers and pages in the KV cache")
    kv_cache_dtype: KVCacheDType = option(
        "auto", "dtype of keys and values in the cache: auto is that of the activations, fp8 is float8_e4m3fn"
    )
    num_pages: int | None = option(None, "pages of the KV cache; sized from the memory if not given")
    kv_cache_memory: float | None = option(
        None, "GiB for the KV cache on each rank; sized from the memory if not given"
    )
    gpu_memory_utilization: float = option(0.9, "share of each GPU's memory to use, weights included")
    enable_prefix_caching: bool = option(True, "keep the KV of finished prompts and reuse it for equal prefixes")
    attention_backend: AttentionChoice = option(
        "auto", "auto is flashinfer on a GPU, if it supports the dtype and head size"
    )
    enforce_eager: bool = option(False, "launch every kernel from Python instead of replaying CUDA graphs")
    piecewise_cuda_graph_max_tokens: int | None = option(
        None,
        "launch steps with prompts of up to this many tokens as CUDA graphs, attention excepted; 0 for none; if not"
        " given, as many tokens as a GPU computes faster than Python launches the kernels",
        low=0,
    )
    overlap_scheduling: bool = option(True, "on a GPU, schedule a step while the one before still runs")
    load_format: LoadFormat = option("auto", "auto reads safetensors; dummy fills the weights with random numbers")
    quantization: QuantizationChoice = option(
        "auto", "format of the weights: auto is the checkpoint's, fp8 quantizes a 16-bit checkpoint while loading it"
    )
    generation_config: str = option(
        "auto",
        "sampling defaults: auto takes them from the checkpoint's generation_config.json, lockstep takes only the"
        " EOS tokens from it, and a folder is that of another generation_config.json",
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    ray_address: str | None = option(
        None, "address of a running Ray cluster, or auto; RAY_ADDRESS if set, else a local one is started"
    )
    gpus_per_rank: float = option(1.0, "share of a GPU that Ray gives each rank; below 1, ranks share a GPU")
    nccl_library: str | None = option(
        None, "absolute path of the libnccl.so.2 to use on every rank; the one that torch brings if not given"
    )
    all_reduce: AllReduceChoice = option(
        "auto",
        "all-reduce between GPUs: NCCL, our push, one-shot or two-shot kernels over peer memory, or auto, the fastest"
        " of them for each size as measured at start-up",
    )
    startup_timeout: float = option(600.0, "seconds within which the ranks must be placed, loaded and connected")
    wait_for_resources: float | None = option(
        None,
        "seconds to wait for free CPUs or GPUs of the Ray cluster, and for nodes that have yet to join it; if not"
        " given, 60 for resources that are in use, and none for nodes",
        "--wait-for-gpus",
    )
    deterministic: bool = option(
        False,
        "on GPUs, in bfloat16 and float16: bitwise identical output of a request in any batch, in chunks or whole, and"
        " after any preemption or failure; slower",
    )
    step_timeout: float = option(120.0, "seconds that one step may take before the group is declared stuck")

    def __post_init__(self) -> None:
        lows = {f.name: 1 if f.metadata["low"] is None else f.metadata["low"] for f in dataclasses.fields(self)}
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and all(isinstance(choice, str) for choice in choices):
                self._require(name, value in choices, f"is not one of {', '.join(choices)}")
            elif hint is int or (int in choices and value is not None):
                is_integer, low = isinstance(value, int) and not isinstance(value, bool), lows[name]
                self._require(name, is_integer and value >= low, f"must be an integer >= {low}")
        for name in ("model", "generation_config", "revision"):  # an empty path would be the current folder
            self._require(name, getattr(self, name) != "", "is empty; give a value, or leave the option out")
        for name in ("startup_timeout", "wait_for_resources", "step_timeout", "kv_cache_memory"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "must be above 0")
        for name in ("gpus_per_rank", "gpu_memory_utilization"):
            self._require(name, 0 < getattr(self, name) <= 1, "must be in (0, 1]")
        is_absolute = self.nccl_library is None or Path(self.nccl_library).is_absolute()
        self._require("nccl_library", is_absolute, "must be an absolute path: ranks run elsewhere")
        self._require(
            "max_num_batched_tokens",
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"must be at least max_num_seqs ({self.max_num_seqs}), so that every running request gets its next token",
        )
        if self.deterministic:
            self._require(
                "all_reduce", self.all_reduce != "nccl", "sums in NCCL's order, which --deterministic does not allow"
            )
            self._require(
                "attention_backend", self.attention_backend == "auto", "cannot be combined with --deterministic"
            )
        if self.num_pages is not None and self.kv_cache_memory is not None:
            raise ValueError("num_pages and kv_cache_memory both size the KV cache; give one of them")

    def _require(self, name: str, condition: bool, error: str) -> None:
        if not condition:
            raise ValueError(f"{name}={getattr(self, name)!r} {error}")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Config:
        """Return a Config from keyword arguments; raises ValueError for an unknown one, with the known names."""
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise ValueError(f"unknown option {', '.join(unknown)}; the options are {', '.join(names)}")
        return cls(**options)

    def resolved(self, model: ModelDefaults, *, cuda: bool) -> Config:
        """Return this Config with device, dtype and max_model_len decided; `cuda`: the ranks will have GPUs."""
        config = self.placed(cuda=cuda)
        if config.device == "cpu" and self.attention_backend == "flashinfer":
            raise ValueError("attention_backend='flashinfer' needs a GPU; use auto or torch on a CPU")
        dtype = self.dtype
        if dtype == "auto":
            # On a CPU, float32 gives equal tokens for all TP sizes and batches; bfloat16 is emulated and slow.
            dtype = "float32" if config.device == "cpu" else cast(DType, model.dtype)
        if self.deterministic and (config.device == "cpu" or dtype == "float32"):
            raise ValueError(
                f"deterministic=True is for bfloat16 and float16 on GPUs, not {dtype} on {config.device}: leave it out;"
                " float32 rounding rarely changes a token"
            )
        limit = model.max_position_embeddings
        rule = f"is beyond the {limit} positions that the model was made for; use at most {limit}"
        self._require("max_model_len", self.max_model_len is None or self.max_model_len <= limit, rule)
        return dataclasses.replace(config, dtype=dtype, max_model_len=self.max_model_len or limit)

    def placed(self, *, cuda: bool) -> Config:
        """Return this Config with the device decided: a group without a model needs no more."""
        device: Device = self.device if self.device != "auto" else ("cuda" if cuda else "cpu")
        if device == "cpu" and self.nccl_library is not None:
            raise ValueError("nccl_library is for ranks on GPUs; leave it out on a CPU")
        return dataclasses.replace(self, device=device)

    def with_absolute_model(self) -> Config:
        """Return this Config with absolute paths of folders, for a process with another working folder."""
        paths = {name: Path(getattr(self, name)).expanduser() for name in ("model", "generation_config")}
        folders = {name: str(path.resolve()) for name, path in paths.items() if path.is_dir()}
        return dataclasses.replace(self, **folders)  # type: ignore[arg-type]

    @property
    def kv_torch_dtype(self) -> torch.dtype:
        """The dtype of the KV cache; the Config must be resolved."""
        import torch

        return torch.float8_e4m3fn if self.kv_cache_dtype == "fp8" else self.torch_dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations; the Config must be resolved."""
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
