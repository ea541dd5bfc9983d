"""Load test of the web page: many pages upload, restore, stop, reload and exceed the limits concurrently.

Every page has its own images, and a result must equal the network's output for the page's last image, within
a rounding error of one level. Uploads above the limits must be rejected, and the server's memory must not
grow.
"""

import http.client
import io
import json
import secrets
import select
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm import checkpoint
from ldm.data.image import photographs, read_image
from train_srn import SRNDeblurNet, restore_image

PATIENCE = 300  # seconds that a busy machine may take for one request
MEGAPIXELS, MEGABYTES = 0.25, 1  # upload limits
GROWTH = 0.1  # tolerated growth of memory: the C library keeps a varying part of freed memory


@contextmanager
def serve(folder: Path, network: SRNDeblurNet) -> Iterator[tuple[int, int]]:
    """Serve the page with `network` as its SRN; yield port and process id."""
    weights = folder / "srn.safetensors"
    checkpoint.write_weights(weights, network.state_dict(), {"settings": '{"residual": true}'})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "gradio_restore.py", "--port", str(port), "--device", "cpu"]
    command += ["--output_dir", str(folder / "out"), "--srn_path", str(weights), "--precision", "32"]
    command += ["--max_megapixels", str(MEGAPIXELS), "--max_upload_mb", str(MEGABYTES)]
    with open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
            if not ready or not any(line.startswith("open http") for line in process.stdout):
                raise RuntimeError(f"the page does not start: {(folder / 'errors.txt').read_text()}")
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(PATIENCE)


def tiny_network(width: int = 4) -> SRNDeblurNet:
    torch.manual_seed(0)
    network = SRNDeblurNet(width, residual=True)
    torch.nn.init.normal_(network.outblock.conv[0].weight, std=0.05)
    return network.eval()


class Visitor:
    """An open page, with the requests that a browser sends."""

    def __init__(self, port: int):
        self.port, self.session = port, secrets.token_hex(8)
        config = json.loads(self.ask("GET", "/config")[1])
        self.parts = {part["id"]: part for part in config["components"]}
        self.calls = {}  # (elem_id, event) -> API call of the page
        for call in config["dependencies"]:
            for part, event in call["targets"]:
                name = self.parts[part]["props"].get("elem_id") if part in self.parts else None
                self.calls[name, event] = call
        self.heart = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.heart.request("GET", f"/gradio_api/heartbeat/{self.session}")
        self.beating = self.heart.getresponse()

    def close(self) -> None:
        """Leave the page by closing the connection."""
        self.beating.close()
        self.heart.close()

    def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def upload(self, name: str, content: bytes) -> tuple[int, str]:
        """Upload a file; return the status, and its path on the server or the reason for rejection."""
        head = f'--X\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        form = "multipart/form-data; boundary=X"
        status, text = self.ask("POST", "/gradio_api/upload", head + content + b"\r\n--X--\r\n", form)
        return status, json.loads(text)[0] if status == 200 else text.decode()

    def call(self, name: str, event: str, *values: object) -> str:
        """Join the queue with these inputs and defaults for the others; return the event's id."""
        call = self.calls[name, event]
        data = [*values, *(self.parts[part]["props"].get("value") for part in call["inputs"][len(values) :])]
        body = {"fn_index": call["id"], "session_hash": self.session, "data": data}
        status, text = self.ask("POST", "/gradio_api/queue/join", json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{name} {event} is refused: {status} {text[:300]}")
        return json.loads(text)["event_id"]

    def results(self, *events: str) -> list[dict]:
        """Wait for these events and return their results."""
        found: dict[str, dict] = {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
            for line in connection.getresponse():
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    found[message["event_id"]] = message
                if found.keys() >= {*events}:
                    return [found[event] for event in events]
        finally:
            connection.close()
        raise RuntimeError(f"only {len(found)} of {len(events)} answers came")

    def open(self, name: str, content: bytes) -> bool:
        """Upload a file and open it as the page's image; return False if it is rejected."""
        status, path = self.upload(name, content)
        if status == 413:
            return False
        file = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return self.results(self.call("upload", "upload", file))[0]["success"]

    def read(self, result: dict) -> np.ndarray | None:
        """Return the image on the right of the slider, or None if the computation was stopped."""
        value = result["output"]["data"][0]
        value = value.get("value") if isinstance(value, dict) else value
        if not isinstance(value, list):
            return None
        content = self.ask("GET", f"/gradio_api/file={value[1]['path']}")[1]
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def too_much(rng: np.random.Generator) -> dict[str, bytes]:
    """Create files that must be rejected, by the reason."""
    noise = rng.integers(0, 255, (640, 640, 3), np.uint8)
    return {
        "bytes": png(noise),
        "pixels": png(np.zeros((800, 701, 3), np.uint8)),
        "text": b"no picture",
        "cut off": png(noise[:200, :200])[:9000],
    }


def visit(port: int, network: SRNDeblurNet, uploads: int, seed: tuple[int, ...]) -> Counter:
    """Simulate one user: upload images, and for each wait for the result, stop or reload.

    Raises RuntimeError for wrong results or accepted bad uploads.
    """
    rng, tally = np.random.default_rng(seed), Counter()
    photo = read_image(photographs()[int(rng.integers(6))])
    visitor, refused = Visitor(port), [*too_much(rng).items()]
    for number in range(uploads):
        name, content = refused[number % 4]
        if visitor.open("much.png", content):
            raise RuntimeError(f"too much is accepted ({name})")
        tally["refused"] += 1
        y, x, side = (int(rng.integers(*span)) for span in ((0, 100), (0, 100), (64, 160)))
        tint = rng.integers(0, 60, 3)
        image = np.ascontiguousarray((photo[y : y + side, x : x + side] * 0.7 + tint).astype(np.uint8))
        if not visitor.open("photo.png", png(image)):
            raise RuntimeError("a photo is not opened")
        event, what = visitor.call("start-srn", "click"), rng.choice(["wait", "wait", "stop", "reload"])
        if what == "reload":
            visitor.close()
            visitor = Visitor(port)
            tally["reloaded"] += 1
            continue
        events = [event, visitor.call("stop-srn", "click")] if what == "stop" else [event]
        result = visitor.results(*events)[0]
        restored = visitor.read(result) if result["success"] else None
        if restored is None and what == "wait":
            raise RuntimeError(f"no result: {json.dumps(result)[:500]}")
        if restored is None:
            tally["stopped"] += 1
            continue
        expected = restore_image(network, image, tile=1536, overlap=128).astype(int)
        if restored.shape != image.shape or np.abs(restored - expected).max() > 1:
            raise RuntimeError("a page got what is not its own picture's result")
        tally["restored"] += 1
    visitor.close()
    return tally


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def load(
    folder: Path, seed: int, pages: int = 10, uploads: int = 50, rounds: int = 2
) -> tuple[Counter, list[float]]:
    """Run rounds of `uploads` by concurrent `pages`; return the counts and the server's MiB after each.

    Raises RuntimeError if a page got another's image, a bad upload was accepted, or memory grew after the
    first round, which loads the networks.
    """
    network, tally, memory = tiny_network(), Counter(), []
    with serve(folder, network) as (port, pid):
        for number in range(rounds):
            with ThreadPoolExecutor(pages) as threads:
                people = [
                    threads.submit(visit, port, network, uploads // pages, (seed, number, page))
                    for page in range(pages)
                ]
                for person in people:
                    tally += person.result()
            memory.append(resident(pid))
    if memory[-1] > memory[0] * (1 + GROWTH):
        raise RuntimeError(f"the server's memory grew: {memory} MiB")
    return tally, memory


def run_page(seed: int, count: int, folder: Path) -> bool:
    """Run the load test, print a line and return whether it passed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tally, memory = load(folder, seed, uploads=count, rounds=3)
    except RuntimeError as error:
        print(f"page     FAILED: {error}", flush=True)
        return False
    said = ", ".join(f"{number} {what}" for what, number in sorted(tally.items()))
    print(f"page     {said}; every result its own page's; MiB after each round: {memory}", flush=True)
    return True
