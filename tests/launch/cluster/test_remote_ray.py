"""The watch of a cluster that others have started, over a socket in place of its GCS."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest
import ray

from lockstep.comm.message_sockets import WakeupEvent
from lockstep.launch.cluster import remote_ray
from lockstep.launch.cluster.connection import Connection
from lockstep.launch.cluster.remote_ray import RemoteRay
from lockstep.launch.errors import RankFailed, RayLost
from lockstep.runtime.config import Config

from waiting import wait_until


class FakeGcs:
    """A server that lets anybody connect, and says nothing."""

    def __init__(self, port: int = 0) -> None:
        self.socket = socket.create_server(("127.0.0.1", port), backlog=100)
        self.port = self.socket.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def end(self) -> None:
        self.socket.close()


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch, no_cluster: None) -> FakeGcs:
    started = FakeGcs()
    for name in ("probe_cluster", "join_ray"):
        monkeypatch.setattr(remote_ray, name, lambda address: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=started.address))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(remote_ray, "WATCH_S", 0.02)
    return started


def test_gcs_that_comes_back_is_no_loss(gcs: FakeGcs, caplog: pytest.LogCaptureFixture) -> None:
    remote = RemoteRay("auto", WakeupEvent())
    gcs.end()
    wait_until(lambda: "waiting up to 30 s" in caplog.text)
    assert f"no Ray cluster at {gcs.address}: [Errno 111] Connection refused" in caplog.text
    back = FakeGcs(gcs.port)
    assert remote.check() is None
    assert remote.failure is None
    remote.close()
    back.end()


def test_gcs_that_is_gone_for_long_is_a_loss(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_ray, "LOST_S", 0.1)
    wakeup = WakeupEvent()
    remote = RemoteRay(gcs.address, wakeup)
    gcs.end()
    wakeup.wait()
    assert isinstance(remote.failure, RayLost)
    assert str(remote.failure).startswith(f"the Ray cluster at {gcs.address} is lost: [Errno 111] Connection refused")
    remote.close()
    assert not [thread for thread in threading.enumerate() if thread is remote._watcher]


def test_connection_to_a_lost_cluster_is_restored_when_it_is_back(gcs: FakeGcs) -> None:
    connection = Connection(Config(ray_address=gcs.address))
    assert connection.ip is None
    connection.check()
    gcs.end()
    with pytest.raises(RayLost, match=r"is lost: .*refused"):
        connection.check()
    with pytest.raises(RankFailed, match=r"^no Ray cluster at 127\.0\.0\.1:\d+: .*refused; see that it runs"):
        connection.restore()
    back = FakeGcs(gcs.port)
    connection.restore()
    connection.check()
    connection.close()
    back.end()
