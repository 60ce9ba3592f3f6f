"""A probe of a Ray cluster, made in a child process before this process joins it.

ray.init tries for 20 s to join a cluster that refuses its token, and logs each attempt. If the token's file cannot be
read, it ends the process. A server that is no GCS keeps it waiting for 40 s, without a reaction to Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path

from ...comm.message_text import first_line
from ..child_process import ChildFailed, ChildProcess, calling
from ..errors import PlacementError

ANSWER_S = 15.0  # a GCS answers in milliseconds, but the import of Ray takes seconds on a busy machine
REMEDY = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the token of its nodes"
NOT_AUTHENTICATED, NOT_REACHED = "not authenticated", "not reached"


def probe_cluster(address: str) -> None:
    """Return if the cluster at HOST:PORT or "auto" lets this process in; raises PlacementError with the reason."""
    _check_token_file()
    with closing(ChildProcess([*calling(print_answer), address])) as child:
        try:
            problem, message = child.answer(ANSWER_S)
        except TimeoutError:
            reason = f"what listens there has not answered as Ray does within {ANSWER_S:.0f} s"
            raise PlacementError(f"no Ray cluster at {address}: {reason}; give the address of a head") from None
        except ChildFailed as error:
            raise PlacementError(
                f"Ray cannot connect to {address}: its process ended: {error}; see ray status"
            ) from None
    if problem == NOT_AUTHENTICATED:
        raise PlacementError(f"the Ray cluster at {address} refuses {_token_in_use()}; {REMEDY}")
    if problem == NOT_REACHED:
        raise PlacementError(f"no Ray cluster at {address}: {message}; see that it runs, with the same Ray and Python")


def print_answer() -> None:
    """Run in the child process: connect to the GCS and print why that fails, or two empty strings, as JSON."""
    import ray
    from ray.exceptions import AuthenticationError, RayError

    problem, message = "", ""
    try:
        address = sys.argv[1]
        if address == "auto":
            address = ray._private.services.canonicalize_bootstrap_address_or_die(address)
        ray._raylet.GcsClient(address=address)
    except AuthenticationError as error:
        problem, message = NOT_AUTHENTICATED, first_line(error)
    except (RayError, ConnectionError, ValueError) as error:
        problem, message = NOT_REACHED, first_line(error)
    print(json.dumps([problem, message]))


def _check_token_file() -> None:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if _mode() != "token" or os.environ.get("RAY_AUTH_TOKEN") or not path:
        return
    try:
        token = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise PlacementError(f"RAY_AUTH_TOKEN_PATH={path} cannot be read: {error}; {REMEDY}") from error
    if not token:
        raise PlacementError(f"RAY_AUTH_TOKEN_PATH={path} is empty; {REMEDY}")


def _mode() -> str:
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def _token_in_use() -> str:
    """Return which token this process has sent, for people to read."""
    if _mode() != "token":
        return f"processes without a token, and RAY_AUTH_MODE is {_mode() or 'not set'} here"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the token in RAY_AUTH_TOKEN, which goes before RAY_AUTH_TOKEN_PATH"
    return f"the token in {os.environ.get('RAY_AUTH_TOKEN_PATH') or '~/.ray/auth_token'}"
