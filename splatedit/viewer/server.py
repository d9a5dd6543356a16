"""A viser server that only those who were given its address can use."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hmac
import http
import ipaddress
import logging
import os
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import rich
import viser
import websockets.asyncio.server as websocket_server
from viser import _messages
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from splatedit.errors import ExposedWarning, InputError
from splatedit.viewer.wire import First

PATCHING = threading.Lock()
PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
# The token is in the path, so no page may tell others where it came from.
HEADERS = {"Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
LOG = logging.getLogger(__name__)
CONNECTIONS = logging.getLogger(f"{__name__}.connections")  # a port scan is no traceback on the user's screen
CONNECTIONS.setLevel(logging.CRITICAL)


class Served(NamedTuple):
    """A running server, the secret that its addresses begin with, and what it shows before there is an app."""

    server: viser.ViserServer
    token: str
    first: First | None = None

    @property
    def url(self) -> str:
        """The secret address, with the name of this machine if all its addresses are served."""
        host = self.server.get_host()
        host = socket.gethostname() if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.server.get_port()}/{self.token}/"


def serve(host: str = "127.0.0.1", port: int = 0, *, origins: Sequence[str] = ()) -> Served:
    """Start a server that answers 403 to whoever does not know its token, or comes from another web page.

    port: 0 takes any free one. origins: web pages, as in "https://hub.example.org", that may use it beside its own;
    what only a proxy needs that changes the Host header and does not say so (see `same_site`). A host that other
    machines can reach is said in an ExposedWarning. Raises InputError if host or port cannot be had.
    """
    token = secrets.token_urlsafe(16)
    guard = functools.partial(refused, token=token, origins=frozenset(map(netloc, origins)))
    listening = listen(host, port)
    if not ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback:
        text = (
            f"the viewer at {host}:{listening.getsockname()[1]} can be reached from other machines; whoever knows its "
            "address may edit, and read and write files here, and the connection is not encrypted."
        )
        warnings.warn(text, ExposedWarning, stacklevel=2)
    silence()
    with guarded(listening, guard) as bitten:
        server = viser.ViserServer(host=host, port=listening.getsockname()[1], label="splatedit", verbose=False)
    if not bitten:
        server.stop()
        raise RuntimeError(f"viser {viser.__version__} opens its port in a way that cannot be guarded; nothing runs.")
    forbid_sharing(server)
    server.gui.main_panel.dock_right()  # beside the scene; as it floats otherwise, it covers up to half of it
    for stop in (server.stop, server._websock_server.stop):  # when the program ends: that takes seconds, and is no use
        atexit.unregister(stop)
    return Served(server, token)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; viser itself would take the next port if that one is taken. Raises InputError."""
    if not 0 <= port <= 65535:
        raise InputError(f"port: found {port}, expected 0 (any free one) to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"host: {host!r} is not known ({error}); expected 127.0.0.1 or 0.0.0.0, say.") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        what = "port" if socket.AF_INET == family and port else "host"
        raise InputError(f"{what}: cannot listen at {host}:{port} ({reason}); port 0 takes any free one.") from None


@contextlib.contextmanager
def guarded(listening: socket.socket, guard: Callable[[Request], Response | None]) -> Iterator[list[bool]]:
    """A viser server made in the body serves at that socket, and only what `guard` lets through.

    Yields a list that is empty until that has happened: a viser that opens its port in another way goes unguarded.
    """
    original = websocket_server.serve
    bitten: list[bool] = []

    @functools.wraps(original)
    def serve(handler: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if not getattr(handler, "__module__", "").startswith("viser."):
            return original(handler, host, port, **options)
        inner = options.pop("process_request", None)

        def process_request(connection: Any, request: Request) -> Response | None:
            response = guard(request)
            if response is None and inner is not None:
                response = inner(connection, request)
            if response is not None:
                response.headers.update(HEADERS)
            return response

        bitten.append(True)
        return original(handler, sock=listening, process_request=process_request, logger=CONNECTIONS, **options)

    with PATCHING:
        websocket_server.serve = serve
        try:
            yield bitten
        finally:
            websocket_server.serve = original


def refused(request: Request, token: str, origins: frozenset[str]) -> Response | None:
    """403, or a redirect to the folder, or None: then the token is gone from the request's path."""
    path, mark, query = request.path.partition("?")
    given, slash, rest = path.removeprefix("/").partition("/")
    known = hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())  # same time, however wrong
    if not known or not same_site(request.headers, origins):
        return answer(http.HTTPStatus.FORBIDDEN, "403: the address is not the one that was given, or the page not its.")
    if not slash and request.headers.get("Upgrade", "").lower() != "websocket":
        # Relative, so that it is right behind a proxy that serves this at some other path.
        return answer(http.HTTPStatus.PERMANENT_REDIRECT, "", Location=f"{token}/{mark}{query}")
    request.path = f"/{rest}{mark}{query}"
    return None


def answer(status: http.HTTPStatus, text: str, **headers: str) -> Response:
    """A short answer in plain text."""
    body = text.encode()
    common = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))}
    return Response(status, status.phrase, Headers(**common, **headers), body)


def same_site(headers: Headers, origins: frozenset[str]) -> bool:
    """Whether a request comes from one of our own pages, or from no page at all.

    Browsers put the page's scheme, host and port into Origin, and no page can forge it, nor the Host header, nor add
    X-Forwarded-Host to a websocket (to a fetch only after asking by OPTIONS, which is not answered here). So Origin has
    to name the host and port of Host, as jupyter-server-proxy passes both on, or of X-Forwarded-Host, as other proxies
    say what Host was, or be one of `origins`. Programs send no Origin; "null", a page of no origin, is refused.
    """
    given = headers.get_all("Origin")
    if not given:
        return True
    if len(given) > 1:
        return False
    scheme = urlsplit(given[0]).scheme
    hosts = [
        host.strip() for name in ("Host", "X-Forwarded-Host") for h in headers.get_all(name) for host in h.split(",")
    ]
    return netloc(given[0]) in {*(netloc(f"{scheme}://{host}") for host in hosts), *origins} - {""}


def netloc(origin: str) -> str:
    """`host:port` of an origin, in lower case, the port written out; "" for what is none."""
    try:
        parts = urlsplit(origin)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return ""
    return f"{parts.hostname}:{port}" if parts.hostname and port and parts.scheme in PORTS else ""


def forbid_sharing(server: viser.ViserServer) -> None:
    """Any client could otherwise open a public tunnel by a message, whether there is a button or not."""
    server.request_share_url = lambda verbose=True: None
    for kind in (_messages.ShareUrlRequest, _messages.ShareUrlDisconnect):
        server._websock_server.unregister_handler(kind)
    server.gui.configure_theme(show_share_button=False, show_logo=False, brand_color=(34, 109, 197))


def silence() -> None:
    """What viser prints on stdout, verbose or not, goes to the log: stdout is the caller's.

    Nor does it warn of what is sent to a browser that has just gone: tabs are closed at any moment.
    """
    warnings.filterwarnings("ignore", "Queued a .* on a closed connection", UserWarning)
    if getattr(rich.print, "of_viser_to_log", False):
        return
    original = rich.print

    @functools.wraps(original)
    def printed(*objects: Any, **options: Any) -> None:
        if str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] != "viser":
            original(*objects, **options)
        else:
            LOG.debug("viser: %s", " ".join(str(each) for each in objects))

    printed.of_viser_to_log = True  # type: ignore[attr-defined]
    rich.print = printed
