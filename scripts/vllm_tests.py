"""Run vLLM's own tests of its HTTP API against a running server: `vllm_tests.py SOURCE --url URL [pytest arguments]`.

SOURCE is a checkout, or the unpacked source distribution, of vLLM. Tests that send requests run; those of vLLM's own
classes are left out. vLLM need not be installed: a package of the same name stands in for what the tests import. The
environment needs pytest, pytest-asyncio, openai, anthropic, jsonschema, requests and transformers.

`--names` prints the models that the tests ask for, as arguments of `lockstep serve`.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from transformers import AutoConfig, AutoTokenizer

FILES = """
openai/chat_completion/test_chat.py openai/chat_completion/test_chat_completion.py
openai/chat_completion/test_chat_echo.py openai/chat_completion/test_chat_logit_bias_validation.py
openai/chat_completion/test_completion_with_function_calling.py openai/chat_completion/test_include_reasoning.py
openai/chat_completion/test_logprob_token_ids.py openai/completion/test_completion.py
openai/completion/test_prompt_validation.py openai/completion/test_token_in_token_out.py
openai/test_return_token_ids.py openai/test_return_tokens_as_ids.py openai/test_chunked_prompt.py
openai/models/test_models.py openai/responses/test_basic.py openai/responses/test_function_call.py
openai/responses/test_simple.py openai/responses/test_structured_output.py openai/responses/test_stateful.py
anthropic/test_messages.py serve/tokenize/test_tokenization.py
""".split()  # noqa: SIM905 - as a list it has 21 lines
CLIENTS = {"server", "client", "async_client", "server_fixture", "zephyr_server"}  # fixtures that reach a server
MODEL_NAME = re.compile(r'^MODEL_NAME = "(.+)"$|"--served-model-name",\s+"(.+)"', re.MULTILINE)


class RunningServer:
    """Takes the place of vLLM's RemoteOpenAIServer; the server runs already."""

    url_root = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        del arguments, options  # those of `vllm serve`

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *error: object) -> None: ...

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *(part.strip("/") for part in parts if part)])

    def get_client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url_for("v1"), api_key="unused", max_retries=0, **options)

    def get_async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key="unused", max_retries=0, **options)

    def get_client_anthropic(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url_root, api_key="unused", max_retries=0, **options)

    def get_async_client_anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.url_root, api_key="unused", max_retries=0, **options)


class Anything(Exception):
    """A class, object or function of vLLM, which does nothing; as a list of arguments it is empty."""

    vocab_size = 0  # of the served model

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __call__(self, *arguments: Any, **options: Any) -> Anything:
        return Anything()

    def __getattr__(self, name: str) -> Anything:
        return Anything()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __radd__(self, other: list[Any]) -> list[Any]:
        return other

    def get_vocab_size(self) -> int:
        return self.vocab_size


class StandIn(types.ModuleType):
    """A module with every attribute."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything() if name.isupper() else type(name, (Anything,), {})


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `vllm` with all modules below it, and the module of vLLM's tests that starts servers."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        is_known = name.partition(".")[0] == "vllm" or name == "tests.utils"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "tests.utils":
            module.RemoteOpenAIServer = RunningServer  # type: ignore[attr-defined]
        if module.__name__ == "vllm.tokenizers":
            module.get_tokenizer = lambda *_, **__: AutoTokenizer.from_pretrained(self._tokenizer)  # type: ignore[attr-defined]


class OnlyRequests:
    """A plugin of pytest that leaves out the tests without a server, and those of LoRA adapters."""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        left_out = [item for item in items if not CLIENTS & set(item.fixturenames) or "lora" in item.name]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    @pytest.fixture(scope="session")
    def qwen3_lora_files(self) -> str:
        return "no adapters"


def links_to(source: Path, folder: Path) -> Iterator[Path]:
    """Yield links to the tests below `folder`, which has the fixtures of vLLM's folders but those of the whole."""
    for name in FILES:
        test = Path("tests", "entrypoints", name)
        for package in list(test.parents)[:-1]:
            (folder / package).mkdir(parents=True, exist_ok=True)
            (folder / package / "__init__.py").touch()
        fixtures = [package / "conftest.py" for package in list(test.parents)[:-2]]
        for path in (test, *fixtures):
            if (source / path).exists() and not (folder / path).exists():
                (folder / path).symlink_to(source / path)
        yield folder / test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "launch" / "demo"), help="the served one")
    parser.add_argument("--folder", type=Path, default=Path("vllm_tests"), help="links to the tests are made here")
    parser.add_argument("--names", action="store_true")
    arguments, rest = parser.parse_known_args()
    links = list(links_to(arguments.source.resolve(), arguments.folder.resolve()))
    if arguments.names:
        matches = [match for link in links for match in MODEL_NAME.findall(link.read_text())]
        names = {name for match in matches for name in match if name}
        print(*(f"--served-model-name={name}" for name in sorted(names)))
        return 0
    RunningServer.url_root = arguments.url.rstrip("/")
    sys.meta_path.insert(0, StandInFinder(arguments.model))
    Anything.vocab_size = AutoConfig.from_pretrained(arguments.model).vocab_size
    sys.path.insert(0, str(arguments.folder.resolve()))
    options = ["-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "--rootdir", str(arguments.folder)]
    return pytest.main([*options, *map(str, links), *rest], plugins=[OnlyRequests()])


if __name__ == "__main__":
    sys.exit(main())
