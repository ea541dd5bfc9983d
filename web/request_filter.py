"""Filter of the requests that the web page's server answers."""

import ipaddress
import json
import re
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

# Paths of gradio's server that the page itself requests
OPEN = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|assets/.*|static/.*)?$"
    r"|/gradio_api/(startup-events|queue/.*|upload|upload_progress|heartbeat/.*|component_server)$"
    r"|/gradio_api/file=(?!https?:)",
    re.IGNORECASE,
)
JOIN, PAINT = "/gradio_api/queue/join", "/gradio_api/component_server"


class RequestFilter(BaseHTTPMiddleware):
    """Middleware that passes on the page's own requests and refuses everything else that gradio offers.

    It refuses requests with another site's host name or from another site's page (DNS rebinding, forged
    posts), requests that would make the server fetch a URL, and bodies of more than `max_bytes`.
    """

    def __init__(self, app: Callable, names: set[str], max_bytes: int):
        super().__init__(app)
        self.names, self.max_bytes = names, max_bytes

    async def dispatch(self, request: Request, call_next: Callable) -> Response:
        path, headers = request.scope["path"], request.headers
        refused = PlainTextResponse("not here", 403)
        if not (OPEN.match(path) and is_own(headers, self.names)):
            return refused
        try:
            if "transfer-encoding" in headers or int(headers.get("content-length", 0)) > self.max_bytes:
                async for _ in request.stream():  # read and discarded, or the answer may not arrive
                    pass
                return PlainTextResponse("the request exceeds the maximum allowed size", 413)
            if path == JOIN and names_address(await request.body()):
                return refused
            if path == PAINT and not await is_painting(request):
                return refused
        except ClientDisconnect:
            return refused
        return await call_next(request)


def is_own(headers: Headers, names: set[str]) -> bool:
    """Return True if a request is for this server and, if it names an origin, comes from its own page.

    IP addresses are accepted as hosts: unlike names, nobody can point them to another machine.
    """
    host = headers.get("host", "").lower()
    name = re.sub(r":\d+$", "", host)
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name not in names:
            return False
    origin = headers.get("origin")
    return origin is None or origin.lower().partition("://")[2] == host


def names_address(body: bytes) -> bool:
    """Return True if a `path` anywhere in the JSON body is a URL, or if the body is not JSON."""
    try:
        text = json.dumps(json.loads(body))  # normalises escapes and spaces
    except (ValueError, RecursionError):
        return True
    return re.search(r'"path": "[^"]*://', text) is not None


async def is_painting(request: Request) -> bool:
    """Return True for a form with one layer of an image editor and indices of 7 or less.

    gradio would create as many layers as an index says.
    """
    await request.body()  # kept for gradio
    try:
        async with request.form(max_files=1) as form:
            indices = [str(index) for index in form.getlist("index")]
            return bool(form) and all(re.fullmatch("[0-7]?|null", index) for index in indices)
    except (ValueError, HTTPException):
        return False
