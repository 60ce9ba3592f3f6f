"""Every process of a server is killed: streams go on with equal tokens, or the server ends and says why.

scripts/soak/soak_kills.py does the work and fails for wrong and lost streams, for an end without a reason, and for what
is left behind. docs/failures.md has the table of what happens.
"""

from __future__ import annotations

from typing import Any

import pytest

from soak_scripts import FLAGS, script

pytestmark = [pytest.mark.serial]
STREAMS = 16
RAY = ["starter of Ray", "gcs_server", "raylet", "dashboard agent", "runtime env agent"]  # the ranks end with each
UNNEEDED = ["log monitor"]
PAIRS = ["rank:SIGKILL,raylet:SIGKILL", "gcs_server:SIGKILL,starter of Ray:SIGKILL"]


def kill(*rounds: str, phase: str = "load", ranks: str = "--tp=2", api_servers: int = 1) -> list[dict[str, Any]]:
    """Return the result of each round of ROLE:SIGNAL,ROLE:SIGNAL at once, in one phase of a server."""
    arguments, count = [f"--kill={kills}" for kills in rounds], f"--api-server-count={api_servers}"
    result = script("soak_kills.py", *arguments, f"--phase={phase}", "--length=100", "--", ranks, count, *FLAGS)
    assert result["kills"] >= len(rounds), "there was no such process"
    rounds_done: list[dict[str, Any]] = result["rounds"]
    return rounds_done


def assert_restarted(results: list[dict[str, Any]]) -> None:
    assert [(r["kills"], r["right"], r["restarts"]) for r in results] == [(r["kills"], STREAMS, 1) for r in results]


def assert_unchanged(results: list[dict[str, Any]]) -> None:
    assert [(r["kills"], r["right"], r["restarts"]) for r in results] == [(r["kills"], STREAMS, 0) for r in results]


@pytest.mark.process
def test_runtime_env_agent_killed_under_load_restarts_ray() -> None:
    """Also the daily start and end of `lockstep serve` with two ranks on a Ray cluster that it starts."""
    assert_restarted(kill("runtime env agent:SIGKILL"))


@pytest.mark.nightly
@pytest.mark.parametrize("role", RAY)
def test_ray_killed_under_load_is_restarted(role: str) -> None:
    assert_restarted(kill(f"{role}:SIGKILL", f"{role}:SIGSEGV", f"{role}:SIGSTOP"))


@pytest.mark.nightly
def test_unneeded_helper_killed_changes_nothing() -> None:
    assert_unchanged(kill(*(f"{role}:SIGKILL" for role in UNNEEDED)))


@pytest.mark.nightly
def test_rank_killed_under_load_is_restarted() -> None:
    assert_restarted(kill("rank:SIGKILL", "rank:SIGSEGV", "rank:SIGSTOP"))


@pytest.mark.nightly
def test_ranks_killed_beside_api_servers_are_restarted() -> None:
    assert_restarted(kill("rank:SIGKILL", "raylet:SIGKILL", "rank:SIGSTOP", api_servers=3))
    assert_unchanged(kill("grammar compiler:SIGKILL", "text process:SIGKILL", api_servers=3))


@pytest.mark.nightly
def test_process_for_one_input_killed_is_replaced() -> None:
    roles = ("grammar compiler", "text process")
    assert_unchanged(kill(*(f"{role}:{number}" for role in roles for number in ("SIGKILL", "SIGSEGV"))))


@pytest.mark.soak
@pytest.mark.parametrize("first", ["rank", *RAY])
def test_two_killed_at_once_are_restarted(first: str) -> None:
    seconds = ("rank", "gcs_server", "raylet", "log monitor")
    assert_restarted(kill(*(f"{first}:SIGKILL,{second}:SIGKILL" for second in seconds)))


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["recovery", "ray-recovery"])
def test_killed_during_recovery_goes_on_or_ends_with_the_reason(phase: str) -> None:
    for result in kill(*(f"{role}:SIGKILL" for role in ("rank", *RAY, *UNNEEDED)), *PAIRS, phase=phase):
        assert result["exits"] or result["right"] == STREAMS


@pytest.mark.soak
def test_killed_while_draining_ends_in_order() -> None:
    roles = ("rank", *RAY, *UNNEEDED, "grammar compiler")
    for result in kill(*(f"{role}:SIGKILL" for role in roles), *PAIRS, phase="drain"):
        assert result["right"] == STREAMS
        assert not result["exits"]


@pytest.mark.soak
def test_killed_while_starting_ends_with_the_reason() -> None:
    for result in kill(*(f"{role}:SIGKILL" for role in ("preflight checks", *RAY)), *PAIRS, phase="start"):
        assert result["exits"]


@pytest.mark.soak
def test_rank_killed_while_starting_is_started_again() -> None:
    """Ray notices it after 30 s; if the rank has registered already, the server ends with the reason."""
    (result,) = kill("rank:SIGKILL", phase="start")
    assert all("rank" in text for text in result["exits"])


@pytest.mark.soak
def test_server_killed_leaves_nothing() -> None:
    kill("server:SIGKILL")


@pytest.mark.soak
def test_replicas_killed_under_load_are_replaced() -> None:
    roles = ("rank", "replica", "Serve controller", "raylet", "gcs_server")
    for result in kill(*(f"{role}:SIGKILL" for role in roles), ranks="--replicas=2"):
        assert result["right"] == STREAMS


@pytest.mark.soak
def test_random_kills_lose_no_stream() -> None:
    result = script("soak_kills.py", "--seconds=120", "--", "--tp=2", *FLAGS)
    assert result["right"] > STREAMS


@pytest.mark.nightly
def test_two_servers_start_at_once_and_fail_independently() -> None:
    kills = ("rank:SIGKILL", "raylet:SIGKILL", "gcs_server:SIGSTOP", "starter of Ray:SIGKILL")
    result = script("soak_two_servers.py", *(f"--kill={kill}" for kill in kills), "--", "--tp=2", *FLAGS)
    assert len(result["rounds"]) == len(kills) + 1
