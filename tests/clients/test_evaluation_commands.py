"""The llm command with functions, guidellm and lm-eval against the server; they have an environment of their own.

pip install llm==0.36 guidellm==0.8.1 "lm-eval[api]==0.4.13"
PATH=DIR/bin:$PATH python -m pytest tests/clients
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.launch.llm import LLM
from lockstep.runtime.config import DEMO_MODEL, DEMO_NAME
from lockstep.runtime.sampling_params import SamplingParams

from fake_engine import Running, demo_server
from scripted_agent import ScriptedAgent
from small import SMALL

pytestmark = [pytest.mark.clients, pytest.mark.process]
TIMEOUT_S = 150
FUNCTION = "def multiply(a: int, b: int) -> int:\n    return a * b\n"
QUESTIONS: list[dict[str, Any]] = [
    {"text": "In the beginning God created", "choices": [" the heaven", " a spaceship", " Moses"], "label": 0},
    {"text": "And the LORD said unto", "choices": [" the beginning", " Moses", " table"], "label": 1},
    {"text": "Blessed are the", "choices": [" computers", " meek", " poor"], "label": 1},
    {"text": "Thou shalt not", "choices": [" kill", " surely", " be"], "label": 0},
]
TASK = """
task: verses
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def run(command: list[str], home: Path, **environment: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on the PATH; pip installs it")
    done = subprocess.run(
        command, cwd=home, env={**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with demo_server() as running:
        yield running


def test_llm_calls_a_function(tmp_path: Path) -> None:
    agent = ScriptedAgent("multiply", {"a": 3, "b": 14})
    running = Running(agent)
    model = {"model_id": "lockstep", "model_name": "demo", "api_base": f"{running.url}/v1", "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # YAML, too
    command = ["llm", "-m", "lockstep", "--functions", FUNCTION, "--td", "What is 3 times 14?"]
    try:
        answer = run(command, tmp_path, LLM_USER_PATH=str(tmp_path))
    finally:
        running.close()
    assert "Done." in answer
    assert "42" in answer, "the result of the function, which --td shows"


@pytest.mark.parametrize("profile", ["kind=synchronous", "kind=concurrent,streams=4"])
def test_guidellm(server: Running, tmp_path: Path, profile: str) -> None:
    report = tmp_path / "report.json"
    run(
        [
            "guidellm", "run", "--backend", f"kind=openai_http,target={server.url}", "--profile", profile,
            "--constraint", "kind=max_requests,count=8", "--tokenizer", f"kind=hf_auto,model={DEMO_MODEL}",
            "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--output", f"kind=json,path={report}",
            "--disable-console",
        ], tmp_path,
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"]["successful"] == 8
    assert metrics["request_totals"]["errored"] == 0
    assert metrics["output_token_count"]["successful"]["mean"] == 8


def test_lm_eval_scores_as_llm(server: Running, tmp_path: Path) -> None:
    data = tmp_path / "verses.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "verses.yaml").write_text(TASK.replace("FILE", str(data)))
    arguments = f"base_url={server.url}/v1/completions,model={DEMO_NAME},tokenizer_backend=remote,num_concurrent=4"
    run(
        [
            "lm_eval", "run", "--model", "local-completions", "--model_args", f"{arguments},tokenized_requests=False",
            "--tasks", "verses", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
        ], tmp_path,
    )  # fmt: skip
    (results,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["verses"]
    assert scores["acc,none"] == expected_accuracy()


def expected_accuracy() -> float:
    """The share of questions whose right choice is the likeliest by the engine's own log-probabilities."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    right = 0
    with LLM(**SMALL) as llm:
        for question in QUESTIONS:
            prefix = len(llm.tokenizer.encode(question["text"]))
            texts = [question["text"] + choice for choice in question["choices"]]
            totals = []
            for result in llm.generate(texts, params, use_tqdm=False):
                positions = list(zip(result.prompt_token_ids, result.prompt_logprobs or (), strict=True))[prefix:]
                totals.append(sum((entry or {})[token].logprob for token, entry in positions))
            right += totals.index(max(totals)) == question["label"]
    return right / len(QUESTIONS)
