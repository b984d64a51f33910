"""Pages and their files."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from starlette.applications import Starlette

from petal_swarm.gateway.pages import page_routes


def get(path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=page_routes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/talk.js", "text/javascript; charset=utf-8"),
        ("/static/base.css", "text/css; charset=utf-8"),
        ("/static/logo.svg", "image/svg+xml"),
    ],
)
def test_files_have_their_types_and_are_asked_for_again_only_when_changed(path: str, kind: str) -> None:
    answer = get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert answer.headers["cache-control"] == "no-cache"
    again = get(path, **{"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert get(path, **{"if-none-match": '"another"'}).status_code == 200


@pytest.mark.parametrize("path", ["/static/", "/static/../pages.py", "/static/%2e%2e/pages.py", "/static/x"])
def test_nothing_else_is_served(path: str) -> None:
    assert get(path).status_code == 404
    assert get("/", "POST").status_code == 405


@pytest.mark.parametrize("path", ["/", "/swarm"])
def test_all_that_a_page_loads_is_here_and_nothing_is_inline(path: str) -> None:
    page = get(path).text
    loaded = re.findall(r'(?:src|href)="(/(?!api/)[^"#]*)', page)
    assert loaded
    assert {address for address in loaded if get(address).status_code != 200} == set()
    assert not re.search(r"<style|\sstyle=|<script(?![^>]*\ssrc=)|\son\w+=|https?://", page)


def test_modules_import_only_each_other() -> None:
    todo, seen = ["/static/talk.js", "/static/swarm.js"], set()
    while todo:
        path = todo.pop()
        answer = get(path)
        assert answer.status_code == 200, path
        seen.add(path)
        named = re.findall(r'^import [^;]*?"([^"]+)";$', answer.text, re.MULTILINE)
        assert all(name.startswith("./") for name in named)
        todo += {f"/static/{name[2:]}" for name in named} - seen - set(todo)
