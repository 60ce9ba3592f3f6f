"""The page at /: a chat with the model, and a live view of the engine; static files that ask the API."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

FOLDER = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}


async def send(request: Request) -> Response:
    """One of the files."""
    return FileResponse(FOLDER / FILES[request.url.path])
