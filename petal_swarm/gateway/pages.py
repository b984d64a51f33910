"""The pages and their files, read once: what a visitor gets fits together, and no disk is waited for."""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

#: Of our own files alone. Systems disagree on these (Windows asks its registry), and browsers run no module
#: of another type.
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGES = {"/": "index.html", "/swarm": "swarm.html"}


class StaticFile:
    """One file: browsers keep it, and ask each time whether it has changed."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._headers = {
            "Cache-Control": "no-cache",
            "Content-Type": TYPES[name[name.rindex(".") :]],
            "ETag": f'"{hashlib.sha256(content).hexdigest()[:24]}"',
        }

    async def respond(self, request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if self._headers["ETag"] in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def page_routes() -> list[BaseRoute]:
    """`/`, `/swarm`, and what they load from `/static/`."""
    files = {
        entry.name: StaticFile(entry.name, entry.read_bytes())
        for entry in (resources.files("petal_swarm.gateway") / "static").iterdir()
        if entry.name.endswith(tuple(TYPES))
    }
    pages = {path: name for path, name in PAGES.items() if name in files}
    return [
        *(Route(path, files[name].respond) for path, name in pages.items()),
        *(Route(f"/static/{name}", file.respond) for name, file in sorted(files.items())),
    ]
