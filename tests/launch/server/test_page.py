"""The files of the page, and the routes and fields that its script uses; test_browser.py runs the script."""

from __future__ import annotations

import re
from collections.abc import Callable

from lockstep.launch.engine.engine_state import Health

from fake_engine import KEY, Running, fake

FILES = ("/", "/page.css", "/page.js", "/api.js", "/chat.js", "/engine.js")
VENDOR = ("/vendor/markdown-it.min.js", "/vendor/uplot.min.js", "/vendor/uplot.min.css", "/vendor/LICENSES.txt")


SCRIPTS = tuple(path for path in FILES if path.endswith(".js"))


def text_of(running: Running, *paths: str) -> str:
    return "".join(running.http.get(path).text for path in paths)


def test_page_files_and_routes_exist(run: Callable[..., Running]) -> None:
    running = run()
    for path in (*FILES, *VENDOR):
        response = running.http.get(path)
        assert response.status_code == 200, path
        assert "default-src 'self'" in response.headers["content-security-policy"]
    page, script = running.http.get("/"), text_of(running, *SCRIPTS)
    assert page.headers["content-type"].startswith("text/html")
    used = {path[1:] for path in (*FILES, *VENDOR)} - {"", "api.js", "chat.js", "engine.js", "vendor/LICENSES.txt"}
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', page.text)) == {"data:,", *used}
    assert {f"/{name}" for name in re.findall(r'from "\./(\w+\.js)"', script)} <= set(FILES)
    assert set(re.findall(r'element\("(\w+)"\)', script)) <= set(re.findall(r'id="([\w-]+)"', page.text))
    routes = set(re.findall(r'(?:request|getJson)\("([^"]+)"', script))
    assert routes == {"/v1/chat/completions", "/v1/models", "/stats"}
    for route in routes:
        assert running.http.get(route).status_code in (200, 405), route


def test_stats_have_the_fields_of_the_page(run: Callable[..., Running]) -> None:
    running = run()
    fake(running).steps = 7
    fields, script = running.http.get("/stats").json(), text_of(running, "/page.js", "/engine.js")
    shown = set(re.findall(r"(?:stats|now|last)\.(\w+)", script)) - {"at"}
    shown |= set(re.findall(r'per(?:Second|Step)\("(\w+)"\)', script))
    assert {"steps", "output_tokens", "prefix_queries", "wait_s", "events"} <= shown <= set(fields)
    assert (fields["state"], fields["steps"], fields["preemptions"], fields["restarts"]) == ("ready", 7, 3, 2)
    (rank,) = fields["ranks"]
    assert set(re.findall(r"\br\.(\w+)", script)) <= set(rank)
    assert (rank["rank"], rank["host"], rank["pid"], rank["state"]) == (0, "host", 1, "running")
    fake(running).health = Health("recovering", "rank 0 died")
    assert running.http.get("/stats").json()["ranks"][0]["state"] == "ended"
    assert fields["events"] == [{"at": 5.0, "event": "rank 0 died"}]


def test_key_as_browser_password(run: Callable[..., Running]) -> None:
    running = run(api_key=[KEY])
    for path in (*FILES, "/stats"):
        refused = running.http.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert running.http.get(path, auth=("anybody", KEY)).status_code == 200
        assert running.http.get(path, auth=("anybody", "wrong")).status_code == 401
        assert running.http.get(path, headers={"Authorization": "Basic !"}).status_code == 401
