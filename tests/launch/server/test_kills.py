"""Every process of a server is killed: streams go on with equal tokens, or the server ends and says why.

scripts/soak/soak_kills.py does the work and fails for wrong and lost streams, for an end without a reason, and for what
is left behind. docs/failures.md has the table of what happens.
"""

from __future__ import annotations

import pytest

from soak_scripts import FLAGS, script

pytestmark = [pytest.mark.serial]
STREAMS = 16
RAY = ["starter of Ray", "gcs_server", "raylet", "dashboard agent", "runtime env agent"]  # the ranks end with each
UNNEEDED = ["monitor", "dashboard", "log monitor"]


def kill(*kills: str, phase: str = "load") -> dict[str, object]:
    """Return the counts after these ROLE:SIGNAL at once, in one phase of a server with two ranks."""
    chosen = [argument for one in kills for argument in ("--kill", one)]
    result = script("soak_kills.py", *chosen, f"--phase={phase}", "--", "--tp=2", *FLAGS)
    assert result["kills"], "there was no such process"
    return result


@pytest.mark.process
def test_runtime_env_agent_killed_under_load_restarts_ray() -> None:
    result = kill("runtime env agent:SIGKILL")
    assert (result["right"], result["restarts"]) == (STREAMS, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSEGV", "SIGSTOP"])
@pytest.mark.parametrize("role", RAY)
def test_ray_killed_under_load_is_restarted(role: str, number: str) -> None:
    result = kill(f"{role}:{number}")
    assert (result["right"], result["restarts"]) == (STREAMS, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("role", UNNEEDED)
def test_unneeded_helper_killed_changes_nothing(role: str) -> None:
    result = kill(f"{role}:SIGKILL")
    assert (result["right"], result["restarts"]) == (STREAMS, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSEGV", "SIGSTOP"])
def test_rank_killed_under_load_is_restarted(number: str) -> None:
    result = kill(f"rank:{number}")
    assert (result["right"], result["restarts"]) == (STREAMS, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSEGV"])
@pytest.mark.parametrize("role", ["grammar compiler", "text process"])
def test_process_for_one_input_killed_is_replaced(role: str, number: str) -> None:
    result = kill(f"{role}:{number}")
    assert (result["right"], result["restarts"]) == (STREAMS, 0)


@pytest.mark.soak
@pytest.mark.parametrize("second", ["rank", "gcs_server", "raylet", "monitor"])
@pytest.mark.parametrize("first", ["rank", *RAY])
def test_two_killed_at_once_are_restarted(first: str, second: str) -> None:
    result = kill(f"{first}:SIGKILL", f"{second}:SIGKILL")
    assert result["right"] == STREAMS
    assert result["restarts"] == 1


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["recovery", "ray-recovery"])
@pytest.mark.parametrize("role", ["rank", *RAY, *UNNEEDED])
def test_killed_during_recovery_goes_on_or_ends_with_the_reason(role: str, phase: str) -> None:
    result = kill(f"{role}:SIGKILL", phase=phase)
    assert result["exits"] or result["right"] == STREAMS


@pytest.mark.soak
@pytest.mark.parametrize("role", ["rank", *RAY, *UNNEEDED, "grammar compiler"])
def test_killed_while_draining_ends_in_order(role: str) -> None:
    result = kill(f"{role}:SIGKILL", phase="drain")
    assert result["right"] == STREAMS
    assert not result["exits"]


@pytest.mark.soak
@pytest.mark.parametrize("role", ["preflight checks", "rank", *RAY])
def test_killed_while_starting_ends_with_the_reason(role: str) -> None:
    result = kill(f"{role}:SIGKILL", phase="start")
    assert result["exits"]


@pytest.mark.soak
def test_server_killed_leaves_nothing() -> None:
    kill("server:SIGKILL")


@pytest.mark.soak
@pytest.mark.parametrize("role", ["rank", "replica", "Serve controller", "raylet", "gcs_server"])
def test_replicas_killed_under_load_are_replaced(role: str) -> None:
    result = script("soak_kills.py", f"--kill={role}:SIGKILL", "--", "--replicas=2", *FLAGS)
    assert result["right"] == STREAMS


@pytest.mark.soak
def test_random_kills_lose_no_stream() -> None:
    result = script("soak_kills.py", "--seconds=120", "--", "--tp=2", *FLAGS)
    assert result["right"] > STREAMS
