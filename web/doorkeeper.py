"""Who and what may come in at the web page's server, and what it prints of those who may not."""

import html
import io
import ipaddress
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ldm.data.decode import DAMAGED, decode
from web.workshop import PREVIEW


def sentence(error: Exception, hidden: Path | None = None) -> str:
    """What went wrong, in one line of HTML."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU has too little memory for a picture of this size."
    return html.escape(" ".join(str(error).replace(f"{hidden}{os.sep}", "").split()))


class Doorkeeper:
    """ASGI middleware that lets through what the page itself asks for and shuts gradio's other doors, above
    all those through which the server would fetch any address of the internet, of any size.

    Requests for another site's name, or from another site's page, are refused (DNS rebinding, forged posts).
    An upload, and what is painted, is passed on, and so kept, after `check(content, name, painted)` has seen
    its files, of `max_bytes` each at most.
    """

    OPEN = re.compile(
        r"/(config|theme\.css|favicon\.ico|manifest\.json|assets/.*|static/.*)?$"
        r"|/gradio_api/(startup-events|queue/.*|upload|upload_progress|heartbeat/.*|component_server)$"
        r"|/gradio_api/file=(?!https?:)",
        re.IGNORECASE,
    )

    READ = ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/component_server")
    FILES = 8  # in a request, and layers of a painting

    def __init__(self, app: Callable, names: set[str], max_bytes: int, check: Callable):
        self.app, self.names, self.max_bytes, self.check = app, names, max_bytes, check

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        problem, code = "", 403
        if not (self.OPEN.match(scope["path"]) and is_own(dict(scope["headers"]), self.names)):
            problem = "not here"
        elif scope["path"] in self.READ:
            body, later = await self.body(receive), receive
            if body is None:
                problem, code = "the file exceeds the maximum allowed size", 413
            elif scope["path"].endswith("join"):
                problem = "not here" if names_address(body) else ""
            else:
                problem, code = await self.look_at(scope, body), 415
            parts = iter([{"type": "http.request", "body": body or b""}])
            receive = lambda: read_again(parts, later)  # noqa: E731
        await (PlainTextResponse(problem, code) if problem else self.app)(scope, receive, send)

    async def body(self, receive: Callable) -> bytes | None:
        """What a request holds, None if that is more than a file and what is written around it."""
        parts, size, more = [], 0, True
        while more and size < 4 * self.max_bytes + 2**20:  # too large: read, not kept
            message = await receive()
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.max_bytes + 2**16:
                parts = [b""]
        return None if size > self.max_bytes + 2**16 else b"".join(parts)

    async def look_at(self, scope: dict, body: bytes) -> str:
        """What is wrong with the files of an upload, as a sentence; empty if nothing is."""
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
        from starlette.requests import Request

        parts = iter([{"type": "http.request", "body": body}])
        painted = scope["path"].endswith("component_server")
        try:
            async with Request(scope, lambda: read_again(parts, None)).form(max_files=self.FILES) as form:
                files = [part for _, part in form.multi_items() if hasattr(part, "read")]
                if not files or form.get("index", "") not in ("", "null", *map(str, range(self.FILES))):
                    return "not here"
                for file in files:
                    await run_in_threadpool(self.check, await file.read(), file.filename or "it", painted)
        except (ValueError, HTTPException) as error:
            return sentence(error)
        return ""


def is_own(headers: dict[bytes, bytes], names: set[str]) -> bool:
    """Whether a request is for this page and, where it says whence it comes, from this page.

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


def check_picture(content: bytes, name: str, painted: bool, max_megapixels: float) -> None:
    """Raise ValueError if a file's content is no picture, or one that is too large.

    What is painted may be as large as the page shows pictures.
    """
    if painted:
        max_megapixels = max(max_megapixels, PREVIEW**2 / 1e6)
    try:
        decode(io.BytesIO(content), max_megapixels)
    except DAMAGED as error:
        reason = re.sub(r" <_io\S+ object at \w+>", "", str(error))
        raise ValueError(f"cannot read image {Path(name).name}: {reason}") from error


class Terse(io.TextIOBase):
    """A stream for errors that shows of every traceback the last line alone: what was wrong."""

    def __init__(self, stream: Any):
        self.stream, self.of_thread = stream, threading.local()

    def write(self, text: str) -> int:
        """Lines, or a part of a traceback: the last part is the message, whose first line is shown."""
        state, told = self.of_thread, False
        for line in text.splitlines(keepends=True):
            if "Traceback (most recent call last)" in line:
                state.within = True
            elif line.startswith(("During handling of the above", "The above exception was")):
                continue
            elif not getattr(state, "within", False):
                self.stream.write(line)
            elif line.strip() and not line[0].isspace() and not told:
                told = True
                self.stream.write(f"refused: {line}")
        state.within = getattr(state, "within", False) and not told
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


async def read_again(parts: Iterator[dict], later: Callable | None) -> dict:
    """What a request still has to say: the `parts` that were read, then what comes later."""
    return next(parts, None) or (await later() if later else {"type": "http.disconnect"})


def names_address(body: bytes) -> bool:
    """Whether a `path` anywhere in json is an address of the internet; so is what is no json."""
    found = False

    def look(pairs: dict) -> dict:
        nonlocal found
        found |= "://" in str(pairs.get("path", ""))
        return pairs

    try:
        json.loads(body, object_hook=look)
    except (ValueError, RecursionError):
        return True
    return found
