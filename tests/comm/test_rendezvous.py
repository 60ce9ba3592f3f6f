"""The rendezvous: exchange between authenticated ranks, deadlines that name the silent, and peers without a key."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import msgspec
import pytest
import torch
import zmq

from lockstep.comm.base import CommError
from lockstep.comm.connect import connect
from lockstep.comm.message_sockets import FRAME_BYTES, Address, PullSocket, PushSocket
from lockstep.comm.rendezvous import RankStore, Rendezvous

from hostile_peers import ATTACKS, MIB, half_open, resident_bytes

LOOPBACK = "127.0.0.1"


def place(address: Address) -> tuple[str, int]:
    host, _, port = address.url.removeprefix("tcp://").rpartition(":")
    return host, int(port)


@pytest.fixture
def stores() -> Iterator[list[RankStore]]:
    """The stores of three ranks in this process, joined."""
    stores = [RankStore(LOOPBACK) for _ in range(3)]
    for rank, store in enumerate(stores):
        store.join(rank, [other.address for other in stores], 5.0)
    yield stores
    for store in stores:
        store.close()


def in_threads(calls: list[Callable[[], object]]) -> list[object]:
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except CommError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_exchange_returns_the_messages_of_all_ranks_in_order(stores: list[RankStore]) -> None:
    points = [Rendezvous(store, rank, 3, 5.0) for rank, store in enumerate(stores)]
    for topic in ("a", "b"):
        calls = [partial(point.exchange, topic, f"{topic} from {point.rank}") for point in points]
        assert in_threads(calls) == [[f"{topic} from {rank}" for rank in range(3)]] * 3


def test_silent_ranks_are_named(stores: list[RankStore]) -> None:
    for rank in range(2):  # they are connected before the deadline counts
        stores[rank].set(f"connected/{rank}", b"")
        stores[1 - rank].get(f"connected/{rank}")
    points = [Rendezvous(store, rank, 3, 0.3) for rank, store in enumerate(stores)]
    first, second = in_threads([partial(point.exchange, "topic") for point in points[:2]])
    assert str(first) == "rank 0 of 3: no message within 0 s from rank 2"
    assert str(second) == "rank 1 of 3: no message within 0 s from rank 2"


def test_value_larger_than_a_frame_arrives_whole(stores: list[RankStore]) -> None:
    value = bytes(range(256)) * (FRAME_BYTES // 64)
    stores[0].set("key", value)
    assert stores[1].get("key") == stores[2].get("key") == value
    assert stores[1].check(["key"])
    assert not stores[1].check(["key", "other"])


def test_store_serves_gloo_of_torch(stores: list[RankStore]) -> None:
    """gloo reads and writes the store from C++."""

    def job(rank: int) -> list[float]:
        options = {"own_ip": LOOPBACK, "device": torch.device("cpu"), "timeout_s": 20.0}
        comm = connect(rank, 3, store=stores[rank], **options)  # type: ignore[arg-type]
        total = comm.all_reduce(torch.tensor([float(rank + 1)])).tolist()
        stores[rank].close()  # the ranks have met
        assert comm.all_reduce(torch.tensor([1.0])).tolist() == [3.0]
        comm.close()
        return total  # type: ignore[no-any-return]

    assert in_threads([partial(job, rank) for rank in range(3)]) == [[6.0]] * 3


def test_gloo_without_a_peer_fails_at_the_deadline() -> None:
    stores = [RankStore(LOOPBACK) for _ in range(2)]
    stores[0].join(0, [store.address for store in stores], 1.0)
    started = time.monotonic()
    with pytest.raises(CommError, match=r"^rank 0 of 2 could not join the group"):
        connect(0, 2, store=stores[0], own_ip=LOOPBACK, device=torch.device("cpu"), timeout_s=1.0)
    assert time.monotonic() - started < 30
    for store in stores:
        store.close()


@pytest.mark.parametrize("attack", ATTACKS)
def test_peer_without_the_key_stores_and_reads_nothing(stores: list[RankStore], attack: str) -> None:
    """Neither memory grows nor values change, and the ranks still meet."""
    gc.collect()
    before = resident_bytes()
    assert ATTACKS[attack](place(stores[0].address)) < 8
    assert resident_bytes() - before < 16 * MIB
    assert stores[0]._values == {}
    stores[1].set("key", b"value")
    assert stores[0].get("key") == b"value"


@pytest.mark.parametrize("key", ["none", "another"])
def test_zeromq_peer_without_the_key_is_not_heard(stores: list[RankStore], key: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as peer:
        peer.set(zmq.LINGER, 0)
        if key == "another":
            public, secret = zmq.curve_keypair()
            peer.set(zmq.CURVE_PUBLICKEY, public)
            peer.set(zmq.CURVE_SECRETKEY, secret)
            peer.set(zmq.CURVE_SERVERKEY, public)
        peer.connect(stores[0].address.url)
        with suppress(zmq.Again):
            peer.send(msgspec.msgpack.encode(("key", b"forged")), zmq.NOBLOCK)
        time.sleep(0.3)
        assert not stores[0].check(["key"])
    stores[1].set("key", b"value")
    assert stores[0].get("key") == b"value"


def test_half_open_connections_do_not_keep_ranks_out() -> None:
    stores = [RankStore(LOOPBACK) for _ in range(2)]
    peers = half_open(place(stores[0].address), 100)
    for rank, store in enumerate(stores):
        store.join(rank, [other.address for other in stores], 5.0)
    stores[1].set("key", b"value")
    assert stores[0].get("key") == b"value"
    for peer in [*peers, *stores]:
        peer.close()


@pytest.mark.parametrize("length", [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 5 * FRAME_BYTES + 7])
def test_message_of_any_length_arrives_whole_and_in_order(length: int) -> None:
    receiver = PullSocket(LOOPBACK)
    sender = PushSocket(receiver.address)
    sent = [bytes([number]) * length for number in range(3)]
    for message in sent:
        sender.send(message)
    received: list[bytes] = []
    while len(received) < 3:
        messages = receiver.receive(5.0)
        assert messages
        received += messages
    assert received == sent
    sender.close()
    receiver.close()
