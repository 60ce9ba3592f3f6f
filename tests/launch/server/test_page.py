"""The files of the page, and the routes and fields that its script uses; test_browser.py runs the script."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx

from fake_engine import KEY, Running, fake

FILES = ("/", "/page.css", "/page.js")


def test_page_files_and_routes_exist(run: Callable[..., Running]) -> None:
    running = run()
    texts = {path: running.http.get(path) for path in FILES}
    assert {path: r.status_code for path, r in texts.items()} == dict.fromkeys(FILES, 200)
    assert texts["/"].headers["content-type"].startswith("text/html")
    assert set(re.findall(r'(?:src|href)="([^"]+)"', texts["/"].text)) == {"data:,", "page.css", "page.js"}
    ids = set(re.findall(r'id="(\w+)"', texts["/"].text))
    assert set(re.findall(r'element\("(\w+)"\)', texts["/page.js"].text)) <= ids
    routes = set(re.findall(r'request\("([^"]+)"', texts["/page.js"].text))
    assert routes == {"/v1/chat/completions", "/v1/models", "/stats"}
    for route in routes:
        assert running.http.get(route).status_code in (200, 405), route


def test_stats_have_the_fields_of_the_page(run: Callable[..., Running]) -> None:
    running = run()
    fake(running).steps = 7
    fields = running.http.get("/stats").json()
    shown = set(re.findall(r"stats\.(\w+)", running.http.get("/page.js").text)) | {"steps", "output_tokens"}
    assert shown <= set(fields)
    assert (fields["state"], fields["steps"], fields["preemptions"], fields["restarts"]) == ("ready", 7, 3, 2)
    assert fields["ranks"] == [{"rank": 0, "host": "host", "pid": 1, "state": "running"}]


def test_key_as_browser_password(run: Callable[..., Running]) -> None:
    running = run(api_key=[KEY])
    for path in (*FILES, "/stats"):
        refused = httpx.get(running.url + path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(running.url + path, auth=("anybody", KEY)).status_code == 200
        assert httpx.get(running.url + path, auth=("anybody", "wrong")).status_code == 401
        assert httpx.get(running.url + path, headers={"Authorization": "Basic !"}).status_code == 401
