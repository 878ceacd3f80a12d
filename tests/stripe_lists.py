"""Stripe's lists over HTTP, of objects that a test made: https://docs.stripe.com/api/pagination.

Only the calls of an audit: ``GET`` of a list with ``limit``, ``starting_after``, ``created[gte]`` and ``status``, and
of one object. It does not depend on how Payfold uses the answers.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

Body = Mapping[str, Any]
Lists = Mapping[str, Sequence[Body]]
"""By the path of a list, without ``/v1/``, the objects that it has, in any order."""

REFUSED: Final[Body] = {"error": {"type": "api_error", "message": "No."}}
NOT_CONNECTED: Final[Body] = {"error": {"type": "invalid_request_error", "code": "account_invalid", "message": "No."}}
NO_SUCH_OBJECT: Final = {"error": {"type": "invalid_request_error", "code": "resource_missing", "message": "No such"}}


def _let_in(_: str) -> int:
    return 200


@contextmanager
def serving(worlds: Mapping[str, Lists], *, now: int, door: Callable[[str], int] = _let_in) -> Iterator[str]:
    """Serve to each key of *worlds* its objects as of the second *now*, and yield the address.

    A world of a connected account is named as ``key@acct_1``. Another key is answered 401, another account 403. *door*
    is given the path and the query of each call, and returns the status that it is to have.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key, account = self.headers["Authorization"].removeprefix("Bearer "), self.headers["Stripe-Account"]
            world = f"{key}@{account}" if account else key
            url = urlsplit(self.path)
            status, body = door(self.path), REFUSED
            if world not in worlds:
                status, body = (403, NOT_CONNECTED) if key in worlds else (401, REFUSED)
            if status == 200:
                status, body = answered(worlds[world], url.path.removeprefix("/v1/"), parse_qs(url.query))
            text = json.dumps(body).encode()
            self.send_response_only(status)
            self.send_header("Date", formatdate(now, usegmt=True))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answered(lists: Lists, path: str, asked: Mapping[str, list[str]]) -> tuple[int, Body]:
    """Return the status and the JSON of Stripe's answer to *path*."""
    if path in lists:
        after = asked.get("starting_after", [None])[0]
        if after is not None and not any(each["id"] == after and not each.get("deleted") for each in lists[path]):
            return 400, NO_SUCH_OBJECT
        return 200, page(lists[path], path, asked)
    folder, _, id_ = path.rpartition("/")
    found = next((each for each in lists.get(folder, ()) if each["id"] == id_), None)
    return (404, NO_SUCH_OBJECT) if found is None else (200, found)


def page(objects: Sequence[Body], path: str, asked: Mapping[str, list[str]]) -> Body:
    """Return a page, newest first; deleted objects can be retrieved, and are not listed."""
    since = int(asked.get("created[gte]", ["0"])[0])
    status = asked.get("status", [None])[0]
    found = [
        each
        for each in sorted(objects, key=lambda one: one.get("created", 0), reverse=True)
        if not each.get("deleted") and each.get("created", since) >= since and status in {None, each.get("status")}
    ]
    if "starting_after" in asked:
        found = found[[each["id"] for each in found].index(asked["starting_after"][0]) + 1 :]
    limit = int(asked["limit"][0])
    return {"object": "list", "url": f"/v1/{path}", "data": found[:limit], "has_more": len(found) > limit}
