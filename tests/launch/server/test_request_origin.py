"""The recognition of clients, and the places that the server keeps for those with little work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx

from fake_engine import CHAT_BODY, COMPLETION, KEY, Running, fake
from waiting import join, wait_until

MESSAGE = {"model": "demo", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}
RESPONSE = {"input": "a", "max_output_tokens": 16}


def post_from(running: Running, address: str, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    """Post from an address of the loopback network."""
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=running.url, transport=transport, timeout=60) as client:
        return client.post(path, json=body, headers=headers)


def clients_of(running: Running) -> list[int]:
    origins = fake(running).origins
    assert len({origin.call for origin in origins}) == len(origins)
    return [origin.client for origin in origins]


def test_clients_are_users_or_addresses(run: Callable[..., Running]) -> None:
    running = run()
    for address in ("127.0.0.1", "127.0.0.1", "127.0.0.2"):
        post_from(running, address, "/v1/completions", COMPLETION)
    for address in ("127.0.0.1", "127.0.0.2"):
        post_from(running, address, "/v1/completions", COMPLETION | {"user": "ann"})
        post_from(running, address, "/v1/chat/completions", CHAT_BODY | {"safety_identifier": "ann"})
        post_from(running, address, "/v1/messages", MESSAGE | {"metadata": {"user_id": "ann"}})
        post_from(running, address, "/v1/responses", RESPONSE | {"user": "ann"})
    post_from(running, "127.0.0.1", "/v1/completions", COMPLETION | {"user": "bob"})
    here, again, there, *ann, bob = clients_of(running)
    assert here == again
    assert len(set(ann)) == 1
    assert len({here, there, ann[0], bob}) == 4


def test_several_keys_tell_clients_apart_and_one_key_does_not(run: Callable[..., Running]) -> None:
    several, one = run(api_key=[KEY, "other"]), run(api_key=[KEY])
    for key, user in ((KEY, "ann"), (KEY, "bob"), ("other", "ann")):
        body = COMPLETION | {"user": user}
        post_from(several, "127.0.0.1", "/v1/completions", body, authorization=f"Bearer {key}")
        post_from(one, "127.0.0.1", "/v1/completions", body, authorization=f"Bearer {KEY}")
    first, same_key, other_key = clients_of(several)
    assert first == same_key != other_key
    assert len(set(clients_of(one))) == 2


def test_prompts_and_outputs_of_a_request_are_one_call(run: Callable[..., Running]) -> None:
    running = run()
    body = COMPLETION | {"prompt": [[5], [6], [7]], "n": 2}
    assert running.post("/v1/completions", body).status_code == 200
    assert len(fake(running).origins) == 3
    assert len(set(fake(running).origins)) == 1


def test_full_queue_has_places_for_clients_with_little(run: Callable[..., Running]) -> None:
    running = run(max_queued=64)
    service = fake(running)
    service.paused = True
    body = COMPLETION | {"prompt": [[5]] * 9, "n": 8}  # all of 8 running and 64 waiting outputs
    thread = threading.Thread(target=running.post, args=("/v1/completions", body))
    thread.start()
    wait_until(lambda: service.live == 72)
    assert running.post("/v1/completions", COMPLETION).status_code == 429
    few = threading.Thread(target=post_from, args=(running, "127.0.0.2", "/v1/completions", COMPLETION))
    few.start()
    wait_until(lambda: service.live == 73)
    assert post_from(running, "127.0.0.2", "/v1/completions", COMPLETION).status_code == 429  # has its place
    service.paused = False
    join(thread)
    join(few)
