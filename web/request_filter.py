"""Which requests the web page's server answers."""

import ipaddress
import json
import re
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse


class RequestFilter:
    """ASGI middleware that passes on what the page itself asks for and refuses all else that gradio offers.

    Requests for another site's name, or from another site's page, are refused (DNS rebinding, forged posts);
    so are those by which the server would fetch an address of the internet, or make more than LAYERS layers
    of a painting. Bodies that are read here have at most `max_bytes`; gradio limits uploads itself.
    """

    OPEN = re.compile(
        r"/(config|theme\.css|favicon\.ico|manifest\.json|assets/.*|static/.*)?$"
        r"|/gradio_api/(startup-events|queue/.*|upload|upload_progress|heartbeat/.*|component_server)$"
        r"|/gradio_api/file=(?!https?:)",
        re.IGNORECASE,
    )
    JOIN, PAINT = "/gradio_api/queue/join", "/gradio_api/component_server"
    LAYERS = 8

    def __init__(self, app: Callable, names: set[str], max_bytes: int):
        self.app, self.names, self.max_bytes = app, names, max_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        path, answer = scope["path"], self.app
        if not (self.OPEN.match(path) and is_own(dict(scope["headers"]), self.names)):
            answer = PlainTextResponse("not here", 403)
        elif path in (self.JOIN, self.PAINT):
            body = await read_body(receive, self.max_bytes)
            if body is None:
                answer = PlainTextResponse("the request exceeds the maximum allowed size", 413)
            elif names_address(body) if path == self.JOIN else not await self.is_painting(scope, body):
                answer = PlainTextResponse("not here", 403)
            receive = replay(body, receive)
        await answer(scope, receive, send)

    async def is_painting(self, scope: dict, body: bytes) -> bool:
        """True for a form with a layer of an image editor, the number of which gradio would believe."""
        indices = {"", "null", *map(str, range(self.LAYERS))}
        try:
            async with Request(scope, replay(body)).form(max_files=self.LAYERS) as form:
                return bool(form) and set(form.getlist("index")) <= indices
        except (ValueError, HTTPException):
            return False


async def read_body(receive: Callable, max_bytes: int) -> bytes | None:
    """Read what a request holds; None if that is too much, which is read to its end but not kept."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= max_bytes:
            parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts) if size <= max_bytes else None


def replay(body: bytes | None, receive: Callable | None = None) -> Callable:
    """Return a `receive` that gives a body that was read, then what comes later."""
    messages = [{"type": "http.request", "body": body or b""}]

    async def receive_again() -> dict:
        if messages:
            return messages.pop()
        return await receive() if receive else {"type": "http.disconnect"}

    return receive_again


def is_own(headers: dict[bytes, bytes], names: set[str]) -> bool:
    """True if a request is for this page and, where it says which page it comes from, from this page.

    Addresses may pass as hosts: nobody can make them another's, as one can a name.
    """
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = host.rsplit(":", 1)[0] if re.search(r":\d+$", host) else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name not in names:
            return False
    origin = headers.get(b"origin")
    return origin is None or origin.decode("latin-1").lower().partition("://")[2] == host


def names_address(body: bytes) -> bool:
    """True if a `path` anywhere in JSON is an address of the internet; also for what is no JSON."""
    addresses = []

    def look(pairs: dict) -> dict:
        addresses.append("://" in str(pairs.get("path", "")))
        return pairs

    try:
        json.loads(body, object_hook=look)
    except (ValueError, RecursionError):
        return True
    return any(addresses)
