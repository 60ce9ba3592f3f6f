"""Start-up of one rank: load its weights, measure its memory, allocate the KV cache, capture CUDA graphs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..comm.base import Communicator
from ..comm.message_text import first_line
from ..kernels.native import prefix_compare
from .config import Config
from .limits import Limits
from .memory.gpu import Phase, named_out_of_memory, other_processes, plan_on_gpu, read_gpu
from .memory.host_memory import check_host_memory
from .memory.memory_plan import (
    MemoryPlan,
    check_kv_cache,
    check_weights,
    loading_speed,
    num_states,
    plan_weights,
    saved_states,
)
from .memory.parameter_count import parameters_per_token
from .model.attention.prefill_compilation import compile_ahead
from .model.attention.select_backend import import_ahead, select_backend
from .model.decoder import Decoder
from .model.fp8_tuning import tune_fp8_gemms
from .model.kv_pool import KVPool
from .model.kv_scales import apply_kv_scales
from .model.model_config import ModelConfig
from .model.state_pool import StatePool
from .model.weights import fill_dummy, load_weights
from .rehearsal import decode_steps, largest_step, sampling_steps
from .runner.graphs import DecodeGraphs
from .runner.kernel_compilation import compile_decode_kernels
from .runner.piecewise_graphs import PiecewiseGraphs, max_piecewise_tokens, piecewise_sizes
from .runner.rank_memory import PinnedReadback, RankMemory, SlotTables
from .runner.runner import Runner
from .sampling.grammar import Vocabulary
from .sampling.grammar_state import GrammarStates
from .sampling.sampler import Sampler
from .startup_timer import StartupTimer

log = logging.getLogger(__name__)
MAX_GRAPH_ROWS = 256  # larger decode steps run long enough to hide their launches


class LoadedRank:
    """This process's rank with its weights loaded. Call `plan_memory`, then `allocate` once to get its Runner.

    `config` is resolved, and `folder` holds the checkpoint. `timer` records the duration of each phase. Raises
    ValueError if the device is missing or the weights do not fit.
    """

    def __init__(
        self, config: Config, model: ModelConfig, folder: Path, comm: Communicator, timer: StartupTimer | None = None
    ) -> None:
        if config.device == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    "device='cuda', but torch sees no GPU here; use device='cpu' or install a CUDA build of torch"
                )
            torch.cuda.set_device(0)  # Ray shows each actor its own GPU only
        self.config, self.model, self.comm, self.device = config, model, comm, torch.device(config.device)
        self._timer = timer or StartupTimer()
        plan = plan_weights(config, model, comm.rank)
        self._plan = plan_on_gpu(plan, config, self.device) if config.device == "cuda" else plan
        check_weights(self._plan)
        check_host_memory(self._plan, config, model)
        self._rehearsed: torch.cuda.CUDAGraph | None = None  # keeps the memory pool of the rehearsal's graphs
        self._piecewise: PiecewiseGraphs | None = None
        import_ahead(config)
        self._compilation = compile_ahead(config, model)
        with self._phase("weights"):
            self._decoder = self._load(folder)
        self._vocabulary = Vocabulary(folder, model.vocab_size, model.eos_token_ids)
        log.info("weights: %s", loading_speed(self._plan.weights, self._timer.seconds["weights"]))

    def plan_memory(self) -> MemoryPlan:
        """Return this rank's memory plan, with the pages that `config` names or that fit; see `plan_limits`."""
        if self.device.type == "cuda":
            if self._compilation is not None:
                with self._timer("attention kernels"):
                    self._compilation.wait(announce=self.comm.rank == 0)
            self._tune()
            with self._phase("rehearsal"):
                self._plan = self._rehearse()
                gc.collect()  # a reference cycle would keep the rehearsal's memory beside the final one
        self._plan = self._plan.with_pages(self.config)
        return self._plan

    def allocate(self, limits: Limits) -> Runner:
        """Allocate the KV cache and the state of every slot, and capture the graphs."""
        announce = self.comm.rank == 0
        with self._phase("KV cache"):
            memory = self._allocate_memory(limits.num_pages, limits.max_length, announce=announce)
        with self._timer("grammars"):
            memory.grammars.preload()
        if self.comm.rank == 0 and limits.enable_prefix_caching:
            with self._timer("prefix cache"):
                prefix_compare()
        with self._phase("graphs"):
            graphs = self._capture(memory, announce=announce)
            piecewise = self._piecewise or self._capture_piecewise(memory, graphs)
        gc.collect()
        gc.freeze()  # torch leaves so many objects behind that a full collection would stop a step for 50 ms
        overlaps = self.config.overlap_scheduling and self.device.type == "cuda"
        return Runner(memory, graphs, piecewise, overlaps=overlaps)

    def _load(self, folder: Path) -> Decoder:
        config = self.config
        assert config.max_model_len is not None
        decoder = Decoder(
            self.model,
            self.comm,
            dtype=config.torch_dtype,
            device=self.device,
            max_positions=config.max_model_len,
            batch_invariant=config.deterministic,
        )
        if config.load_format == "dummy":
            fill_dummy(decoder.weights)
        else:
            load_weights(decoder.weights, folder)
            if config.kv_cache_dtype == "fp8":
                apply_kv_scales(decoder, folder)
        return decoder

    def _tune(self) -> None:
        """Choose the FP8 GEMMs; with --deterministic there is no choice."""
        weights = self._decoder.weights
        if weights.fp8 and not weights.batch_invariant:
            with self._timer("FP8 GEMMs"):
                tune_fp8_gemms(weights.fp8, self.comm, weights.dtype)
            gc.collect()
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _allocate_memory(self, num_pages: int, max_length: int, *, announce: bool) -> RankMemory:
        config, device = self.config, self.device
        shape = self._decoder.attention_shape(config.page_size, config.torch_dtype, config.kv_torch_dtype)
        states = self._decoder.state_shape(config.torch_dtype)
        return RankMemory(
            decoder=self._decoder,
            tables=SlotTables(
                config.max_num_seqs,
                max_length,
                config.page_size,
                device,
                num_tables=1 + self.model.layer_groups.num_window_groups,
                has_states=states is not None,
            ),
            pool=KVPool(shape, num_pages, device, config.kv_layout),
            states=StatePool(states, num_states(config), device) if states is not None else None,
            sampler=Sampler(config.max_num_seqs, device),
            grammars=GrammarStates(self._vocabulary if self.comm.rank == 0 else None, config.max_num_seqs),
            readback=PinnedReadback(config.max_num_seqs, self.comm, device),
            attention=select_backend(config, self.model, shape, self._timer, announce=announce),
        )

    @torch.inference_mode()
    def _capture(self, memory: RankMemory, *, announce: bool) -> DecodeGraphs | None:
        """Capture the decode steps; return None if that is not possible or not wanted."""
        if not memory.attention.capturable:
            return None
        if not self._may_capture(memory):
            if announce:
                uncapturable = f"{self.comm.description} cannot be captured"
                reason = "enforce_eager is set" if self.config.enforce_eager else uncapturable
                log.info("no CUDA graphs: %s", reason)
            return None
        max_rows = min(self.config.max_num_seqs, MAX_GRAPH_ROWS)
        graphs = DecodeGraphs(memory, max_rows, reuse=self._rehearsed, show_progress=announce)
        self._rehearsed = graphs.largest
        return graphs

    @torch.inference_mode()
    def _capture_piecewise(self, memory: RankMemory, graphs: DecodeGraphs | None) -> PiecewiseGraphs | None:
        """Capture steps with prompts beside `graphs`; return None if that is not possible or not wanted."""
        most = self.config.piecewise_cuda_graph_max_tokens
        if most is None:
            most = max_piecewise_tokens(parameters_per_token(self.model, self.comm.size) / self.model.num_layers)
        if graphs is None or most == 0:
            return None
        sizes = piecewise_sizes(min(most, self.config.max_num_batched_tokens))
        with self._timer("piecewise graphs"):
            return PiecewiseGraphs(memory, sizes, graphs.largest.pool())

    def _compile(self, memory: RankMemory) -> None:
        """Compile the kernels of decode steps, if these can be captured; else each is compiled at its first launch."""
        if not self._may_capture(memory):
            return
        with self._timer("kernels"):
            try:
                compile_decode_kernels(memory, min(self.config.max_num_seqs, MAX_GRAPH_ROWS))
            except RuntimeError as error:
                log.warning("the kernels are compiled one after the other: %s", first_line(error))
        gc.collect()  # memory of the captures would count as used
        torch.cuda.empty_cache()

    def _may_capture(self, memory: RankMemory) -> bool:
        return memory.attention.capturable and self.comm.capturable and not self.config.enforce_eager

    def _rehearse(self) -> MemoryPlan:
        """Run the largest step and others, and capture the graphs, to measure their memory beside the KV cache.

        torch's allocator keeps that memory for the real ones. Decode graphs know the KV cache by its address, so they
        are captured again once it is allocated.
        """
        assert self.config.max_model_len is not None
        measure = partial(read_gpu, self.device, self.config.gpus_per_rank)
        memory = self._allocate_memory(1, self.config.max_model_len, announce=False)
        self._compile(memory)
        runner = Runner(memory)
        for plan in (largest_step(self.config), *sampling_steps()):
            runner.launch(plan).wait()
        with_workspaces, _ = measure()
        gc.collect()  # each capture does so, too: memory left by the largest step would hide that of the graphs
        torch.cuda.empty_cache()
        before, _ = measure()
        graphs = self._capture(memory, announce=False)
        self._piecewise = self._capture_piecewise(memory, graphs)
        if graphs is None:
            for plan in decode_steps(self.config, MAX_GRAPH_ROWS):
                runner.launch(plan).wait()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # runs before a capture leave memory that counts as workspaces already
        with_graphs, _ = measure()
        return replace(
            self._plan,
            workspaces=max(0, with_workspaces - self._plan.at_start - self._plan.weights - self._plan.states),
            graphs=max(0, with_graphs - before),
            num_graphs=len(graphs.sizes) if graphs else 0,
            graph_rows=graphs.max_rows if graphs else 0,
            num_piecewise=len(self._piecewise.sizes) if self._piecewise else 0,
            piecewise_tokens=self._piecewise.max_tokens if self._piecewise else 0,
            other_processes=other_processes(self.device),
        )

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        """Time a phase of the start-up, and name it in the error if the GPU runs out of memory in it."""
        with self._timer(name), named_out_of_memory(name, self._plan, self.device):
            yield


def plan_limits(requested: Config, config: Config, model: ModelConfig, memory: MemoryPlan) -> Limits:
    """Return, and log, the limits of a group; `memory` is the plan of its tightest rank.

    `requested` is the user's Config, `config` the resolved one. Raises ValueError if pages, GiB or a context that the
    user asked for do not fit. Without such a request the context is limited to what fits.
    """
    check_kv_cache(requested, memory)
    assert config.max_model_len is not None
    context = memory.longest_context(config.max_model_len)
    if context < config.max_model_len:
        log.warning("context limited to %d tokens by the KV cache (the model's is %d)", context, config.max_model_len)
    log.info("%s", memory.table(context))
    dtype = "FP8" if config.kv_cache_dtype == "fp8" else config.dtype
    log.info("KV cache: %d pages of %d tokens, %s, %s", memory.num_pages, memory.page_size, config.kv_layout, dtype)
    return Limits(
        max_model_len=context,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_pages=memory.num_pages,
        page_size=config.page_size,
        vocab_size=model.vocab_size,
        enable_prefix_caching=config.enable_prefix_caching,
        is_fair=config.scheduling_policy == "fair",
        has_priorities=config.scheduling_policy == "priority",
        has_states=model.delta_net is not None,
        saved_states=saved_states(config) if model.delta_net is not None else 0,
        window=model.window,
        num_window_groups=memory.num_window_groups,
        group_window=model.layer_groups.window,
    )
