"""A viser server that only the one who was given its address can use."""

from __future__ import annotations

import contextlib
import functools
import http
import secrets
import threading
from collections.abc import Iterator
from typing import NamedTuple

import viser
import websockets.asyncio.server as websocket_server
from websockets.datastructures import Headers
from websockets.http11 import Response

PATCHING = threading.Lock()


class Served(NamedTuple):
    """A running server and the secret that its addresses begin with."""

    server: viser.ViserServer
    token: str


def serve(host: str = "127.0.0.1", port: int = 0) -> Served:
    """Start a server; port 0: any free one. Raises InputError if the port is taken."""
    token = secrets.token_urlsafe(16)
    with guarded(token):
        server = viser.ViserServer(host=host, port=port, verbose=False)
    server.request_share_url = lambda verbose=True: None  # any client could otherwise open a public tunnel
    return Served(server, token)


@contextlib.contextmanager
def guarded(token: str) -> Iterator[None]:
    """Servers made in the body answer 403 to every request whose path does not begin with the token."""
    original = websocket_server.serve

    @functools.wraps(original)
    def serve(handler, host, port, **options):
        inner = options.pop("process_request")

        def process_request(connection, request):
            path, mark, query = request.path.partition("?")
            if path != f"/{token}" and not path.startswith(f"/{token}/"):
                headers = Headers({"Content-Type": "text/plain", "Content-Length": "9"})
                return Response(http.HTTPStatus.FORBIDDEN, "Forbidden", headers, b"forbidden")
            request.path = (path[len(token) + 1 :] or "/") + mark + query
            return inner(connection, request)

        return original(handler, host, port, process_request=process_request, **options)

    with PATCHING:
        websocket_server.serve = serve
        try:
            yield
        finally:
            websocket_server.serve = original
