"""The files of the page at /: a chat with the model and a live view of the engine."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

FOLDER = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}


async def send_page_file(request: Request) -> Response:
    """Return the file of the requested path."""
    return FileResponse(FOLDER / FILES[request.url.path])
