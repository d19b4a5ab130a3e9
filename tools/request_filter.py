"""
Pass on only the requests that the page of tools/chat.py --web itself makes.

An ASGI application around that page. A browser carries requests of any site to this machine. So a request is answered
if it names this machine (a site whose name was pointed at 127.0.0.1 names itself), comes from the page itself, goes to
one of the few routes that the page uses, and is small. Uploads, files, proxies and the API have no route here.
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
GET_PATHS = ("/", "/theme.css", "/favicon.ico", "/gradio_api/queue/data", "/gradio_api/startup-events")
GET_PREFIXES = ("/assets/", "/static/", "/gradio_api/heartbeat/")
POST_PATHS = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
MAX_BODY_BYTES = 1 << 18  # a question of 20,000 characters and the settings, in JSON
SHUTDOWN_SECONDS = 2  # that open streams have to finish when the server ends
CONTENT_POLICY = (  # nothing from elsewhere: an image in an answer would tell another server of the conversation
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; base-uri 'self'; "
    "frame-ancestors 'none'"
)


def own_names(host: str) -> set[str]:
    """Return the host names of a page that listens on `host`; "*": any IP address."""
    names = {*LOOPBACK_NAMES, host.strip("[]").lower()}
    if _is_unspecified(host):
        names |= {"*", socket.gethostname().lower(), socket.getfqdn().lower()}
    return names


def _is_unspecified(host: str) -> bool:
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


class RequestFilter:
    """
    An ASGI application that passes only the page's own requests on to `app`.

    Args:
        names: as `own_names` returns them. The port is not checked: the other end of a tunnel has another one.
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
            body = await _read_body(receive)
            refusal = _refuse_body(body)
        if refusal is not None:
            await _respond(send, *refusal)
            return
        await self.app(scope, _replay(body, receive), _add_policy(send))

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and message of a refusal by a request's head; None: it passes."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_own(host):
            return 403, "this page answers only to its own name: see --host"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "this page takes no requests from other pages"
        from_other_site = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if from_other_site and not (path == "/" and headers.get("sec-fetch-mode") == "navigate"):  # a link to the page
            return 403, "this page takes no requests from other pages"
        if method in ("GET", "HEAD"):
            known = path in GET_PATHS or path.startswith(GET_PREFIXES)
        else:
            known = method == "POST" and path in POST_PATHS
        return None if known else (404, "there is no such page")

    def is_own(self, host: str) -> bool:
        """Whether the header Host names this page."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or ("*" in self.names and _is_address(name))


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body; None if it is longer than MAX_BODY_BYTES or breaks off."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _refuse_body(body: bytes | None) -> tuple[int, str] | None:
    """Return status and message for a body with other values than texts and numbers."""
    if body is None:
        return 413, f"a request has {MAX_BODY_BYTES} bytes at most"
    try:
        values = json.loads(body).get("data", [])
        if all(value is None or isinstance(value, str | int | float) for value in values):
            return None
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    return 400, "no event of this page"


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that delivers again the body that was read."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> dict[str, Any]:
        return unread.pop() if unread else await receive()

    return next_message


def _add_policy(send: Send) -> Send:
    """Return a `send` that adds the headers against loading from elsewhere and against framing."""

    async def with_policy(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            rules = [(b"content-security-policy", CONTENT_POLICY.encode()), (b"referrer-policy", b"no-referrer")]
            message = message | {"headers": [*message.get("headers", ()), *rules]}
        await send(message)

    return with_policy


async def _respond(send: Send, status: int, message: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{message}\n".encode()})


def bind(host: str, port: int) -> socket.socket:
    """
    Return a socket bound to the page's address; it does not listen yet.

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
    """Serve `app` behind a RequestFilter until a signal ends the process."""
    config = uvicorn.Config(
        RequestFilter(app, own_names(host)),
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[bound])
