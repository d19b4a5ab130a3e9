"""
What stands between the network and the chat's page (tools/chat.py --web): it lets in what the page needs.

A browser carries requests of any site to this machine. So a request is answered when it names this machine (a site
whose name was pointed at 127.0.0.1 names itself), comes from the page itself, goes to one of the few routes that the
page uses, and is small. Uploads, files, proxies and the API have no route here.
"""

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from utils.common.errors import UsageError

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
READ = ("/", "/theme.css", "/favicon.ico", "/gradio_api/queue/data", "/gradio_api/startup-events")
READ_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
WRITE = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
MAX_BODY = 1 << 18  # bytes of a request: a question, the settings and their names in JSON
GRACE = 2  # seconds that open streams have when the server ends
POLICY = (  # what the page may load: an image in an answer would tell another server of the conversation
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; base-uri 'self'; "
    "frame-ancestors 'none'"
)


def own_names(host: str) -> set[str]:
    """The names by which a page that listens on `host` is known; with "*" for any IP address."""
    names = {*LOOPBACK_NAMES, host.strip("[]").lower()}
    if _is_any(host):
        names |= {"*", socket.gethostname().lower(), socket.getfqdn().lower()}
    return names


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return host == ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Doors:
    """
    An ASGI application that passes on to `app` what the page needs.

    Args:
        names: as `own_names` returns them. The port is not looked at, for a tunnel has another one at its other end.
    """

    def __init__(self, app: Callable, names: set[str]):
        self.app, self.names = app, names

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # the page opens none
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope["method"], scope["path"], headers)
        body = b""
        if refusal is None and scope["method"] == "POST":
            body = await _read(receive)
            refusal = _fault_of(body)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self.app(scope, _replay(body, receive), _guard(send))

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and the sentence with which a request is refused, by its head; None where it may come in."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_own(host):
            return 403, "this page answers to its own name alone: see --host"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "this page takes no requests from other pages"
        elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere and not (path == "/" and headers.get("sec-fetch-mode") == "navigate"):  # a link leads here
            return 403, "this page takes no requests from other pages"
        if method in ("GET", "HEAD"):
            known = path in READ or path.startswith(READ_BELOW)
        else:
            known = method == "POST" and path in WRITE
        return None if known else (404, "there is no such page")

    def is_own(self, host: str) -> bool:
        """Whether the header Host names this page."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or ("*" in self.names and _is_address(name))


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where it is longer than MAX_BODY or breaks off."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _fault_of(body: bytes | None) -> tuple[int, str] | None:
    """What is wrong with the body of an event of the page, whose values are texts and numbers, never files."""
    if body is None:
        return 413, f"a request has {MAX_BODY} bytes at most"
    try:
        values = json.loads(body).get("data", [])
        if all(value is None or isinstance(value, str | int | float) for value in values):
            return None
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    return 400, "no event of this page"


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for one who has not seen that the body was read."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> dict[str, Any]:
        return unread.pop() if unread else await receive()

    return next_message


def _guard(send: Send) -> Send:
    """`send` with the headers that keep a browser from loading from elsewhere, and others from framing the page."""

    async def with_policy(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            rules = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
            message = message | {"headers": [*message.get("headers", ()), *rules]}
        await send(message)

    return with_policy


async def _answer(send: Send, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{sentence}\n".encode()})


def bind(host: str, port: int) -> socket.socket:
    """
    A socket of the page's address; it does not listen yet.

    Raises:
        UsageError: there is no such address, or another program has the port.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {host} --port {port}: {reason}; take another one") from None
    return bound


def serve(app: Callable, host: str, bound: socket.socket) -> None:
    """Serves `app` behind its doors until a signal ends the process."""
    config = uvicorn.Config(
        Doors(app, own_names(host)),
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=GRACE,
    )
    uvicorn.Server(config).run(sockets=[bound])
