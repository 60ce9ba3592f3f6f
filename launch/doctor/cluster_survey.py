"""The doctor on a cluster: every node checks itself, and findings that are equal on all nodes are reported once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...comm.message_sockets import WakeupEvent
from ...comm.message_text import counted, last_line
from ...runtime.config import Config
from ..cluster.connection import start_ray
from ..cluster.placement import nodes
from ..cluster.rank_resources import bundle, fitting
from .finding import Finding, ok, run_check, warn
from .machine_checks import devices_finding, uses_gpus, versions
from .planned_start import LOOPBACK, PlannedStart

NODE_S = 60.0  # longest wait for the findings of all nodes

Examine = Callable[..., Iterable[Finding]]


def survey(config: Config, examine: Examine) -> Iterator[Finding]:
    """Yield the findings of the cluster, and those of each node from `examine(config, ip, alone=False)` run there."""
    with ExitStack() as stack:
        connected = run_check("Ray cluster", partial(_connect, config, stack))
        yield connected
        if connected.status == "fail":
            return
        by_ip = {node["NodeManagerAddress"]: node for node in nodes()}
        resources = {ip: node["Resources"] for ip, node in by_ip.items()}
        yield run_check("devices", partial(devices_finding, config, resources))
        known_versions: dict[str, dict[str, str]] = {}
        findings: dict[str, list[Finding]] = {}
        examined = {ip: by_ip[ip] for ip in candidates(config, resources)}
        for ip, call in _examine_nodes(config, examine, examined).items():
            try:
                known_versions[ip], findings[ip] = ray.get(call, timeout=0)
            except RayError as error:
                yield _no_answer_finding(ip, error)
        yield versions_finding(known_versions)
        yield from merge_findings(findings)


def candidates(config: Config, resources: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the nodes that a rank may run on, or all if there is none: a head without GPUs needs no checkpoint."""
    rank_resources = bundle(config, cuda=uses_gpus(config, resources))
    return [ip for ip, amounts in resources.items() if fitting(amounts, rank_resources)] or list(resources)


def _no_answer_finding(ip: str, error: RayError) -> Finding:
    text = f"no report within {NODE_S:.0f} s: {type(error).__name__}: {last_line(str(error))}"
    return Finding(f"node {ip}", "fail", text, "install the same lockstep there, and check its load")


def versions_finding(by_node: Mapping[str, Mapping[str, str]]) -> Finding:
    """Return the finding for the versions of each node by name; nodes without GPUs need no NCCL."""
    names = list(dict.fromkeys(name for versions in by_node.values() for name in versions))
    by_name = {name: {ip: versions[name] for ip, versions in by_node.items() if name in versions} for name in names}
    unequal = [
        f"{name} ({', '.join(f'{ip} has {version}' for ip, version in by_ip.items())})"
        for name, by_ip in by_name.items()
        if len(set(by_ip.values())) > 1
    ]
    if unequal:
        return Finding("equal versions", "fail", ", ".join(unequal), "install the same on every node")
    return Finding("equal versions", "ok", f"{', '.join(names)} on {counted(len(by_node), 'node')}")


def merge_findings(findings: Mapping[str, Sequence[Finding]]) -> Iterator[Finding]:
    """Yield a finding that is equal on all nodes once, and any other with the names of its nodes."""
    ips_by_finding: dict[Finding, list[str]] = {}
    for ip, node_findings in findings.items():
        for finding in node_findings:
            ips_by_finding.setdefault(finding, []).append(ip)
    for finding, ips in ips_by_finding.items():
        everywhere = len(ips) == len(findings)
        yield finding if everywhere else replace(finding, name=f"{finding.name} on {', '.join(ips)}")


def _connect(config: Config, stack: ExitStack) -> Finding:
    """Connect to the cluster, unless this process is connected; `stack` disconnects."""
    connection = start_ray(config, threading.Event(), WakeupEvent())  # config has an address: nothing is started
    if connection is not None:
        stack.callback(ray.shutdown)
        stack.callback(connection.close)
    return addresses_finding([node["NodeManagerAddress"] for node in nodes()])


def addresses_finding(addresses: Sequence[str]) -> Finding:
    """Return the finding for the addresses of a cluster's nodes."""
    if addresses == [LOOPBACK]:  # Ray takes it without a route to the outside; no other node can join then
        remedy = "ray start --head --node-ip-address=ITS_IP lets others join"
        return warn(f"the only node calls itself {LOOPBACK}", remedy)
    return ok(f"connected, {counted(len(addresses), 'node')}")


def _examine_nodes(config: Config, examine: Examine, by_ip: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a call on each node by its address; calls that have not ended after NODE_S are cancelled."""
    config = config.with_absolute_model()
    task = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_examine_node)  # a new process sees the GPUs
    pinned = {ip: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for ip, node in by_ip.items()}
    calls = {ip: task.options(scheduling_strategy=node).remote(config, examine, ip) for ip, node in pinned.items()}
    _, silent = ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_S)
    for call in silent:
        ray.cancel(call, force=True)
    return calls


def _examine_node(config: Config, examine: Examine, ip: str) -> tuple[dict[str, str], list[Finding]]:
    """Return the versions and findings of this node; Ray runs it on each node."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]  # Ray hides the GPUs from tasks that take none
    token = run_check("Ray token", lambda: token_finding(authenticated=_needs_token()))
    return versions(PlannedStart(config, ip)), [token, *examine(config, ip, alone=False)]


def token_finding(*, authenticated: bool) -> Finding:
    """Return the finding for a cluster that does or does not authenticate its clients."""
    if not authenticated:
        remedy = "start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on every node (docs/security.md)"
        return warn("every process that reaches this Ray cluster can run code on it: it asks for no token", remedy)
    return ok("the cluster refuses clients without its token")


def _needs_token() -> bool:
    """Return whether the node that runs this asks for a token: its processes inherit the mode."""
    return bool(ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN)
