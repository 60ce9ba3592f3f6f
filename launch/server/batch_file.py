"""OpenAI's batch format: a file of requests, one JSON object a line, and a file of their answers.

The answers are in the order in which the requests ended. An output file that exists is continued: requests whose
answers it has are not sent again, and half a line at its end, left by a kill, is cut off.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from ...comm.message_text import counted
from .server_config import BatchOptions

log = logging.getLogger(__name__)
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
MOST_MISTAKES = 5  # this many are named


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the input file."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw  # JSON, as it is sent


class BatchResponse(msgspec.Struct, frozen=True):
    """The response to one request."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchAnswer(msgspec.Struct, frozen=True):
    """One line of the output file."""

    id: str
    custom_id: str
    response: BatchResponse
    error: None = None  # OpenAI's, for requests that were never sent


class _Streamed(msgspec.Struct, frozen=True):
    stream: object = None


def read_requests(path: Path) -> list[BatchRequest]:
    """Return all requests of a file; raises ValueError naming the first mistakes and their lines."""
    requests, mistakes, lines = list[BatchRequest](), list[str](), dict[str, int]()
    decode = msgspec.json.Decoder(BatchRequest).decode
    for number, line in _lines(path):
        try:
            request = decode(line)
            if request.url not in ROUTES:
                raise ValueError(f"url {request.url!r:.100} is not one of {', '.join(ROUTES)}")
            if msgspec.json.decode(request.body, type=_Streamed).stream:
                raise ValueError("body.stream must be false: an answer is one line")
            if request.custom_id in lines:
                raise ValueError(f"custom_id {request.custom_id!r:.100} is also in line {lines[request.custom_id]}")
            lines[request.custom_id] = number
            requests.append(request)
        except ValueError as error:  # msgspec's errors, too
            mistakes.append(f"line {number}: {error}")
    if mistakes:
        rest = f"; and {len(mistakes) - MOST_MISTAKES} more lines" if len(mistakes) > MOST_MISTAKES else ""
        raise ValueError(f"{path} is not a batch of requests: {'; '.join(mistakes[:MOST_MISTAKES])}{rest}")
    if not requests:
        raise ValueError(f"{path} has no requests; give a JSON object a line")
    return requests


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, with their numbers from 1 on."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise ValueError(f"input file {path}: {error.strerror}") from error


class AnswerFile:
    """The output file. A kill of the process loses no answer whose `append` has returned."""

    def __init__(self, path: Path) -> None:
        """Open or continue a file; raises ValueError if it cannot be written or is something else."""
        try:
            # Not append mode: the position after the last complete line is set below.
            self._file: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise ValueError(f"output file {path}: {error.strerror}") from error
        self.answered: set[str] = set()  # the custom_id of each answer
        self.num_errors = 0  # answers that are errors
        decode, end = msgspec.json.Decoder(BatchAnswer).decode, 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._count(decode(line))
            except msgspec.DecodeError as error:
                self._file.close()
                reason = f"line {number} of output file {path} is no answer: {error}; give another file"
                raise ValueError(reason) from error
            end += len(line)
        self._file.seek(end)
        self._file.truncate()

    def append(self, request: BatchRequest, status: int, body: bytes) -> None:
        """Write the answer to a request; `body` is JSON without line breaks."""
        identity = uuid.uuid4().hex
        response = BatchResponse(status, f"req-{identity}", msgspec.Raw(body))
        answer = BatchAnswer(f"batch_req_{identity}", request.custom_id, response)
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self._file.flush()
        self._count(answer)

    def _count(self, answer: BatchAnswer) -> None:
        self.answered.add(answer.custom_id)
        self.num_errors += answer.response.status_code >= 400

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()


class BatchFiles:
    """The requests of an input file and the output file of their answers; raises ValueError for a wrong one.

    requests  all of the input file
    left      those that the output file had no answer to
    """

    def __init__(self, options: BatchOptions) -> None:
        assert options.input_file is not None, "BatchOptions refuses that"
        assert options.output_file is not None
        self.requests = read_requests(options.input_file)
        self.answers = AnswerFile(options.output_file)
        self.left = [request for request in self.requests if request.custom_id not in self.answers.answered]
        num_answered = len(self.requests) - len(self.left)
        log.info("%s, %d of them answered before", counted(len(self.requests), "request"), num_answered)

    def close(self) -> None:
        """Close the output file; safe to call twice."""
        self.answers.close()
