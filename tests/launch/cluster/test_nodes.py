"""A cluster of two nodes with a network between them: the tokens of one rank, and what happens when the link is cut."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep import LLM, SamplingParams

from listeners import listeners
from nodes import ADDRESSES, Nodes, why_not
from processes import marked
from small import COMMAND, SMALL, SMALL_FLAGS
from waiting import holds_within, wait_until

pytestmark = [pytest.mark.netns, pytest.mark.serial]
SUPPORT = Path(__file__).parents[2] / "support"
OURS = r"lockstep\.launch\.cli|ray::(Worker|RankActor)"
FLAGS = ["--tp=2", "--ray-address=auto", *SMALL_FLAGS]
PROMPT = "In the beginning"
LONG = 300  # tokens, some seconds
STEP_S = 2  # --step-timeout
GRACE_S = 5  # which the leader has to say itself whom it waits for
REPORT_S = STEP_S + GRACE_S + 30  # and a busy machine
# Who speaks first: the rank on this side, which waited; the owner of a leader on the other side; or Ray.
WAITED = (
    r"rank (?P<one>\d) on node-[ab] \(10\.213\.7\.\d\), pid \d+ failed: CommError: rank (?P=one) of 2:"
    r" all_\w+ failed or took longer than 2 s: .*; no response from rank \d on node-[ab] \("
)
SILENT = r"no step has ended for \d+ s, step_timeout is over: rank 0 on node-b"
NODE_DIED = r"rank \d on node-b \(10\.213\.7\.2\), pid \d+ died: The actor died because its node has died.*heartbeats"
CUT = f"({WAITED}|{SILENT}|{NODE_DIED})"
ASK = """
import json, sys, urllib.request
body = {"prompt": sys.argv[1], "max_tokens": int(sys.argv[2]), "temperature": 0, "ignore_eos": True, "stream": True}
asked = urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode())
asked.add_header("content-type", "application/json")
for line in urllib.request.urlopen(asked):
    if line.startswith(b"data: {"):
        print(json.dumps(json.loads(line[6:])["choices"][0]), flush=True)
"""
HEALTH = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen("http://127.0.0.1:8000/health").status)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""
# Each attack on each port, and a call without a token: Ray's gRPC servers must answer UNAUTHENTICATED.
ATTACK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from hostile_peers import ATTACKS, half_open
for host, port in json.loads(sys.argv[2]):
    connections = half_open((host, port), 20)
    for attack in ATTACKS.values():
        attack((host, port))
"""
CALL = """
import json, sys
import grpc
for host, port in json.loads(sys.argv[1]):
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            channel.unary_unary("/ray.rpc.CoreWorkerService/PushTask")(b"", timeout=20)
        except grpc.RpcError as error:
            print(error.code().name)
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """The head runs; "b" is there, but without Ray."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    nodes = Nodes()
    try:
        nodes.start_ray("a")
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="module")
def undisturbed() -> str:
    """Return the output of one rank for PROMPT."""
    with LLM(**SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=LONG, ignore_eos=True)
        return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text


def test_late_node_is_waited_for_and_tokens_equal_one_rank(nodes: Nodes, undisturbed: str) -> None:
    """One CPU a node: two ranks can only run on different ones."""
    out, err = nodes.folder / "generated", nodes.folder / "generate.log"
    flags = ["--temperature=0", "--max-tokens=40", "--ignore-eos", "--json", "--wait-for-gpus=60"]
    command = nodes.start("a", [*COMMAND, "generate", *FLAGS, *flags, f"--prompt={PROMPT}"], out, err)
    assert holds_within(60, lambda: "nodes are missing" in err.read_text()), err.read_text()
    nodes.start_ray("b")
    assert command.wait(60) == 0, err.read_text()
    text = json.loads(out.read_text())["text"]
    assert undisturbed.startswith(text)
    assert len(text) > 40
    roster = re.search(r"2 ranks on 2 nodes\n +rank +node +address +interface.*\n(.*)\n(.*)\n", err.read_text())
    assert roster is not None
    places = {tuple(line.split()[1:4]) for line in roster.groups()}
    assert places == {(f"node-{n}", ADDRESSES[n], nodes.interface(n)) for n in "ab"}


def test_ports_of_two_nodes_are_on_their_addresses_and_refuse_strangers(nodes: Nodes, undisturbed: str) -> None:
    """The ports of ranks and server; Ray's own processes listen as the user has started them."""
    answer, err = nodes.folder / "attacked", nodes.folder / "attacked.log"
    server = nodes.start("a", [*COMMAND, "serve", *FLAGS], nodes.folder / "out", err)
    assert holds_within(60, lambda: "serving" in err.read_text()), err.read_text()
    ports = [port for port in listeners(marked(nodes.mark)) if re.search(OURS, port.title)]
    assert [str(port.address) for port in ports if port.port == 8000] == ["127.0.0.1"]
    lan = [port for port in ports if str(port.address) in ADDRESSES.values()]
    home = {port.pid: str(port.address) for port in lan}
    assert set(home.values()) == set(ADDRESSES.values())
    beyond = [port for port in ports if port not in lan and not port.address.is_loopback]  # of Ray's worker
    places = [(home[port.pid], port.port) for port in beyond]
    for node in ADDRESSES:
        codes = nodes.run(node, [sys.executable, "-c", CALL, json.dumps(places)])
        assert codes.split() == ["UNAUTHENTICATED"] * len(places)
    attacked = json.dumps([*places, *(port.place for port in lan)])
    asking = nodes.start("a", [sys.executable, "-c", ASK, PROMPT, str(LONG)], answer, nodes.folder / "ask.log")
    nodes.run("b", [sys.executable, "-c", ATTACK, str(SUPPORT), attacked], timeout_s=120)
    assert asking.wait(60) == 0, err.read_text()
    assert "".join(choice["text"] for choice in lines(answer)) == undisturbed
    server.terminate()
    assert server.wait(60) == 0
    assert "ERROR" not in err.read_text()


def test_cut_link_ends_offline_run_with_the_reason(nodes: Nodes) -> None:
    out, err = nodes.folder / "offline", nodes.folder / "offline.log"
    flags = ["--temperature=0", "--max-tokens=1900", "--ignore-eos", f"--step-timeout={STEP_S}"]
    command = nodes.start("a", [*COMMAND, "generate", *FLAGS, *flags, f"--prompt={PROMPT}"], out, err)
    assert holds_within(60, lambda: out.read_text()), err.read_text()
    nodes.link("down")
    try:
        assert holds_within(REPORT_S, lambda: re.search(f"error: {CUT}", err.read_text())), err.read_text()
        assert command.wait(60) == 1
    finally:
        nodes.link("up")
    wait_until(lambda: not nodes.marked("ray::Worker"))


def test_node_lost_and_back_streams_continue(nodes: Nodes, undisturbed: str) -> None:
    """The link is cut until Ray has given up the node; then it is up again, and so is the node."""
    answer, err = nodes.folder / "answer", nodes.folder / "serve.log"
    nodes.end_ray("b")  # Ray may have given it up in the test before
    nodes.start_ray("b")
    flags = [f"--step-timeout={STEP_S}", "--wait-for-gpus=60"]
    server = nodes.start("a", [*COMMAND, "serve", *FLAGS, *flags], nodes.folder / "out", err)
    assert holds_within(60, lambda: "serving" in err.read_text()), err.read_text()
    asking = nodes.start("a", [sys.executable, "-c", ASK, PROMPT, str(LONG)], answer, nodes.folder / "ask.log")
    wait_until(lambda: len(lines(answer)) > 20)
    nodes.link("down")
    assert holds_within(REPORT_S, lambda: re.search(f"ERROR {CUT}", err.read_text())), err.read_text()
    health = nodes.run("a", [sys.executable, "-c", HEALTH])
    assert health.startswith("503 ")
    assert re.search(f"the engine is recovering: {CUT}", health)
    assert holds_within(60, lambda: "nodes are missing" in err.read_text()), err.read_text()
    nodes.link("up")
    nodes.start_ray("b")
    assert asking.wait(60) == 0, err.read_text()
    choices = lines(answer)
    assert "".join(choice["text"] for choice in choices) == undisturbed
    assert choices[-1]["finish_reason"] == "length"
    assert "back after" in err.read_text()
    assert nodes.run("a", [sys.executable, "-c", HEALTH]) == "200\n"
    server.terminate()
    assert server.wait(60) == 0
    wait_until(lambda: not nodes.marked("ray::Worker"))


def lines(file: Path) -> list[dict[str, Any]]:
    """The complete ones."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
