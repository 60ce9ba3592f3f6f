"""The address of the Ray cluster to use, without Ray: the doctor and one rank in this process do not import it."""

from __future__ import annotations

import os
import re

from ...runtime.config import Config

HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):[0-9]{1,5}")
LOCAL = "local"
REMEDY = "give HOST:PORT of the cluster's head (port 6379 by default), or auto on one of its nodes"
OTHER_SERVICES = {
    "http": f"is the address of a web page or of Ray's jobs; {REMEDY}",
    "https": f"is the address of a web page or of Ray's jobs; {REMEDY}",
    "ray": f"is the address of Ray Client, which ranks cannot use; {REMEDY}",
}


def ray_address(config: Config) -> str:
    """Return HOST:PORT, "auto" or "local"; RAY_ADDRESS counts where the option is not given, unless it is empty.

    Raises ValueError for the address of another service.
    """
    name, address = "ray_address", config.ray_address
    if not address:
        name, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "").strip() or LOCAL
    scheme, separator, _ = address.partition("://")
    if separator:
        raise ValueError(f"{name}={address!r} {OTHER_SERVICES.get(scheme.lower(), f'is no address of Ray; {REMEDY}')}")
    if address not in (LOCAL, "auto") and HOST_PORT.fullmatch(address) is None:
        raise ValueError(f"{name}={address!r} is no address of Ray; {REMEDY}")
    return address


def uses_local_ray(config: Config) -> bool:
    """Return whether the start uses no Ray, or a local cluster that it starts."""
    return ray_address(config) == LOCAL


def needs_local_ray(config: Config, replicas: int = 1) -> bool:
    """Return whether the start needs a local cluster: one rank runs without Ray."""
    return uses_local_ray(config) and replicas * config.tensor_parallel_size > 1
