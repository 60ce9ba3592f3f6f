"""The processes of a server and what each one does, for the scripts that kill them."""

from __future__ import annotations

import os
from pathlib import Path

# role: part of its command line; the first one counts, because the raylet has other commands among its arguments
ROLES = {
    "starter of Ray": "import serve_cluster",
    "preflight checks": "import print_findings",
    "API server": "api_server_process import",
    "grammar compiler": "lockstep.runtime.sampling.grammar",
    "text process": "lockstep.runtime.text_worker",
    "gcs_server": "/gcs_server ",
    "raylet": "/raylet/raylet ",
    "dashboard agent": "ray::DashboardAgent",
    "runtime env agent": "ray::RuntimeEnvAgent",
    "log monitor": "/log_monitor.py",
    "Serve controller": "ray::ServeController",
    "replica": "ray::ServeReplica",
    "rank": "ray::Worker",
}
STARTING = {  # before the process has set its title
    "dashboard agent": "/dashboard/agent.py ",
    "runtime env agent": "/runtime_env/agent/main.py ",
    "rank": "/default_worker.py ",
}


def process_tree(root: int) -> dict[int, str]:
    """Return the role, or else the first words of the command line, of each descendant of this process, by pid."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # the process has ended
            continue
        if fields[0] not in "XZ":
            parents[int(folder.name)], commands[int(folder.name)] = int(fields[1]), command
    tree: dict[int, str] = {}
    below = {root}
    while below:
        below = {pid for pid, parent in parents.items() if parent in below}
        tree |= {pid: role_of(commands[pid]) for pid in below if commands[pid]}
    return tree


def role_of(command: str) -> str:
    """Return what a process does, by its command line."""
    for role, part in (*ROLES.items(), *STARTING.items()):
        if part in command:
            return role
    return " ".join(os.path.basename(word) for word in command.split()[:3])
