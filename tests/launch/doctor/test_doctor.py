"""The doctor: findings about this machine, damaged checkpoints, and other machines given as numbers."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from lockstep.launch.cli.main import main
from lockstep.launch.doctor import cluster_survey, content_checks, machine_checks, p2p, planned_start
from lockstep.launch.doctor.cluster_survey import (
    addresses_finding,
    candidates,
    merge_findings,
    token_finding,
    versions_finding,
)
from lockstep.launch.doctor.diagnosis import CHECKS, CONTENT_CHECKS, LOCAL_CHECKS, diagnose
from lockstep.launch.doctor.finding import Finding, run_check
from lockstep.launch.doctor.machine_checks import (
    check_devices,
    check_interface,
    check_open_files,
    check_packages,
    cuda_of_torch,
    dev_shm_finding,
    devices_finding,
    gpu_processes_finding,
    interface_finding,
    nccl_finding,
    open_files_finding,
    p2p_finding,
    packages_finding,
)
from lockstep.launch.doctor.model_checks import memory_finding
from lockstep.launch.doctor.planned_start import PlannedStart, gpus_needed, has_driver, visible_gpus
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.executor import LocalExecutor
from lockstep.runtime.memory.gpu import GpuProcess
from lockstep.runtime.memory.memory_plan import GIB, MemoryPlan, plan_weights
from lockstep.runtime.model.model_config import ModelConfig

from checkpoints import FAMILIES, tiny_checkpoint

MIB = 2**20
UUID = "8a1f0c5e-3b1d-4c3a-9f55-0d2e6a7b9c10"
H200 = MemoryPlan(
    place="GPU 0", total=140 * GIB, utilization=0.9, weights=15 * GIB, at_start=GIB, page_bytes=2 * MIB, page_size=16
)
Command = Callable[..., tuple[int, str]]


needs_no_driver = pytest.mark.skipif(has_driver(), reason="needs a machine without an NVIDIA driver")


@pytest.fixture(autouse=True)
def no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`lockstep doctor` in this process: its exit status and stdout."""
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lockstep", "doctor", "--device=cpu", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def findings_of(**options: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(Config(**{"device": "cpu", **options}))}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.status == "fail"}


# -- this machine


def test_demo_model_passes_on_this_machine(command: Command) -> None:
    status, out = command("--tp=2", "--max-num-seqs=8")
    lines = [re.fullmatch(r"(ok  |warn)  ([^:]+): .+", line) for line in out.splitlines()]
    assert status == 0
    assert all(lines), out
    assert [line[2] for line in lines if line] == [*LOCAL_CHECKS, *CHECKS, *CONTENT_CHECKS]


def test_json_is_a_list_of_findings(command: Command) -> None:
    status, out = command("--tp=5", "--max-num-seqs=8", "--json")
    found = json.loads(out)
    assert status == 1
    assert all(list(each) == ["name", "status", "finding", "remedy"] for each in found)
    assert all(isinstance(value, str) for each in found for value in each.values())
    assert all(each["status"] in ("ok", "warn", "fail") for each in found)
    assert all(each["remedy"] for each in found if each["status"] != "ok")
    assert [each["name"] for each in found] == [*LOCAL_CHECKS, *CHECKS, *CONTENT_CHECKS]


@needs_no_driver
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_torch_is_not_imported_without_a_gpu(device: str) -> None:
    """By the checks of a server's start."""
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    program = f"{report}; from lockstep.launch.doctor.preflight import print_findings; print_findings()"
    config = json.dumps({"device": device, "tensor_parallel_size": 2, "max_num_seqs": 8})
    ended = subprocess.run([sys.executable, "-c", program, config], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(json.loads(ended.stdout)) == len(LOCAL_CHECKS) + len(CHECKS)
    imported = set(ended.stderr.split())
    assert "lockstep.launch.doctor.diagnosis" in imported
    assert not imported & {"torch", "transformers", "ray"}


@needs_no_driver
def test_findings_without_a_driver_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"device": "auto", "tensor_parallel_size": 2, "max_num_seqs": 8}
    found = findings_of(**asked)
    monkeypatch.setattr(planned_start, "DRIVER_LIBRARIES", ("libc.so.6",))  # torch is asked
    again = findings_of(**asked)
    assert list(found) == list(again)
    names = set(found) - {"shared memory"}  # others use it, too
    assert {name: found[name] for name in names} == {name: again[name] for name in names}


def test_gpus_are_counted_by_torch_if_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(planned_start, "DRIVER_LIBRARIES", ("libnone.so.1", "libc.so.6"))
    assert visible_gpus() == 3
    assert PlannedStart(Config(tensor_parallel_size=2), "127.0.0.1").gpus == 2
    assert PlannedStart(Config(tensor_parallel_size=2, device="cpu"), "127.0.0.1").gpus == 0
    assert check_devices(PlannedStart(Config(), "127.0.0.1")).finding.endswith("and 3 GPUs")


def test_cuda_of_torch_without_its_import() -> None:
    assert cuda_of_torch() == torch.version.cuda


def test_impossible_tp_size_is_named_with_the_largest_one() -> None:
    found = findings_of(tensor_parallel_size=5, max_num_seqs=8)
    assert failed(found) == {"tensor parallel", "memory"}
    assert found["tensor parallel"].remedy == "use tensor_parallel_size=4 or less"
    for size in range(1, 65):
        verdict = findings_of(tensor_parallel_size=size, load_format="dummy", max_num_seqs=8)["tensor parallel"]
        assert (verdict.status == "ok") == (size <= 4)


def test_memory_plan_is_that_of_a_start() -> None:
    config = Config(device="cpu", max_num_seqs=4, max_num_batched_tokens=64)
    executor = LocalExecutor(config, ModelConfig.from_folder(DEMO_MODEL), Path(DEMO_MODEL))
    plan = executor.memory
    executor.close()
    found = findings_of(max_num_seqs=4, max_num_batched_tokens=64)["memory"]
    assert found.status == "ok"
    assert f"{plan.weights / MIB:.1f} MiB of weights" in found.finding
    assert f"{plan.tokens:,} tokens" in found.finding
    assert f"longest context {executor.limits.max_model_len:,}" in found.finding


def test_two_ranks_hold_half_of_the_split_weights() -> None:
    model = ModelConfig.from_folder(DEMO_MODEL)
    config = Config(device="cpu").resolved(model, cuda=False)
    whole, half = (plan_weights(replace(config, tensor_parallel_size=size), model) for size in (1, 2))
    norms = model.hidden_size * (2 * model.num_layers + 1) * 4
    assert half.page_bytes == whole.page_bytes // 2
    assert whole.weights - norms == 2 * (half.weights - norms)


# -- checkpoints


DAMAGES: dict[str, tuple[Callable[[Path], object], set[str], str]] = {
    "header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), {"checkpoint"}, "corrupt or incomplete",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), {"checkpoint"}, "no *.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), {"tokenizer"}, "no usable tokenizer"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), {"tokenizer"}, "tokenizer.json cannot be read"),
    "settings": (lambda f: (f / "tokenizer_config.json").write_text("{"), {"tokenizer"}, "not valid JSON"),
    "generation": (
        lambda f: (f / "generation_config.json").write_text('{"top_p": 2}'), {"generation config"}, "top_p=2",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(), {"tensor parallel", "checkpoint", "memory"}, "has no config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "names", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_fails_the_check_of_the_damaged_file(
    checkpoint: Path, damage: Callable[[Path], object], names: set[str], message: str
) -> None:
    damage(checkpoint)
    found = findings_of(model=str(checkpoint), max_num_seqs=8)
    assert failed(found) == names
    for name in names:
        assert message in found[name].finding
        assert found[name].remedy
        assert "\n" not in str(found[name])


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: change(tensors[name]).contiguous()}, folder / "model.safetensors")


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor([3]), torch.nan)


UP = "model.layers.3.mlp.up_proj.weight"
CONTENT_DAMAGES: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "NaN": (lambda f: edit_tensor(f, UP, with_nan), "fail", "weights", f"NaN or infinite numbers in {UP}"),
    "shape": (lambda f: edit_tensor(f, UP, lambda t: t[1:]), "fail", "weights", f"1 misshapen: {UP} "),
    "template": (
        lambda f: (f / "chat_template.jinja").write_text("a\n{% if x %}"), "warn", "chat template",
        "is not valid Jinja: line",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "status", "name", "message"), CONTENT_DAMAGES.values(), ids=CONTENT_DAMAGES)
def test_damaged_contents_are_found(
    checkpoint: Path, damage: Callable[[Path], object], status: str, name: str, message: str
) -> None:
    damage(checkpoint)
    config = Config(model=str(checkpoint), device="cpu", max_num_seqs=8)
    (wrong,) = [finding for finding in diagnose(config, reads_contents=True) if finding.status != "ok"]
    assert (wrong.status, wrong.name) == (status, name)
    assert message in wrong.finding
    assert wrong.remedy


def test_weights_that_take_too_long_are_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_checks, "READ_S", -1.0)
    monkeypatch.setattr(content_checks, "UNREAD_BYTES", 0)
    finding = content_checks.check_weights(PlannedStart(Config(device="cpu"), ""))
    assert finding.status == "ok"
    assert "the first 0 KiB of 2.6 MiB finite" in finding.finding


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_each_family(family: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family)
    finding = content_checks.check_weights(PlannedStart(Config(model=str(tmp_path), device="cpu"), ""))
    assert finding.status == "ok", finding


def test_one_fault_is_printed_once(command: Command, checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    status, out = command(str(checkpoint), "--max-num-seqs=8")
    assert status == 1
    (line,) = [line for line in out.splitlines() if "has no config.json" in line]
    assert line.startswith("fail  checkpoint: ")
    assert "fail  tensor parallel: skipped: see checkpoint" in out.splitlines()


MISSING_CHECKPOINTS: dict[str, tuple[str, int, str]] = {
    "not fetched": ("nobody/nothing", 0, "warn"),
    "no folder": ("/no/such/folder", 1, "fail"),
}


@pytest.mark.parametrize(("model", "status", "word"), MISSING_CHECKPOINTS.values(), ids=MISSING_CHECKPOINTS)
def test_checks_without_a_checkpoint_are_printed_as_skipped(
    command: Command, monkeypatch: pytest.MonkeyPatch, model: str, status: int, word: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ended, out = command(model, "--max-num-seqs=8")
    assert ended == status
    assert sum(f"{model} " in line for line in out.splitlines()) == 1  # the fault is named once
    skipped = "tensor parallel", "tokenizer", "generation config", "memory", *CONTENT_CHECKS
    assert [f"{word}  {name}: skipped: see checkpoint" for name in skipped] == [
        line for line in out.splitlines() if line.endswith("skipped: see checkpoint")
    ]


def test_dummy_weights_need_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert not failed(findings_of(model=str(checkpoint), load_format="dummy", max_num_seqs=8))


def test_hub_model_is_not_fetched() -> None:
    found = findings_of(model="nobody/nothing", max_num_seqs=8)
    assert failed(found) == {"tensor parallel", "checkpoint", "tokenizer", "generation config", "memory"}
    assert found["checkpoint"].remedy == "hf download nobody/nothing"


def test_crashed_check_fails_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(start: PlannedStart) -> Finding:
        raise ZeroDivisionError("seven by zero\nand more")

    monkeypatch.setitem(CHECKS, "tokenizer", crash)
    found = findings_of(max_num_seqs=8)
    assert failed(found) == {"tokenizer"}
    assert list(found) == [*LOCAL_CHECKS, *CHECKS]
    assert found["tokenizer"].finding == "the check crashed: ZeroDivisionError: seven by zero"


# -- other machines, as numbers


def test_packages_against_requirements() -> None:
    required = [Requirement("torch>=2.9"), Requirement("ray>=2.52"), Requirement("cupy-cuda13x>=14")]
    there = {"torch": "2.11.0+cu130", "ray": "2.60.0", "cupy-cuda13x": "14.1"}

    def packages(there: dict[str, str], cuda: str | None = "13.0", driver: bool = True) -> Finding:
        return packages_finding(required, there, cuda, driver=driver, extra="cuda13")

    assert packages(there).status == "ok"
    assert "cupy-cuda13x 14.1, CUDA 13.0" in packages(there).finding
    assert packages(there, cuda=None).status == "warn", "a CPU build beside a driver"
    assert packages(there, cuda=None, driver=False).status == "ok"
    old = packages({**there, "ray": "2.9.0"})
    assert (old.status, old.finding) == ("fail", "needs ray>=2.52 (2.9.0)")
    del there["cupy-cuda13x"]
    assert packages(there).finding == "needs cupy-cuda13x>=14 (not there)"
    assert "lockstep[cuda13]" in packages(there).remedy


def test_packages_of_an_uninstalled_checkout_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "_version", lambda name: None)
    finding = run_check("packages", lambda: check_packages(PlannedStart(Config(), "127.0.0.1")))
    assert (finding.status, finding.remedy) == ("warn", "run scripts/setup.sh")


@pytest.mark.parametrize(
    ("options", "gpus", "status"),
    [
        ({"tensor_parallel_size": 8}, [8], "ok"),
        ({"tensor_parallel_size": 8}, [4, 4], "ok"),
        ({"tensor_parallel_size": 8}, [4, 3], "fail"),
        ({"tensor_parallel_size": 4, "gpus_per_rank": 0.5}, [2], "ok"),
        ({"tensor_parallel_size": 5, "gpus_per_rank": 0.5}, [2], "fail"),
        ({"tensor_parallel_size": 2, "device": "cuda"}, [0], "fail"),
        ({"tensor_parallel_size": 2}, [0], "ok"),
        ({"tensor_parallel_size": 2, "device": "cpu"}, [1], "ok"),
    ],
)
def test_devices_are_counted_by_node(options: dict[str, Any], gpus: list[int], status: str) -> None:
    nodes = {f"10.0.0.{n}": {"CPU": 16.0, "GPU": float(count)} for n, count in enumerate(gpus)}
    found = devices_finding(Config(**options), nodes)
    assert found.status == status
    assert f"10.0.0.0 has 16 CPUs and {gpus[0]} GPUs" in found.finding


def test_gpus_needed() -> None:
    shares = [(8, 1.0, 8), (4, 0.5, 2), (5, 0.5, 3), (2, 0.6, 2), (3, 1 / 3, 1)]
    for ranks, share, gpus in shares:
        assert gpus_needed(Config(tensor_parallel_size=ranks, gpus_per_rank=share)) == gpus


@pytest.mark.parametrize(
    ("free", "ray_bytes", "nccl", "status"),
    [(64, 80, 0, "warn"), (80, 80, 0, "ok"), (64, 80, 128, "fail"), (150, 80, 128, "warn"), (208, 80, 128, "ok")],
)
def test_dev_shm_findings(free: int, ray_bytes: int, nccl: int, status: str) -> None:
    found = dev_shm_finding(free * MIB, ray_bytes * MIB, nccl * MIB)
    assert found.status == status
    assert (found.remedy != "") == (status != "ok")


def test_open_files_findings() -> None:
    assert open_files_finding(1024, 1024, 1024).status == "fail"
    assert open_files_finding(1024, 1024, 256).status == "warn"
    assert "ulimit -n 4352" in open_files_finding(1024, 1024, 256).remedy
    raised = open_files_finding(256, 65536, 256)
    assert (raised.status, raised.finding) == ("ok", "limit of 65536, to which a start raises 256")
    assert open_files_finding(65536, 65536, 256).finding == "limit of 65536"
    assert open_files_finding(resource.RLIM_INFINITY, resource.RLIM_INFINITY, 256).status == "ok"


def test_open_files_of_a_cluster_are_those_of_its_raylet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start raises the limit for the processes that it starts itself, and only for them."""
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (256, 65536))
    assert check_open_files(PlannedStart(Config(), "127.0.0.1", alone=True)).status == "ok"
    assert check_open_files(PlannedStart(Config(), "10.0.0.1")).status == "fail"


def test_gpu_processes_are_listed() -> None:
    held, free = [GpuProcess(4711, 2 * 2**30), GpuProcess(4712, 50 * 2**20)], []
    finding = gpu_processes_finding([free, held], own_pid=1)
    assert (finding.status, finding.finding) == ("warn", "GPU 1: pid 4711 with 2.00 GiB")
    assert finding.remedy
    assert gpu_processes_finding([held], own_pid=4711).status == "ok"
    assert gpu_processes_finding([free], own_pid=1).finding == "no other process on 1 GPU"
    assert gpu_processes_finding([None], own_pid=1).status == "warn"


def test_memory_findings_on_a_gpu() -> None:
    asked = Config(max_model_len=4096)
    fits = memory_finding(asked, asked, H200, host=0)
    assert fits.status == "ok"  # 0.9 * 140 - 16 = 110 GiB of pages of 2 MiB and 16 tokens
    assert "15.00 GiB of weights, 110.00 GiB of KV cache for 901,120 tokens, less" in fits.finding
    long = memory_finding(Config(), Config(max_model_len=10**6), H200, host=0)
    assert (long.status, "longest context 901,120 of the model's 1,000,000" in long.finding) == ("warn", True)
    large = replace(H200, weights=130 * GIB)
    refused = run_check("memory", lambda: memory_finding(asked, asked, large, host=0))
    assert (refused.status, refused.remedy) == ("fail", "raise gpu_memory_utilization to 0.94")


def test_memory_finding_of_a_small_host() -> None:
    host = MemoryPlan(place="the CPU", weights=GIB, page_bytes=MIB, page_size=16)
    asked = Config(tensor_parallel_size=2, max_model_len=1024, kv_cache_memory=1.0)
    assert memory_finding(asked, asked, host, host=4 * GIB).status == "ok"
    small = memory_finding(asked, asked, host, host=4 * GIB - 1)
    assert (small.status, small.remedy) == ("warn", "lower --kv-cache-memory")


def test_nccl_findings() -> None:
    one, two = "/a/libnccl.so.2", "/b/libnccl.so.2"
    assert nccl_finding("NCCL 2.28.9", one, [one], named_by_user=False).finding == f"NCCL 2.28.9 from {one}"
    assert nccl_finding("NCCL 2.28.9", one, [one, two], named_by_user=False).status == "warn"
    assert nccl_finding("NCCL 2.32.3", two, [one, two], named_by_user=True).status == "ok"


def test_interface_findings() -> None:
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}
    assert interface_finding("10.0.0.5", True, addresses).finding == "eth0, 10.0.0.5"
    assert interface_finding("10.0.0.6", True, addresses).status == "ok"
    assert interface_finding("10.0.0.7", False, addresses).status == "fail"
    assert check_interface(PlannedStart(Config(), "127.0.0.1")).finding == "lo, 127.0.0.1"
    assert check_interface(PlannedStart(Config(), "192.0.2.1")).status == "fail"  # reserved for documentation


# -- peers


def test_p2p_findings() -> None:
    assert p2p_finding({"0 to 1": "direct", "1 to 0": "direct"}).status == "ok"
    assert p2p_finding({"0 to 1": "direct", "1 to 0": "staged"}).status == "warn"
    wrong = p2p_finding({"0 to 1": "wrong", "1 to 0": "staged"})
    assert (wrong.status, "GPU 0 to 1" in wrong.finding) == ("fail", True)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ('print(\'{"0 to 1": "direct"}\')', "ok"),
        ("import time; time.sleep(60)", "hang, nothing after"),
        ("raise RuntimeError('no such device')", "RuntimeError: no such device"),
    ],
)
def test_p2p_process_results_and_failures(monkeypatch: pytest.MonkeyPatch, program: str, outcome: str) -> None:
    monkeypatch.setattr(p2p, "calling", lambda _: ["-c", program])
    monkeypatch.setattr(p2p, "DEADLINE_S", 60.0 if "sleep" not in program else 0.3)
    test = p2p.P2PCheck(2)
    try:
        found = run_check("peers", lambda: p2p_finding(test.result()))
    finally:
        test.close()
    assert outcome in str(found)
    assert (found.status == "ok") == (outcome == "ok")


@pytest.mark.multigpu
def test_p2p_of_this_machine() -> None:
    test = p2p.P2PCheck(2)
    try:
        found = test.result()
    finally:
        test.close()
    assert set(found) == {"0 to 1", "1 to 0"}
    assert "wrong" not in found.values()


@pytest.mark.gpu
def test_gpu_machine_passes() -> None:
    found = findings_of(device="auto", max_num_seqs=8)
    assert not failed(found)
    assert "NCCL 2" in found["NCCL"].finding
    assert "each rank on GPU" in found["memory"].finding


# -- clusters


def test_equal_findings_of_all_nodes_are_merged() -> None:
    same, full = Finding("open files", "ok", "limit of 65536"), Finding("shared memory", "warn", "1 MiB free", "free")
    roomy = replace(full, status="ok", finding="9 GiB free", remedy="")
    found = list(merge_findings({"10.0.0.1": [same, full], "10.0.0.2": [same, roomy], "10.0.0.3": [same, roomy]}))
    assert [finding.name for finding in found] == [
        "open files",
        "shared memory on 10.0.0.1",
        "shared memory on 10.0.0.2, 10.0.0.3",
    ]


def test_unequal_versions_fail() -> None:
    nodes = {"a": {"Python": "3.12.1", "NCCL": "2.28.9"}, "b": {"Python": "3.12.1", "NCCL": "2.28.9"}}
    nodes["c"] = {"Python": "3.12.1"}  # no GPU
    assert versions_finding(nodes).status == "ok"
    nodes["b"]["NCCL"] = "2.27.3"
    unequal = versions_finding(nodes)
    assert (unequal.status, unequal.finding) == ("fail", "NCCL (a has 2.28.9, b has 2.27.3)")


def test_candidates_are_nodes_that_may_get_a_rank() -> None:
    nodes = {"head": {"CPU": 8.0}, "a": {"CPU": 8.0, "GPU": 4.0}, "busy": {"GPU": 4.0}}
    assert candidates(Config(), nodes) == ["a"]
    assert candidates(Config(device="cpu"), nodes) == ["head", "a"]
    assert candidates(Config(), {"empty": {}}) == ["empty"]


def test_loopback_cluster_is_a_warning() -> None:
    assert addresses_finding(["10.0.0.1", "10.0.0.2"]).status == addresses_finding(["10.0.0.1"]).status == "ok"
    lonely = addresses_finding(["127.0.0.1"])
    assert lonely.status == "warn"
    assert "--node-ip-address" in lonely.remedy


def test_cluster_without_a_token_is_a_warning() -> None:
    assert token_finding(authenticated=True).status == "ok"
    is_open = token_finding(authenticated=False)
    assert is_open.status == "warn"
    assert "run code" in is_open.finding
    assert "RAY_AUTH_MODE=token" in is_open.remedy


@pytest.mark.usefixtures("no_cluster")
def test_missing_cluster_fails(command: Command) -> None:
    status, out = command("--ray-address=127.0.0.1:9", "--log-level=error")
    assert status == 1
    assert re.fullmatch(r"fail  Ray cluster: no Ray cluster at 127.0.0.1:9: [^\n]+; [^\n]+\n", out)


@pytest.mark.parametrize("fails", [False, True])
def test_survey_disconnects_from_the_cluster(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Also if the first look at the cluster fails; a user's own connection stays."""
    ends: list[str] = []
    connection = SimpleNamespace(close=lambda: ends.append("connection"))
    monkeypatch.setattr(cluster_survey, "start_ray", lambda *arguments: connection)
    monkeypatch.setattr(ray, "shutdown", lambda: ends.append("ray"))
    monkeypatch.setattr(cluster_survey, "nodes", lambda: 1 // 0 if fails else [])
    monkeypatch.setattr(cluster_survey, "_examine_nodes", lambda *arguments: {})
    findings = list(cluster_survey.survey(Config(ray_address="10.0.0.1:6379"), lambda *arguments, **options: []))
    assert findings[0].status == ("fail" if fails else "ok")
    assert ends == ["connection", "ray"]
    monkeypatch.setattr(cluster_survey, "start_ray", lambda *arguments: None)
    list(cluster_survey.survey(Config(ray_address="10.0.0.1:6379"), lambda *arguments, **options: []))
    assert ends == ["connection", "ray"]


def test_cluster_nodes_examine_themselves(ray_cluster: dict[str, str], checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    asked = {"model": str(checkpoint), "ray_address": "auto", "max_num_seqs": 8}
    found = findings_of(tensor_parallel_size=2, **asked)
    assert failed(found) == {"checkpoint"}
    assert list(found) == ["Ray cluster", "devices", "equal versions", "Ray token", *CHECKS]
    assert ray.util.get_node_ip_address() in found["interface"].finding
    assert failed(findings_of(tensor_parallel_size=8, **asked)) >= {"devices", "checkpoint"}
    assert ray.is_initialized(), "a connection that was there before is left"
