"""Claude Code and Codex against the server, up to an answer after a tool call; a scripted engine plays the model.

npm install --prefix DIR @openai/codex@0.171.0 @anthropic-ai/claude-code@2.1.197
PATH=DIR/node_modules/.bin:$PATH python -m pytest tests/clients
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fake_engine import Running
from scripted_agent import ScriptedAgent

pytestmark = [pytest.mark.clients, pytest.mark.process]
TIMEOUT_S = 120


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path


def run_agent(home: Path, command: list[str], **environment: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on the PATH; npm installs it")
    done = subprocess.run(
        command, cwd=home / "work", env={**os.environ, "HOME": str(home), "IS_SANDBOX": "1", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("max_model_len", [1_000_000, 60_000])
def test_claude_code(home: Path, max_model_len: int) -> None:
    """Its prompt and the 32,000 tokens that it asks for exceed the smaller context: it asks for fewer then."""
    agent = ScriptedAgent("Bash", {"command": "echo hi > made", "description": "x"})
    agent.limits = replace(agent.limits, max_model_len=max_model_len)
    running = Running(agent)
    try:
        answer = run_agent(
            home, ["claude", "-p", "Make a file.", "--output-format", "json", "--allowedTools", "Bash"],
            ANTHROPIC_BASE_URL=running.url, ANTHROPIC_API_KEY="unused", ANTHROPIC_MODEL="demo",
            ANTHROPIC_SMALL_FAST_MODEL="demo", CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )  # fmt: skip
    finally:
        running.close()
    assert json.loads(answer)["result"] == "Done."
    assert (home / "work/made").read_text() == "hi\n"


def test_codex(home: Path) -> None:
    running = Running(ScriptedAgent("exec_command", {"cmd": "echo hi > made"}))
    (home / ".codex").mkdir()
    (home / ".codex/config.toml").write_text(
        f'model = "demo"\nmodel_provider = "lockstep"\nweb_search = "disabled"\n[model_providers.lockstep]\n'
        f'name = "lockstep"\nbase_url = "{running.url}/v1"\nwire_api = "responses"\n'
    )
    command = ["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Make a file."]
    try:
        answer = run_agent(home, command)
    finally:
        running.close()
    assert answer.strip() == "Done."
    assert (home / "work/made").read_text() == "hi\n"
