"""Markers, Hypothesis profiles, the distribution over processes, and the fixtures that several folders share."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks and tests are many, cores are few
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything

from hypothesis import HealthCheck, settings

import lockstep  # noqa: F401 - takes the checkout off sys.path before transformers looks for a package `kernels`

# A shell's background jobs ignore Ctrl-C, and so would all processes that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: they measure the load of the machine. `ci` tests the same examples each time, `full` new ones.
PROFILES: dict[str, dict[str, Any]] = {
    "dev": {"max_examples": 15, "derandomize": True, "database": None},
    "ci": {"max_examples": 100, "derandomize": True, "database": None},
    "full": {"max_examples": 1000},
}
for _name, _options in PROFILES.items():
    settings.register_profile(_name, deadline=None, suppress_health_check=[HealthCheck.too_slow], **_options)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DESELECTED = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
    items.sort(key=lambda item: not uses_ray(item.path))  # they take longest: they must not come last
    deselect_gpu_tests(config, items)


@functools.cache
def uses_ray(file: Path) -> bool:
    """Return whether tests of the file use the Ray cluster of their process."""
    return "ray_cluster" in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute whole files, for the sake of their fixtures; all files that use Ray go to one process.

    `--dist worksteal` distributes tests one by one, for those on GPUs: each has processes of its own.
    """
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") == "worksteal":
        return None

    class RayTogether(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "ray" if uses_ray(config.rootpath / file) else file

        def remove_node(self, node: Any) -> str | None:
            """Report the test at which a worker ended, and give others the rest of its tests without that one."""
            units = self.assigned_work[node].values()
            ended_at = next((test for unit in units for test, is_done in unit.items() if not is_done), None)
            for unit in units:
                if ended_at in unit:
                    unit[ended_at] = True
            super().remove_node(node)
            return ended_at

    return RayTogether(config, log)


def deselect_gpu_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that this machine has too few GPUs for, and count them for the summary."""
    import torch  # here: the process that distributes tests would import it for nothing, before the others start

    gpus = torch.cuda.device_count()
    selected, deselected = [], []
    for item in items:
        needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
        (selected if gpus >= needed else deselected).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)
    reason = "no CUDA device" if gpus == 0 else f"{gpus} CUDA device, they need two"
    config.stash[DESELECTED] = f"{len(deselected)} GPU tests deselected: {reason}" if deselected else ""
    if hasattr(config, "workeroutput"):  # a worker of xdist; each worker collects all tests
        config.workeroutput["deselected"] = config.stash[DESELECTED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Keep the summary of a worker of xdist."""
    node.config.stash[DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", "")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if line := config.stash.get(DESELECTED, ""):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of vocabulary 131 and 256 positions, without a tokenizer."""
    from checkpoints import tiny_checkpoint  # imports transformers

    folder = tmp_path_factory.mktemp("llama")
    tiny_checkpoint(folder, "LlamaForCausalLM", max_position_embeddings=256)
    return folder


@pytest.fixture(autouse=True)
def _restore_log_level() -> Iterator[None]:
    """Restore the level of our logger, which commands set."""
    logger = logging.getLogger("lockstep")
    level = logger.level
    yield
    logger.setLevel(level)
