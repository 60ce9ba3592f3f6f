"""The loop of a leader whose front end is another process: commands come and reports go over ZeroMQ."""

from __future__ import annotations

from ..comm.message_sockets import PullSocket, PushSocket
from .engine import Engine
from .plan import Cancel, Report, StartProfile, Submit, decode_command, encode


def lead(engine: Engine, inbox: PullSocket, outputs: PushSocket) -> None:
    """Run steps while there is work, and commands as they come, until the Stop command."""
    while True:
        for message in inbox.receive(0 if engine.has_work else None):
            command = decode_command(message)
            if isinstance(command, Submit):
                engine.add(command.requests)
            elif isinstance(command, Cancel):
                engine.cancel(command.uids)
            elif isinstance(command, StartProfile):
                engine.start_profile(command.num_steps)
            else:
                return
        if engine.has_work:
            output = engine.step()
            outputs.send(encode(Report(output, engine.stats, engine.take_profile())))
