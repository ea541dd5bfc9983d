"""Which requests the web page's server answers."""

import ipaddress
import json
import re
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

# The addresses of gradio's server that the page itself asks for
OPEN = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|assets/.*|static/.*)?$"
    r"|/gradio_api/(startup-events|queue/.*|upload|upload_progress|heartbeat/.*|component_server)$"
    r"|/gradio_api/file=(?!https?:)",
    re.IGNORECASE,
)
JOIN, PAINT = "/gradio_api/queue/join", "/gradio_api/component_server"


class RequestFilter(BaseHTTPMiddleware):
    """Middleware that passes on what the page itself asks for and refuses all else that gradio offers.

    Refused are requests for another site's name or from another site's page (DNS rebinding, forged posts),
    those by which the server would fetch an address of the internet, and bodies of more than `max_bytes`.
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
                async for _ in request.stream():  # read to its end, not kept: else the answer may not arrive
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
    """True if a request is for this page and, where it says which page it comes from, from this page.

    Addresses may pass as hosts: nobody can make them another's, as one can a name.
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
    """True if a `path` anywhere in JSON is an address of the internet; also for what is no JSON."""
    try:
        text = json.dumps(json.loads(body))  # in one spelling
    except (ValueError, RecursionError):
        return True
    return re.search(r'"path": "[^"]*://', text) is not None


async def is_painting(request: Request) -> bool:
    """True for a form with one layer of an image editor: gradio would make as many as its index says."""
    await request.body()  # kept for gradio
    try:
        async with request.form(max_files=1) as form:
            indices = [str(index) for index in form.getlist("index")]
            return bool(form) and all(re.fullmatch("[0-7]?|null", index) for index in indices)
    except (ValueError, HTTPException):
        return False
