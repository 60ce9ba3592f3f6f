"""The probe of a cluster before this process joins it: each refusal is one line that says how to be let in."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from lockstep.launch.cluster import cluster_probe
from lockstep.launch.cluster.cluster_probe import NOT_AUTHENTICATED, NOT_REACHED, probe_cluster
from lockstep.launch.errors import PlacementError

ADDRESS = "10.0.0.1:6379"
HAS_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}


@pytest.fixture(autouse=True)
def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def answer(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let this program answer in place of the one that connects to Ray."""
    monkeypatch.setattr(cluster_probe, "calling", lambda function: ["-S", "-c", program])


def refusal() -> str:
    with pytest.raises(PlacementError) as raised:
        probe_cluster(ADDRESS)
    return str(raised.value)


@pytest.mark.parametrize(
    ("variables", "token"),
    [
        ({}, "processes without a token, and RAY_AUTH_MODE is not set here;"),
        ({"RAY_AUTH_MODE": "disabled"}, "processes without a token, and RAY_AUTH_MODE is disabled here;"),
        (HAS_TOKEN, "the token in RAY_AUTH_TOKEN, which goes before RAY_AUTH_TOKEN_PATH;"),
        ({"RAY_AUTH_MODE": "token"}, "the token in ~/.ray/auth_token;"),
    ],
)
def test_refusal_names_the_token_and_where_to_set_another(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], token: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer(monkeypatch, f"print({json.dumps(json.dumps([NOT_AUTHENTICATED, 'InvalidAuthToken']))})")
    text = refusal()
    assert text.startswith(
        f"the Ray cluster at {ADDRESS} refuses {token} set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PA"
    )
    assert len(text.splitlines()) == 1


def test_token_file_of_this_process_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray ends the process if the file is missing: it is read before."""
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert f"RAY_AUTH_TOKEN_PATH={path} cannot be read: [Errno 2]" in refusal()
    path.write_text("\n")
    assert f"RAY_AUTH_TOKEN_PATH={path} is empty; set" in refusal()
    path.write_text("secret")
    answer(monkeypatch, f"print({json.dumps(json.dumps([NOT_AUTHENTICATED, '']))})")
    assert f"refuses the token in {path};" in refusal()


def test_cluster_that_cannot_be_reached_is_named_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, f"print({json.dumps(json.dumps([NOT_REACHED, 'no GCS']))})")
    assert refusal() == f"no Ray cluster at {ADDRESS}: no GCS; see that it runs, with the same Ray and Python"
    answer(monkeypatch, "raise SystemExit('no Ray here')")
    assert refusal() == f"Ray cannot connect to {ADDRESS}: its process ended: no Ray here; see ray status"


def test_silent_server_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_probe, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PlacementError, match=rf"no Ray cluster at {address}: what listens there has not answered"):
            probe_cluster(address)


def test_cluster_that_lets_this_process_in_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, """print('["", ""]')""")
    probe_cluster(ADDRESS)
