"""The doctor on a cluster: every node looks at itself, and what all of them find alike is said once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...runtime.config import Config
from ..cluster.connection import start_ray
from ..cluster.placement import nodes
from ..cluster.resources import bundle, fitting
from ..signals import Undo
from .checks import Case, Finding, judge_devices, on_gpus, run, versions

LOOPBACK = "127.0.0.1"
NODE_S = 60.0  # for the slowest node to answer

Examine = Callable[..., Iterable[Finding]]


@dataclass(frozen=True)
class Report:
    """What a node says of itself."""

    versions: dict[str, str]
    findings: list[Finding]


def survey(config: Config, examine: Examine) -> Iterator[Finding]:
    """The findings of the cluster, of each node by `examine(config, ip, alone=False)` run there."""
    was_connected = ray.is_initialized()
    connected = run("Ray cluster", partial(_connect, config))
    yield connected
    if connected.status == "fail":
        return
    try:
        there = {node["NodeManagerAddress"]: node for node in nodes()}
        resources = {ip: node["Resources"] for ip, node in there.items()}
        yield run("devices", partial(judge_devices, config, resources))
        reports: dict[str, Report] = {}
        asked = {ip: there[ip] for ip in candidates(config, resources)}
        for ip, call in _ask(config, examine, asked).items():
            try:
                reports[ip] = ray.get(call, timeout=0)
            except RayError as error:
                yield judge_silence(ip, error)
        yield judge_versions({ip: report.versions for ip, report in reports.items()})
        yield from merged({ip: report.findings for ip, report in reports.items()})
    finally:
        if not was_connected:
            ray.shutdown()


def candidates(config: Config, resources: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The nodes that a rank may run on, all of them if there is none: a head without GPUs needs no checkpoint."""
    each = bundle(config, cuda=on_gpus(config, resources))
    return [ip for ip, amounts in resources.items() if fitting(amounts, each)] or list(resources)


def judge_silence(ip: str, error: RayError) -> Finding:
    reason = str(error).strip().splitlines()[-1]
    found = f"no report within {NODE_S:.0f} s: {type(error).__name__}: {reason}"
    return Finding(f"node {ip}", "fail", found, "install the same lockstep there, and see that it is not overloaded")


def judge_versions(found: Mapping[str, Mapping[str, str]]) -> Finding:
    """Of each node, versions by their names; who has no GPU has no NCCL and need not."""
    names = list(dict.fromkeys(name for versions in found.values() for name in versions))
    by_name = {name: {ip: known[name] for ip, known in found.items() if name in known} for name in names}
    unequal = [
        f"{name} ({', '.join(f'{ip} has {version}' for ip, version in known.items())})"
        for name, known in by_name.items()
        if len(set(known.values())) > 1
    ]
    if unequal:
        return Finding("equal versions", "fail", ", ".join(unequal), "install the same on every node")
    return Finding("equal versions", "ok", f"{', '.join(names)} on {len(found)} nodes")


def merged(findings: Mapping[str, Sequence[Finding]]) -> Iterator[Finding]:
    """Findings by node; one that is the same everywhere comes once, any other with the nodes that it is from."""
    where: dict[Finding, list[str]] = {}
    for ip, of_node in findings.items():
        for finding in of_node:
            where.setdefault(finding, []).append(ip)
    for finding, ips in where.items():
        everywhere = len(ips) == len(findings)
        yield finding if everywhere else replace(finding, name=f"{finding.name} on {', '.join(ips)}")


def _connect(config: Config) -> Finding:
    start_ray(config, Undo())  # there is an address, so nothing is started that would have to be undone
    return judge_addresses([node["NodeManagerAddress"] for node in nodes()])


def judge_addresses(addresses: Sequence[str]) -> Finding:
    """Of the nodes: Ray takes the loopback address where it finds no route out, and then no other node can join."""
    if addresses == [LOOPBACK]:
        found, remedy = (
            f"the only node calls itself {LOOPBACK}",
            "ray start --head --node-ip-address=ITS_IP lets others join",
        )
        return Finding("", "warn", found, remedy)
    return Finding("", "ok", f"connected, {len(addresses)} nodes")


def _ask(config: Config, examine: Examine, there: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A call on each node, by its address; those that have not ended after NODE_S are ended."""
    folder = Path(config.model).expanduser()
    if folder.is_dir():  # a relative path means another folder there
        config = replace(config, model=str(folder.resolve()))
    task = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_look)  # a fresh process: it is to see the GPUs
    pinned = {ip: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for ip, node in there.items()}
    calls = {ip: task.options(scheduling_strategy=here).remote(config, examine, ip) for ip, here in pinned.items()}
    _, silent = ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_S)
    for call in silent:
        ray.cancel(call, force=True)
    return calls


def _look(config: Config, examine: Examine, ip: str) -> Report:
    """Run by Ray on each node."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]  # Ray hides the GPUs from whoever asks for none
    return Report(versions(Case(config, ip)), list(examine(config, ip, alone=False)))
