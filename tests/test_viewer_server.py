"""Who gets into the viewer's server, and who does not."""

import asyncio
import http.client
import socket
import subprocess
import sys
import threading
import time
import warnings

import msgspec
import pytest
import viser
import websockets
import websockets.asyncio.server as websocket_server
from viser import _messages

from splatedit.errors import ExposedWarning, InputError
from splatedit.viewer import server as guard
from splatedit.viewer.server import netloc, serve


@pytest.fixture(scope="module")
def served():
    found = serve(origins=["https://hub.example.org"])
    yield found
    found.server.stop()


def get(served, path, **headers):
    """Status, headers in lower case, body."""
    connection = http.client.HTTPConnection("127.0.0.1", served.server.get_port(), timeout=10)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def connect(served, path, **headers):
    """The status of a websocket's handshake."""

    async def shake():
        address = f"ws://127.0.0.1:{served.server.get_port()}{path}"
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        protocol = [f"viser-v{viser.__version__}"]
        try:
            async with websockets.connect(address, subprotocols=protocol, additional_headers=more, max_size=None) as ws:
                await asyncio.wait_for(ws.recv(), 10)  # viser talks to us
                return 101
        except websockets.InvalidStatus as refusal:
            return refusal.response.status_code

    return asyncio.run(shake())


def test_without_its_token_nobody_gets_in(served):
    token = served.token
    assert len(token) >= 22, "128 bits"
    wrong = (
        "/",
        "/index.html",
        "//",
        f"/{token[:-1]}/",
        f"/{token}x/",
        f"/{token.swapcase()}/",
        f"/x/{token}/",
        "/%2e/",
    )
    for path in (*wrong, f"/?{token}", f"/?/{token}/"):
        assert get(served, path)[0] == 403, path
        assert connect(served, path) == 403, path
    status, headers, page = get(served, f"/{token}/")
    assert status == 200 and b"<html" in page[:500].lower() and headers["referrer-policy"] == "no-referrer"
    assert connect(served, f"/{token}") == connect(served, f"/{token}/") == 101, "viser's client leaves the slash out"
    assert get(served, f"/{token}/../../etc/passwd")[0] == 404
    assert get(served, f"/{token}/nothing")[0] == 404


def test_the_address_without_its_slash_leads_there(served):
    status, headers, _ = get(served, f"/{served.token}?a=b")
    assert (status, headers["location"]) == (308, f"{served.token}/?a=b"), "relative: right behind a proxy, too"


def test_pages_of_others_are_refused_and_proxies_are_not(served):
    path, here = f"/{served.token}/", f"127.0.0.1:{served.server.get_port()}"
    foreign = (
        {"Origin": "http://evil.example"},
        {"Origin": f"http://evil.example:{served.server.get_port()}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "file://"},
        {"Origin": f"https://{here}.evil.example"},
        {"Origin": f"http://user@{here}@evil.example"},
        {"Origin": "http://evil.example", "X_Forwarded_Host": "hub.example.net"},
        {"Origin": "http://hub.example.org"},  # the page that is allowed is another scheme's
    )
    for headers in foreign:
        assert connect(served, path, **headers) == 403, headers
        assert get(served, path, **headers)[0] == 403, headers
    ours = (
        {},
        {"Origin": f"http://{here}"},
        {"Origin": "http://localhost:8888", "Host": "localhost:8888"},  # jupyter-server-proxy, an ssh tunnel
        {"Origin": "https://Hub.example.net", "Host": "hub.example.net"},  # the same behind https
        {"Origin": "https://hub.example.net", "X_Forwarded_Host": "hub.example.net, inner"},
        {"Origin": "https://hub.example.org"},  # said to `serve`
    )
    for headers in ours:
        assert get(served, path, **headers)[0] == 200, headers
    assert connect(served, path, **ours[-1]) == 101
    assert connect(served, path, **ours[1]) == 101


@pytest.mark.parametrize(
    ("origin", "found"),
    [
        ("http://a.b", "a.b:80"),
        ("https://A.b", "a.b:443"),
        ("https://a.b:8443/x", "a.b:8443"),
        ("http://[::1]:9", "::1:9"),
        ("null", ""),
        ("http://a:b", ""),
        ("ftp://a", ""),
        ("http://", ""),
    ],
)
def test_host_and_port_of_an_origin(origin, found):
    assert netloc(origin) == found


def test_no_client_can_open_a_tunnel(served, monkeypatch):
    opened = []
    monkeypatch.setattr("viser._viser.ViserTunnel", lambda *_: opened.append(1) or pytest.fail("stop here"))

    async def ask(server, path):
        """Send the message behind viser's share button, and one whose handler shows that it was dealt with."""
        done = threading.Event()
        later = server._thread_executor.submit
        server._websock_server.register_handler(_messages.ShareUrlUpdated, lambda *_: later(done.set) and None)
        address = f"ws://127.0.0.1:{server.get_port()}/{path}"
        async with websockets.connect(address, subprotocols=[f"viser-v{viser.__version__}"], max_size=None) as ws:
            for message in ({"type": "ShareUrlRequest"}, {"type": "ShareUrlUpdated", "share_url": None}):
                await ws.send(msgspec.msgpack.encode(message))
            assert await asyncio.to_thread(done.wait, 10)

    asyncio.run(ask(served.server, served.token))
    assert not opened and served.server.request_share_url() is None
    plain = viser.ViserServer("127.0.0.1", 0, verbose=False)
    asyncio.run(ask(plain, ""))
    end = time.monotonic() + 10
    while not opened:  # another thread may be through with what came second
        assert time.monotonic() < end, "the message is the one that viser acts upon"
        time.sleep(0.002)
    threading.Thread(target=plain.stop, daemon=True).start()


def test_a_port_that_is_taken_is_an_error(served):
    with pytest.raises(InputError, match=r"port: .*127\.0\.0\.1:\d+ \(Address already in use\).*port 0"):
        serve(port=served.server.get_port())
    assert served.url == f"http://127.0.0.1:{served.server.get_port()}/{served.token}/"


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 65536, "0 .* to 65535"),
        ("127.0.0.1", -1, "-1"),
        ("no.such.invalid", 0, "not known"),
        ("é" * 99, 0, "not known"),
    ],
)
def test_places_that_cannot_be_had(host, port, words, monkeypatch):
    if host.endswith("invalid"):
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, "unknown"))
        )
    with pytest.raises(InputError, match=words):
        serve(host, port)


def test_only_a_host_that_others_can_reach_is_warned_of(recwarn):
    with pytest.warns(ExposedWarning, match="can be reached from other machines"):
        open_one = serve("0.0.0.0")
    assert socket.gethostname() in open_one.url
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = serve("localhost")
    for each in (open_one, small):
        each.server.stop()


def test_a_viser_that_opens_its_port_another_way_is_not_run(monkeypatch):
    """The guard wraps what viser calls; a release that calls something else must be noticed, not run unguarded."""
    original = websocket_server.serve
    monkeypatch.setattr("viser.infra._infra.websockets.asyncio.server", AnotherServer(original))
    with pytest.raises(RuntimeError, match="cannot be guarded"):
        serve()
    assert websocket_server.serve is original


class AnotherServer:
    """Where a later viser might find its `serve`."""

    def __init__(self, serve):
        self.serve = serve


def test_servers_of_others_are_left_alone():
    async def handle(_):
        pass

    async def both():
        with socket.create_server(("127.0.0.1", 0)) as never, guard.guarded(never, lambda _: pytest.fail()) as bitten:
            async with websocket_server.serve(handle, "127.0.0.1", 0) as other:
                assert other.sockets[0].getsockname() != never.getsockname() and not bitten

    asyncio.run(both())


def test_stdout_stays_empty():
    code = "from splatedit.viewer.server import serve; s = serve(); s.server.stop(); import rich; rich.print('mine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "mine\n" and done.stderr == ""
