"""The doctor: what it says of this machine, of damaged checkpoints, and of numbers that stand for other machines."""

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
from typing import Any

import pytest
import ray
import torch
from packaging.requirements import Requirement

from lockstep.launch.cli.main import main
from lockstep.launch.doctor import checks, p2p
from lockstep.launch.doctor.checks import Finding
from lockstep.launch.doctor.cluster_survey import candidates, judge_addresses, judge_versions, merged
from lockstep.launch.doctor.diagnosis import diagnose
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.executor import LocalExecutor
from lockstep.runtime.memory import gpu_processes
from lockstep.runtime.memory.gpu_processes import ask_nvidia_smi
from lockstep.runtime.memory.memory_plan import GIB, MemoryPlan, plan_weights
from lockstep.runtime.model.model_config import ModelConfig

MIB = 2**20
UUID = "8a1f0c5e-3b1d-4c3a-9f55-0d2e6a7b9c10"
H200 = MemoryPlan(
    place="GPU 0", total=140 * GIB, utilization=0.9, weights=15 * GIB, at_start=GIB, page_bytes=2 * MIB, page_size=16
)
Command = Callable[..., tuple[int, str]]


needs_no_driver = pytest.mark.skipif(checks.has_driver(), reason="needs a machine without an NVIDIA driver")


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


def examined(**options: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(Config(**{"device": "cpu", **options}))}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.status == "fail"}


# -- this machine


def test_the_demo_model_can_be_started_here(command: Command) -> None:
    status, out = command("--tp=2", "--max-num-seqs=8")
    lines = [re.fullmatch(r"(ok  |warn)  ([^:]+): .+", line) for line in out.splitlines()]
    assert status == 0
    assert all(lines), out
    assert [line[2] for line in lines if line] == [*checks.ALONE, *checks.CHECKS]


def test_json_is_a_list_of_objects_that_says_the_same(command: Command) -> None:
    status, out = command("--tp=3", "--max-num-seqs=8", "--json")
    found = json.loads(out)
    assert status == 1
    assert all(list(each) == ["name", "status", "finding", "remedy"] for each in found)
    assert all(isinstance(value, str) for each in found for value in each.values())
    assert all(each["status"] in ("ok", "warn", "fail") for each in found)
    assert all(each["remedy"] for each in found if each["status"] != "ok")
    assert [each["name"] for each in found] == [*checks.ALONE, *checks.CHECKS]


@needs_no_driver
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_torch_is_not_imported_where_there_is_no_gpu(device: str) -> None:
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    program = f"{report}; from lockstep.launch.cli.main import main; main()"
    command = [sys.executable, "-c", program, "doctor", DEMO_MODEL, f"--device={device}", "--tp=2", "--max-num-seqs=8"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(ended.stdout.splitlines()) == len(checks.ALONE) + len(checks.CHECKS)
    imported = set(ended.stderr.split())
    assert "lockstep.launch.doctor.checks" in imported
    assert not imported & {"torch", "transformers", "ray"}


@needs_no_driver
def test_without_a_driver_torch_sees_no_gpu_either(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"device": "auto", "tensor_parallel_size": 2, "max_num_seqs": 8}
    found = examined(**asked)
    monkeypatch.setattr(checks, "DRIVER_LIBRARIES", ("libc.so.6",))  # torch is asked
    again = examined(**asked)
    assert list(found) == list(again)
    names = set(found) - {"shared memory"}  # others use it, too
    assert {name: found[name] for name in names} == {name: again[name] for name in names}


def test_where_there_is_a_driver_torch_counts_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(checks, "DRIVER_LIBRARIES", ("libnone.so.1", "libc.so.6"))
    assert checks.visible_gpus() == 3
    assert checks.Case(Config(tensor_parallel_size=2), "127.0.0.1").gpus == 2
    assert checks.Case(Config(tensor_parallel_size=2, device="cpu"), "127.0.0.1").gpus == 0
    assert checks.devices(checks.Case(Config(), "127.0.0.1")).finding.endswith("and 3 GPUs")


def test_the_cuda_of_torch_is_known_without_it() -> None:
    assert checks.cuda_of_torch() == torch.version.cuda


def test_an_impossible_tp_size_is_named_with_those_that_are_possible() -> None:
    found = examined(tensor_parallel_size=3, max_num_seqs=8)
    assert failed(found) == {"tensor parallel", "memory"}
    assert found["tensor parallel"].remedy == "use tensor_parallel_size=1, 2, 4"
    sizes = ModelConfig.from_folder(DEMO_MODEL).tensor_parallel_sizes()
    assert sizes == [1, 2, 4]
    for size in range(1, 65):
        verdict = examined(tensor_parallel_size=size, load_format="dummy", max_num_seqs=8)["tensor parallel"]
        assert (verdict.status == "ok") == (size in sizes)


def test_the_memory_plan_is_the_one_of_a_start() -> None:
    config = Config(device="cpu", max_num_seqs=4, max_num_batched_tokens=64)
    executor = LocalExecutor(config, ModelConfig.from_folder(DEMO_MODEL), Path(DEMO_MODEL))
    plan = executor.memory
    executor.close()
    found = examined(max_num_seqs=4, max_num_batched_tokens=64)["memory"]
    assert found.status == "ok"
    assert f"{plan.weights / MIB:.1f} MiB of weights" in found.finding
    assert f"{plan.tokens:,} tokens" in found.finding
    assert f"longest context {executor.limits.max_model_len:,}" in found.finding


def test_two_ranks_hold_half_of_what_is_split() -> None:
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
    "settings": (lambda f: (f / "tokenizer_config.json").write_text("{"), {"tokenizer"}, "cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), {"tensor parallel", "memory"}, "has no config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "names", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_fails_where_it_is_damaged(
    checkpoint: Path, damage: Callable[[Path], object], names: set[str], message: str
) -> None:
    damage(checkpoint)
    found = examined(model=str(checkpoint), max_num_seqs=8)
    assert failed(found) == names
    for name in names:
        assert message in found[name].finding
        assert found[name].remedy
        assert "\n" not in str(found[name])


def test_weights_need_not_be_there_for_random_ones(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert not failed(examined(model=str(checkpoint), load_format="dummy", max_num_seqs=8))


def test_a_hub_model_is_not_fetched() -> None:
    found = examined(model="nobody/nothing", max_num_seqs=8)
    assert failed(found) == {"tensor parallel", "checkpoint", "tokenizer", "memory"}
    assert found["checkpoint"].remedy == "hf download nobody/nothing"


def test_a_check_that_crashes_fails_by_name_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(case: checks.Case) -> Finding:
        raise ZeroDivisionError("seven by zero\nand more")

    monkeypatch.setitem(checks.CHECKS, "tokenizer", crash)
    found = examined(max_num_seqs=8)
    assert failed(found) == {"tokenizer"}
    assert list(found) == [*checks.ALONE, *checks.CHECKS]
    assert found["tokenizer"].finding == "the check crashed: ZeroDivisionError: seven by zero"


# -- other machines, as numbers


def test_packages_are_held_against_what_the_project_requires() -> None:
    wanted = [Requirement("torch>=2.9"), Requirement("ray>=2.52"), Requirement("cupy-cuda13x>=14")]
    there = {"torch": "2.11.0+cu130", "ray": "2.60.0", "cupy-cuda13x": "14.1"}

    def judge(there: dict[str, str], cuda: str | None = "13.0", driver: bool = True) -> Finding:
        return checks.judge_packages(wanted, there, cuda, driver=driver, extra="cuda13")

    assert judge(there).status == "ok"
    assert "cupy-cuda13x 14.1, CUDA 13.0" in judge(there).finding
    assert judge(there, cuda=None).status == "warn", "a CPU build beside a driver"
    assert judge(there, cuda=None, driver=False).status == "ok"
    old = judge({**there, "ray": "2.9.0"})
    assert (old.status, old.finding) == ("fail", "needs ray>=2.52 (2.9.0)")
    del there["cupy-cuda13x"]
    assert judge(there).finding == "needs cupy-cuda13x>=14 (not there)"
    assert "lockstep[cuda13]" in judge(there).remedy


def test_a_checkout_that_is_not_installed_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_version", lambda name: None)
    finding = checks.run("packages", lambda: checks.packages(checks.Case(Config(), "127.0.0.1")))
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
    found = checks.judge_devices(Config(**options), nodes)
    assert found.status == status
    assert f"10.0.0.0 has 16 CPUs and {gpus[0]} GPUs" in found.finding


def test_gpus_needed() -> None:
    shares = [(8, 1.0, 8), (4, 0.5, 2), (5, 0.5, 3), (2, 0.6, 2), (3, 1 / 3, 1)]
    for ranks, share, gpus in shares:
        assert checks.gpus_needed(Config(tensor_parallel_size=ranks, gpus_per_rank=share)) == gpus


@pytest.mark.parametrize(
    ("free", "ray_bytes", "nccl", "status"),
    [(64, 80, 0, "warn"), (80, 80, 0, "ok"), (64, 80, 128, "fail"), (150, 80, 128, "warn"), (208, 80, 128, "ok")],
)
def test_shared_memory(free: int, ray_bytes: int, nccl: int, status: str) -> None:
    found = checks.judge_shared_memory(free * MIB, ray_bytes * MIB, nccl * MIB)
    assert found.status == status
    assert (found.remedy != "") == (status != "ok")


def test_open_files() -> None:
    assert checks.judge_open_files(1024, 4096, 1024).status == "fail"
    assert checks.judge_open_files(1024, 1024, 256).status == "warn"
    assert "as root" in checks.judge_open_files(1024, 1024, 256).remedy
    assert checks.judge_open_files(65536, 65536, 256).status == "ok"
    assert checks.judge_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY, 256).status == "ok"


def test_neighbours_by_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '4711, 2048, GPU-{UUID}\\n4712, 50, GPU-{UUID}\\n9, 999, GPU-1\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setattr(gpu_processes, "QUERY", (str(smi),))
    held, free = ask_nvidia_smi(UUID), ask_nvidia_smi("another")
    found = checks.judge_neighbours([free, held], own_pid=1)
    assert (found.status, found.finding) == ("warn", "GPU 1: pid 4711 with 2.00 GiB")
    assert found.remedy
    assert checks.judge_neighbours([held], own_pid=4711).status == "ok"
    assert checks.judge_neighbours([free], own_pid=1).finding == "nobody else on 1 GPU"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert checks.judge_neighbours([ask_nvidia_smi(UUID)], own_pid=1).status == "warn"


def test_memory_on_a_gpu() -> None:
    asked = Config(max_model_len=4096)
    fits = checks.judge_memory(asked, asked, H200, host=0)
    assert fits.status == "ok"  # 0.9 * 140 - 16 = 110 GiB of pages of 2 MiB and 16 tokens
    assert "15.00 GiB of weights, 110.00 GiB of KV cache for 901,120 tokens, less" in fits.finding
    long = checks.judge_memory(Config(), Config(max_model_len=10**6), H200, host=0)
    assert (long.status, "longest context 901,120 of the model's 1,000,000" in long.finding) == ("warn", True)
    large = replace(H200, weights=130 * GIB)
    refused = checks.run("memory", lambda: checks.judge_memory(asked, asked, large, host=0))
    assert (refused.status, refused.remedy) == ("fail", "raise gpu_memory_utilization to 0.94")


def test_memory_of_a_host_that_is_too_small() -> None:
    host = MemoryPlan(place="the CPU", weights=GIB, page_bytes=MIB, page_size=16)
    asked = Config(tensor_parallel_size=2, max_model_len=1024, kv_cache_memory=1.0)
    assert checks.judge_memory(asked, asked, host, host=4 * GIB).status == "ok"
    small = checks.judge_memory(asked, asked, host, host=4 * GIB - 1)
    assert (small.status, small.remedy) == ("warn", "lower --kv-cache-memory")


def test_libnccl() -> None:
    one, two = "/a/libnccl.so.2", "/b/libnccl.so.2"
    assert checks.judge_nccl("NCCL 2.28.9", one, [one], chosen=False).finding == f"NCCL 2.28.9 from {one}"
    assert checks.judge_nccl("NCCL 2.28.9", one, [one, two], chosen=False).status == "warn"
    assert checks.judge_nccl("NCCL 2.32.3", two, [one, two], chosen=True).status == "ok"


def test_interfaces() -> None:
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}
    assert checks.judge_interface("10.0.0.5", True, addresses).finding == "eth0, 10.0.0.5"
    assert checks.judge_interface("10.0.0.6", True, addresses).status == "ok"
    assert checks.judge_interface("10.0.0.7", False, addresses).status == "fail"
    assert checks.interface(checks.Case(Config(), "127.0.0.1")).finding == "lo, 127.0.0.1"
    assert checks.interface(checks.Case(Config(), "192.0.2.1")).status == "fail"  # reserved for documentation


# -- peers


def test_peers() -> None:
    assert checks.judge_peers({"0 to 1": "direct", "1 to 0": "direct"}).status == "ok"
    assert checks.judge_peers({"0 to 1": "direct", "1 to 0": "staged"}).status == "warn"
    wrong = checks.judge_peers({"0 to 1": "wrong", "1 to 0": "staged"})
    assert (wrong.status, "GPU 0 to 1" in wrong.finding) == ("fail", True)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ('print(\'{"0 to 1": "direct"}\')', "ok"),
        ("import time; time.sleep(60)", "hang, nothing after"),
        ("raise RuntimeError('no such device')", "RuntimeError: no such device"),
    ],
)
def test_the_process_that_tries_the_peers(monkeypatch: pytest.MonkeyPatch, program: str, outcome: str) -> None:
    monkeypatch.setattr(p2p, "PROGRAM", program)
    monkeypatch.setattr(p2p, "DEADLINE_S", 60.0 if "sleep" not in program else 0.3)
    test = p2p.P2PCheck(2)
    try:
        found = checks.run("peers", lambda: checks.judge_peers(test.result()))
    finally:
        test.close()
    assert outcome in str(found)
    assert (found.status == "ok") == (outcome == "ok")


@pytest.mark.multigpu
def test_peers_of_this_machine() -> None:
    test = p2p.P2PCheck(2)
    try:
        found = test.result()
    finally:
        test.close()
    assert set(found) == {"0 to 1", "1 to 0"}
    assert "wrong" not in found.values()


@pytest.mark.gpu
def test_a_machine_with_a_gpu() -> None:
    found = examined(device="auto", max_num_seqs=8)
    assert not failed(found)
    assert "NCCL 2" in found["NCCL"].finding
    assert "each rank on GPU" in found["memory"].finding


# -- clusters


def test_what_all_nodes_find_alike_is_said_once() -> None:
    same, full = Finding("open files", "ok", "limit of 65536"), Finding("shared memory", "warn", "1 MiB free", "free")
    roomy = replace(full, status="ok", finding="9 GiB free", remedy="")
    found = list(merged({"10.0.0.1": [same, full], "10.0.0.2": [same, roomy], "10.0.0.3": [same, roomy]}))
    assert [finding.name for finding in found] == [
        "open files",
        "shared memory on 10.0.0.1",
        "shared memory on 10.0.0.2, 10.0.0.3",
    ]


def test_versions_must_be_equal() -> None:
    nodes = {"a": {"Python": "3.12.1", "NCCL": "2.28.9"}, "b": {"Python": "3.12.1", "NCCL": "2.28.9"}}
    nodes["c"] = {"Python": "3.12.1"}  # no GPU
    assert judge_versions(nodes).status == "ok"
    nodes["b"]["NCCL"] = "2.27.3"
    unequal = judge_versions(nodes)
    assert (unequal.status, unequal.finding) == ("fail", "NCCL (a has 2.28.9, b has 2.27.3)")


def test_only_nodes_that_may_get_a_rank_look_at_themselves() -> None:
    nodes = {"head": {"CPU": 8.0}, "a": {"CPU": 8.0, "GPU": 4.0}, "busy": {"GPU": 4.0}}
    assert candidates(Config(), nodes) == ["a"]
    assert candidates(Config(device="cpu"), nodes) == ["head", "a"]
    assert candidates(Config(), {"empty": {}}) == ["empty"]


def test_a_node_that_no_other_can_join_is_told_how() -> None:
    assert judge_addresses(["10.0.0.1", "10.0.0.2"]).status == judge_addresses(["10.0.0.1"]).status == "ok"
    lonely = judge_addresses(["127.0.0.1"])
    assert lonely.status == "warn"
    assert "--node-ip-address" in lonely.remedy


@pytest.mark.usefixtures("no_cluster")
def test_a_cluster_that_is_not_there(command: Command) -> None:
    status, out = command("--ray-address=127.0.0.1:9", "--log-level=error")
    assert status == 1
    assert re.fullmatch(r"fail  Ray cluster: no Ray cluster at 127.0.0.1:9: [^\n]+; [^\n]+\n", out)


def test_each_node_of_a_cluster_looks_at_itself(ray_cluster: dict[str, str], checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    asked = {"model": str(checkpoint), "ray_address": "auto", "max_num_seqs": 8}
    found = examined(tensor_parallel_size=2, **asked)
    assert failed(found) == {"checkpoint"}
    assert list(found) == ["Ray cluster", "devices", "equal versions", *checks.CHECKS]
    assert ray.util.get_node_ip_address() in found["interface"].finding
    assert failed(examined(tensor_parallel_size=8, **asked)) >= {"devices", "checkpoint"}
    assert ray.is_initialized(), "a connection that was there before is left"
