"""The web page on tiny networks: restoration service, server, and the page in a real browser."""

import gc
import io
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cldm.inpaint import distance_to
from cldm.model import create_model, read_config
from gradio_restore import Settings, choose, list_systems, main
from ldm import checkpoint
from ldm.data.image import photographs, read_image, write_image
from ldm.data.masks import read_mask
from tests.faults.page import tiny_network, visit
from tests.fill import fill
from train_srn import SRNDeblurNet, load_network, restore_image
from web.request_filter import names_address
from web.service import SIDES, RestorationService, Stopped, System

ROOT = Path(__file__).parent.parent
NO_SIDES = (0, 0, 0, 0)
PATIENCE = 90  # seconds that a busy machine may take for one step
BROWSER = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
in_browser = pytest.mark.skipif(
    None in BROWSER, reason="no chromium with its chromedriver here (Debian: chromium, chromium-driver)"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Write tiny weights of SRN and both ControlNets, but none of DBGAN, BGAN or Kontext."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = SRNDeblurNet(2, residual=True)
    torch.nn.init.normal_(network.outblock.conv[0].weight, std=0.05)
    checkpoint.write_weights(
        folder / "srn.safetensors", network.state_dict(), {"settings": '{"residual": true}'}
    )
    for kind in ("deblur", "inpaint"):
        config = f"models/cldm_tiny_{kind}.yaml"
        content = {"state_dict": fill(create_model(config)).state_dict(), "config": read_config(config)}
        checkpoint.save(folder / f"{kind}.ckpt", content)
    return folder


def make_settings(weights: Path, output_dir: Path) -> Settings:
    return Settings(
        output_dir=output_dir,
        device="cpu",
        max_megapixels=0.5,
        max_upload_mb=1,
        srn_path=weights / "srn.safetensors",
        deblur_path=weights / "deblur.ckpt",
        inpaint_path=weights / "inpaint.ckpt",
        dbgan_path=weights / "dbgan.safetensors",
        bgan_path=weights / "bgan.safetensors",
        kontext_path=weights / "kontext",
    )


def photograph(height: int, width: int) -> np.ndarray:
    return read_image(photographs()[0])[60 : 60 + height, 100 : 100 + width]


def huge_header(path: Path, width: int, height: int) -> Path:
    """Write a PNG of a few bytes whose header claims this size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


# ---- restoration service -----------------------------------------------------------------------------------


class Silent:
    """Fake system that counts how often it is loaded; its network runs once, or until it is stopped."""

    SEES_ALPHA = False

    def __init__(self, forever: bool = False):
        self.forever, self.loaded, self.network, self.running = forever, 0, None, threading.Event()

    def restorer(self):
        self.loaded += 1
        network = torch.nn.Linear(1, 1)
        self.network = weakref.ref(network)

        def restore(image, path, progress):
            while True:
                for _ in progress([network]):
                    self.running.set()
                if not self.forever:
                    return image + np.uint8(self.add)

        return restore


def make_service(tmp_path: Path, **systems) -> tuple[RestorationService, Path]:
    (tmp_path / "results").mkdir()
    write_image(tmp_path / "results" / "p.png", np.zeros((4, 5, 3), np.uint8))
    systems = {name: System(name, options, ()) for name, options in systems.items()}
    return RestorationService(systems, tmp_path / "results", 1), tmp_path / "results" / "p.png"


def ignore(*_, **__):
    pass


def keeper(folder: Path, max_megapixels: float = 1) -> RestorationService:
    """Create a service without systems, which keeps opened images and masks in `folder`."""
    return RestorationService({}, folder, max_megapixels)


def test_system_is_loaded_once_and_freed_for_the_next(tmp_path):
    one, two = Silent(), Silent()
    service, picture = make_service(tmp_path, one=one, two=two)
    results = [service.restore("one", picture, {"add": add}, "page", ignore) for add in (3, 4)]
    assert one.loaded == 1 and [int(read_image(path).max()) for path in results] == [3, 4]
    assert one.network() is not None
    service.restore("two", picture, {"add": 1}, "page", ignore)
    gc.collect()
    assert one.network() is None and two.network() is not None
    service.restore("one", picture, {"add": 1}, "page", ignore)
    assert one.loaded == 2 and not service.turn.locked()


def test_stop_ends_running_and_waiting_jobs_of_one_page(tmp_path):
    endless, short = Silent(forever=True), Silent()
    service, picture = make_service(tmp_path, endless=endless, short=short)
    ends, waiting = {}, set()

    def job(name, page):
        def report(done, desc):
            if desc == "waiting for another image":
                waiting.add((name, page))

        try:
            ends[name, page] = service.restore(name, picture, {"add": 1}, page, report)
        except Stopped:
            ends[name, page] = "stopped"

    threads = [threading.Thread(target=job, args=("endless", "a"), daemon=True)]
    threads[0].start()
    assert endless.running.wait(PATIENCE)
    for page in ("a", "b"):
        threads.append(threading.Thread(target=job, args=("short", page), daemon=True))
        threads[-1].start()
    while len(waiting) < 2:
        time.sleep(0.01)
    service.stop("a")
    for thread in threads:
        thread.join(PATIENCE)
    assert ends.pop(("short", "b")).is_file()
    assert ends == {("endless", "a"): "stopped", ("short", "a"): "stopped"}


def test_changed_settings_apply_without_reloading_the_network(weights, tmp_path):
    settings = make_settings(weights, tmp_path)
    service = RestorationService(list_systems(settings), tmp_path, 1)
    picture = tmp_path / "p.png"
    write_image(picture, photograph(64, 64))
    values = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0, "strength": 1.0}
    values |= {"scheduler": "ddim", "prompt": "x"}
    steps = []

    def run(**changes):
        path = service.restore("deblur", picture, values | changes, "", lambda *a, **_: steps.append(a[0]))
        return read_image(path)

    first, restorer = run(), service.restorer
    assert (0, 2) in steps and (1, 2) in steps
    assert not np.array_equal(first, run(seed=1)) and not np.array_equal(first, run(num_inference_steps=3))
    assert not np.array_equal(first, run(guidance_scale=3.0))
    assert np.array_equal(first, run()) and service.restorer is restorer


def test_uploads_are_limited_and_converted_to_upright_png(tmp_path):
    image = photograph(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a photo.tif", exif=exif)
    picture, small = keeper(tmp_path).open_image(tmp_path / "a photo.tif")
    assert np.array_equal(read_image(picture), np.rot90(image, -1)) and small.size == (40, 60)
    wide = np.dstack([np.zeros((2, 2000, 3), np.uint8), np.full((2, 2000), 7, np.uint8)])
    write_image(tmp_path / "wide.png", wide)
    picture, small = keeper(tmp_path).open_image(tmp_path / "wide.png")
    assert (small.size, small.mode) == ((1280, 1), "RGBA") and np.array_equal(
        np.array(Image.open(picture)), wide
    )
    with pytest.raises(ValueError, match=r"a photo.tif: it has 0.0 megapixels, more than 0.002"):
        keeper(tmp_path, 0.002).open_image(tmp_path / "a photo.tif")
    with pytest.raises(ValueError, match="huge.png: it has 81.0 megapixels, more than 24"):
        keeper(tmp_path, 24).open_image(huge_header(tmp_path / "huge.png", 9000, 9000))
    with pytest.raises(ValueError, match="cannot read image .*bomb.png"):
        keeper(tmp_path, 24).open_image(huge_header(tmp_path / "bomb.png", 60000, 60000))


def test_result_names_cannot_leave_their_folder(tmp_path):
    image = np.zeros((2, 2, 3), np.uint8)
    stems = ("../../x/y", "北京 <b>", "..", "a" * 300, "a" * 300, "京" * 300)
    paths = [keeper(tmp_path).save(stem, image) for stem in stems]
    assert len(set(paths)) == 6 and all(path.parent == tmp_path and path.is_file() for path in paths)
    assert all(re.fullmatch(r"[\w-]+\.png", path.name) for path in paths)


def test_brush_strokes_become_a_mask(tmp_path):
    write_image(tmp_path / "p.png", np.zeros((40, 60, 3), np.uint8))
    layer = np.zeros((20, 30, 4), np.uint8)
    for drawing in (None, {"layers": []}, {"layers": [layer]}):
        with pytest.raises(ValueError, match="nothing is painted"):
            keeper(tmp_path).open_mask(tmp_path / "p.png", drawing, None, NO_SIDES)
    layer[5:10, 20:, 3] = 1
    mask = read_mask(keeper(tmp_path).open_mask(tmp_path / "p.png", {"layers": [layer]}, None, NO_SIDES))
    assert mask.shape == (40, 60) and mask[10:20, 40:].all() and mask.sum() == 200


def test_added_sides_and_mask_files_are_limited(tmp_path):
    write_image(tmp_path / "p.png", np.zeros((40, 60, 3), np.uint8))
    service = keeper(tmp_path, 0.004)
    assert service.open_mask(tmp_path / "p.png", None, None, (0, 0, 6, 20)) is None  # 66 * 60 = 3960
    with pytest.raises(ValueError, match=r"with what is added it has more than 0.004 megapixels"):
        service.open_mask(tmp_path / "p.png", None, None, (0, 0, 7, 20))
    for name, size, reason in (
        ("huge.png", 9000, "it has 81.0 megapixels, more than 0.004"),
        ("bomb.png", 60000, ""),
    ):
        mask = huge_header(tmp_path / name, size, size)
        with pytest.raises(ValueError, match=f"cannot read image .*{name}: .*{reason}"):
            service.open_mask(tmp_path / "p.png", None, mask, NO_SIDES)


def test_systems_list_missing_files_and_documentation(weights, tmp_path):
    systems = list_systems(make_settings(weights, tmp_path))
    for name in ("srn", "deblur", "inpaint"):
        assert systems[name].missing() == []
    assert systems["kontext"].missing() == [str(weights / "kontext"), "outputs/kontext_lora"]
    for name, system in [*systems.items(), *list_systems(Settings(output_dir=tmp_path)).items()]:
        assert all(path in system.about() for path in system.missing()), name
        pages = re.findall(r"docs/\w+\.md", system.about())
        assert pages and all((ROOT / page).is_file() for page in pages)
        assert all(hasattr(system.options, option) for option in {*system.shown} - {*SIDES})
    service = RestorationService(systems, tmp_path, 1)
    with pytest.raises(
        FileNotFoundError, match="DBGAN has no weights yet: it needs .*dbgan.safetensors.* train_dbgan.py"
    ):
        service.restore("dbgan", tmp_path / "p.png", {}, "", ignore)
    with pytest.raises(ValueError, match=r"port must be in \[1, 65535\], not 99999"):
        main(Settings(output_dir=tmp_path / "none", port=99999))
    for name in ("max_megapixels", "max_upload_mb"):
        with pytest.raises(ValueError, match=f"{name} must be at least "):
            main(Settings(output_dir=tmp_path / "none", **{name: 0}))
    assert not (tmp_path / "none").exists()


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def test_mask_file_and_strokes_are_combined(tmp_path):
    write_image(tmp_path / "picture.png", photograph(40, 60))
    file = np.zeros((20, 30), np.uint8)  # of another size, but of the same shape
    file[:5] = 255
    write_image(tmp_path / "file.png", file)
    layer = np.zeros((40, 60, 4), np.uint8)
    layer[30:, :, 3] = 255
    for drawing, rows in ((None, [0, 10]), ({"layers": [layer]}, [0, 10, 30, 40])):
        with pytest.warns(UserWarning, match="it is resized"):
            mask = read_mask(
                keeper(tmp_path).open_mask(
                    tmp_path / "picture.png", drawing, str(tmp_path / "file.png"), NO_SIDES
                )
            )
        expected = np.zeros((40, 60), np.uint8)
        for start, stop in zip(rows[::2], rows[1::2], strict=True):
            expected[start:stop] = 1
        assert np.array_equal(mask, expected)
    write_image(tmp_path / "file.png", np.zeros((20, 20), np.uint8))
    with pytest.raises(ValueError, match="file.png is 20x20, its image 60x40 .*same shape"):
        keeper(tmp_path).open_mask(tmp_path / "picture.png", None, tmp_path / "file.png", NO_SIDES)


def test_included_weights_state_their_training_image_size(tmp_path, monkeypatch):
    """They are recognized by their metadata, since a user's file may have any name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path / "none")
    models = tmp_path / "models"
    systems = list_systems(Settings())
    assert "pixels" not in systems["deblur"].about() and systems["deblur"].missing()
    models.mkdir()
    about = {"image_size": "128", "sampling_steps": "3"}
    for name in ("small_deblur", "small_diffusion", "dbgan", "bgan"):
        checkpoint.write_weights(models / f"{name}.safetensors", {"a": torch.zeros(1)}, about)
    systems = list_systems(Settings())
    assert "trained on images of 128 pixels" in systems["deblur"].about() and not systems["deblur"].missing()
    assert systems["deblur"].options.num_inference_steps == 3
    assert not systems["dbgan"].missing() and not systems["bgan"].missing() and systems["inpaint"].missing()
    assert systems["kontext"].options.lora_path == Path("outputs/kontext_lora")
    (models / "small_kontext").mkdir()
    transformer = models / "small_kontext" / "flux1-kontext-dev.safetensors"
    checkpoint.write_weights(transformer, {"a": torch.zeros(1)}, about)
    (models / "small_kontext_lora.safetensors").touch()
    small = list_systems(Settings())["kontext"]
    assert "trained on images of 128 pixels" in small.about() and not small.missing()
    (tmp_path / "small_own.safetensors").touch()
    chosen = list_systems(Settings(deblur_path=tmp_path / "small_own.safetensors"))["deblur"]
    assert "pixels" not in chosen.about() and chosen.options.num_inference_steps == 50


def test_included_weights_are_found_from_any_working_directory(tmp_path, monkeypatch):
    """Only a third-party network is missing, since none is included."""
    monkeypatch.chdir(tmp_path)
    settings = Settings(network_path=tmp_path / "none.pth")
    assert [name for name, system in list_systems(settings).items() if system.missing()] == ["network"]


def test_weights_of_the_newest_run_are_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose(None, "*/srn_deblur.safetensors", "srn_deblur") == Path("models/srn_deblur.safetensors")
    for seconds, name in enumerate("ba"):  # alphabetically, b is last
        path = Path("outputs", name, "srn_deblur.safetensors")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    assert choose(None, "*/srn_deblur.safetensors", "srn_deblur") == path
    assert choose(Path("given"), "*/srn_deblur.safetensors", "srn_deblur") == Path("given")


def test_upscaling_network_also_enlarges_transparency(weights, tmp_path):
    compact = pytest.importorskip("spandrel.architectures.Compact").Compact
    network = compact(num_in_ch=3, num_out_ch=3, num_feat=4, num_conv=1, upscale=2)
    checkpoint.save(tmp_path / "x2.pth", {"params": network.state_dict()})
    settings = make_settings(weights, tmp_path)
    settings.network_path = tmp_path / "x2.pth"
    service = RestorationService(list_systems(settings), tmp_path, 1)
    image = np.dstack([photograph(20, 30), np.full((20, 30), 128, np.uint8)])
    write_image(tmp_path / "a.png", image)
    with Image.open(service.restore("network", tmp_path / "a.png", {}, "page", ignore)) as result:
        assert result.size == (60, 40) and (np.array(result)[..., 3] == 128).all()


def test_hidden_colours_do_not_affect_result_and_transparency_is_kept(weights, tmp_path):
    service, alpha = (
        RestorationService(list_systems(make_settings(weights, tmp_path)), tmp_path, 1),
        np.zeros((32, 48), np.uint8),
    )
    alpha[:, :30] = 200
    results = []
    for under in (0, 255):
        picture = np.dstack(
            [np.where(alpha[..., None] > 0, photograph(32, 48), under).astype(np.uint8), alpha]
        )
        write_image(tmp_path / "a.png", picture)
        with Image.open(
            service.restore("srn", tmp_path / "a.png", {}, "page", lambda *_, **__: None)
        ) as result:
            results.append(np.array(result))
    assert np.array_equal(*results) and np.array_equal(results[0][..., 3], alpha)


def test_urls_in_requests_are_detected():
    def body(path):
        return json.dumps({"data": [{"a": {"path": path, "meta": {}}}, "http://x"]}).encode()

    assert names_address(body("http://x/y.png")) and names_address(b"{") and names_address(b"")
    assert names_address(body("http://x").replace(b"http", b"\\u0068ttp"))
    assert names_address(b"[" * 10**6)  # too deeply nested to parse
    assert not names_address(body("/tmp/x.png")) and not names_address(body(None))


# ---- the server --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(weights, tmp_path_factory):
    """Run gradio_restore.py on a free port; yield its URL, output folder and process."""
    folder = tmp_path_factory.mktemp("web")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = vars(make_settings(weights, folder / "out")) | {"port": port, "precision": "32"}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value)) if value != ""]
    with open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "gradio_restore.py", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
            first, line = (process.stdout.readline() if ready else "" for _ in range(2))
            assert first.startswith("computing on ")
            assert line.startswith(f"open http://127.0.0.1:{port}"), (folder / "errors.txt").read_text()
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", folder=folder / "out", process=process)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def request(url: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            urllib.request.Request(url, body, {"Content-Type": kind}), timeout=PATIENCE
        ) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def upload(url: str, name: str, content: bytes) -> tuple[int, str]:
    head = f'--X\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    return request(
        f"{url}/gradio_api/upload", head + content + b"\r\n--X--\r\n", "multipart/form-data; boundary=X"
    )


def test_server_reads_and_writes_only_its_own_folders(server):
    (server.folder / "secret.txt").write_text("secret")
    (server.folder / "results" / "own.txt").write_text("mine")
    api = f"{server.url}/gradio_api"
    assert request(f"{api}/file={server.folder}/results/own.txt") == (200, "mine")
    for path in (
        "/etc/passwd",
        ROOT / "README.md",
        server.folder / "secret.txt",
        "README.md",
        "../README.md",
    ):
        assert request(f"{api}/file={path}")[0] == 403, path
    for path in (f"{server.folder}/results/../secret.txt", f"{server.folder}/results/..%2Fsecret.txt"):
        assert request(f"{api}/file={path}")[0] == 403, path
    for door in ("file=http://example.com/", "file=HTTPS://example.com", "openapi.json", "info", "runs"):
        assert request(f"{api}/{door}") == (403, "not here"), door
    for door in ("process_recording", "vibe-edit", "run/predict", "call/restore"):
        assert request(f"{api}/{door}", b"{}") == (403, "not here"), door
    status, answer = upload(server.url, "../../../evil.png", png(photograph(8, 8)))
    assert status == 200 and json.loads(answer)[0].startswith(f"{server.folder}/uploads/")


def test_images_from_other_locations_are_rejected(server):
    config = json.loads(request(f"{server.url}/config")[1])
    number = next(d["id"] for d in config["dependencies"] if d["targets"][0][1] == "upload")
    join = f"{server.url}/gradio_api/queue/join"

    def ask(path):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        return request(join, json.dumps({"fn_index": number, "session_hash": "s", "data": [file]}).encode())

    assert ask("http://example.com/x.png") == (403, "not here")
    assert request(join, b"{") == (403, "not here")
    assert ask(photographs()[0])[0] == 200
    answer = request(f"{server.url}/gradio_api/queue/data?session_hash=s")[1]
    assert "was not uploaded by a user" in answer and '"success":false' in answer


def test_large_files_are_not_stored(server):
    def stored():
        return sum(path.is_file() for path in (server.folder / "uploads").rglob("*"))

    before = stored()
    whole = png(photograph(100, 100))
    for large in (2**20 + 1, 5 * 2**20):
        assert upload(server.url, "large.png", whole + bytes(large))[0] == 413
    assert request(f"{server.url}/gradio_api/upload", b"no form", "multipart/form-data; boundary=X")[0] == 400
    assert stored() == before
    assert upload(server.url, "fits.png", whole)[0] == 200 and stored() == before + 1


def test_size_and_number_of_layers_are_limited(server):
    """Limits apply to the endpoint to which the page sends painted layers."""
    config = json.loads(request(f"{server.url}/config")[1])
    editor = next(part["id"] for part in config["components"] if part["type"] == "imageeditor")
    address = f"{server.url}/gradio_api/component_server"

    def paint(content: bytes, files: int = 1, **fields: str) -> int:
        fields = {"component_id": str(editor), "session_hash": "s", "fn_name": "accept_blobs", **fields}
        fields = {"type": "layer", "index": "0", "id": "one", **fields}
        parts = [
            f'--X\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()
        ]
        head = '--X\r\nContent-Disposition: form-data; name="file"; filename="blob"\r\n\r\n'
        body = "".join(parts).encode() + (head.encode() + content + b"\r\n") * files + b"--X--\r\n"
        return request(address, body, "multipart/form-data; boundary=X")[0]

    assert paint(png(photograph(40, 40))) == 200
    for index in ("1000000000", "8", "-1", "x"):  # gradio would create that many layers
        assert paint(png(photograph(40, 40)), index=index) == 403, index
    assert paint(png(photograph(40, 40)), files=9) == 403
    assert paint(png(photograph(40, 40)) + bytes(2**21)) == 413
    assert request(address, json.dumps({"component_id": editor}).encode()) == (403, "not here")


def test_foreign_hosts_and_origins_are_rejected(server):
    def ask(path="/config", body=None, **headers):
        asked = urllib.request.Request(
            server.url + path, body, {"Content-Type": "application/json", **headers}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            return opener.open(asked, timeout=PATIENCE).status
        except urllib.error.HTTPError as error:
            return error.code

    port = server.url.rpartition(":")[2]
    join = "/gradio_api/queue/join"
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example"):
        assert ask(Host=host) == 403, host
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert ask(Host=host) == 200, host
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{server.url}.evil.example"):
        assert ask(join, b"{}", Origin=origin) == 403, origin
    assert ask(join, b"{}", Origin=server.url) in (400, 422)  # allowed origin, empty request


def test_forged_calls_do_not_crash_the_server(server):
    config = json.loads(request(f"{server.url}/config")[1])
    join = f"{server.url}/gradio_api/queue/join"
    calls = [(d["id"], len(d["inputs"])) for d in config["dependencies"]]
    for number, count in [*calls, (10**6, 0), (-1, 1)]:
        for data in ([], ["forged"] * count, [{"a": 1}] * count, [None] * (count + 3)):
            body = json.dumps({"fn_index": number, "session_hash": "forger", "data": data})
            request(join, body.encode())
    assert server.process.poll() is None and request(f"{server.url}/config")[0] == 200


def test_concurrent_pages_see_only_their_own_images(server, weights):
    """Run a short `python -m tests.faults page`."""
    port, network = int(server.url.rpartition(":")[2]), load_network(weights / "srn.safetensors")
    with ThreadPoolExecutor(3) as threads:
        people = [threads.submit(visit, port, network, 4, (1, page)) for page in range(3)]
    tally = sum((person.result() for person in people), Counter())
    assert tally["refused"] == 12 and tally["restored"] >= 3
    assert tally["restored"] + tally["stopped"] + tally["reloaded"] == 12
    with pytest.raises(RuntimeError, match="what is not its own picture's result"):  # detected
        visit(port, tiny_network(4), 4, (1, 0))


# ---- the page in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER[0]
    for flag in (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync disable-dev-shm-usage user-data-dir={folder / 'profile'}"
    ).split():
        options.add_argument(f"--{flag}")
    (folder / "downloads").mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(BROWSER[1]))
    driver.downloads = folder / "downloads"
    yield driver
    driver.quit()


class Visitor:
    """Simulated user of the page."""

    def __init__(self, driver, server, width: int = 1280, height: int = 1000):
        self.driver, self.results = driver, server.folder / "results"
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get("about:blank")
        driver.get_log("performance")
        driver.get(server.url)
        self.wait(lambda: self.find("#start-srn"))

    def find(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def wait(self, condition):
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < end, self.driver.find_element("tag name", "body").text
            time.sleep(0.05)
        return found

    def click(self, element) -> None:
        self.driver.execute_script("arguments[0].click()", element)

    def press(self, css: str) -> None:
        self.click(self.wait(lambda: self.find(css))[0])

    def upload(self, path: Path) -> None:
        self.wait(lambda: self.find("#upload input[type=file]"))[0].send_keys(str(path))

    def open(self, path: Path) -> None:
        self.upload(path)
        self.wait(lambda: self.find("#shown img"))

    def tab(self, label: str) -> None:
        for more in self.find(".overflow-menu > button"):  # on narrow screens most tabs are in a menu
            if more.is_displayed() and label not in [tab.text for tab in self.find("button[role=tab]")]:
                self.click(more)

        def named():
            tabs = self.find("button[role=tab], .overflow-dropdown button")
            return [tab for tab in tabs if tab.is_displayed() and tab.text.strip() == label]

        self.click(self.wait(named)[0])

    def set_steps(self, steps: int) -> None:
        boxes = self.wait(lambda: [b for b in self.find("input[type=number]") if b.is_displayed()])
        boxes[0].clear()
        boxes[0].send_keys(str(steps), "\ue004")

    def told(self, text: str) -> str:
        """Wait for a message that matches `text`, close all messages and return it."""

        def messages():
            return [m.text for m in self.find(".toast-body") if re.search(text, m.text)]

        found = self.wait(messages)[0]
        for button in self.find(".toast-close"):
            self.click(button)
        return found

    def download(self, name: str) -> Path:
        self.wait(lambda: self.find(f"#slider-{name} img"))
        before = set(self.driver.downloads.iterdir())
        self.press(f"#slider-{name} a[download]")

        def arrived():
            new = set(self.driver.downloads.iterdir()) - before
            return [path for path in new if path.suffix == ".png"]

        return self.wait(arrived)[0]

    def requests(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url for url in sent if url.startswith(("http", "ws"))}


@in_browser
def test_upload_restore_and_download_in_browser(driver, server, weights, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(photograph(90, 130)).save(tmp_path / "a photo.jpg", exif=exif)
    visitor = Visitor(driver, server)
    visitor.press("#start-srn")
    visitor.told("there is no image yet: upload one")
    visitor.open(tmp_path / "a photo.jpg")
    visitor.press("#start-srn")
    result = read_image(visitor.download("srn"))
    network = load_network(weights / "srn.safetensors")
    expected = restore_image(network, read_image(tmp_path / "a photo.jpg"), tile=1536, overlap=128)
    assert result.shape == (130, 90, 3) and np.array_equal(result, expected)
    assert all(url.startswith(server.url) for url in visitor.requests())  # no external fonts or scripts


@pytest.mark.slow
@in_browser
def test_brush_strokes_define_the_mask(driver, server, tmp_path):
    from selenium.webdriver import ActionChains

    write_image(tmp_path / "photo.png", photograph(240, 320))
    visitor = Visitor(driver, server)
    visitor.open(tmp_path / "photo.png")
    visitor.tab("Inpaint")
    visitor.set_steps(2)
    visitor.press("#start-inpaint")
    visitor.told("nothing is painted yet")
    canvas = visitor.wait(lambda: visitor.find("#editor canvas"))[0]
    visitor.wait(lambda: canvas.size["height"] > 100)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    time.sleep(0.5)  # until the page has scrolled and drawn the image
    stroke = ActionChains(driver).move_to_element(canvas).move_by_offset(-30, 0).click_and_hold()
    stroke.move_by_offset(30, 0).move_by_offset(30, 0).release().perform()
    time.sleep(0.5)
    visitor.press("#start-inpaint")
    result = read_image(visitor.download("inpaint"))
    mask = read_mask(max(visitor.results.glob("photo_*_mask_*.png"), key=os.path.getmtime))
    assert mask.shape == (240, 320) and 0.001 < mask.mean() < 0.2
    y, x = (where.mean() for where in np.nonzero(mask))
    assert (
        abs(y - 120) < 12 and abs(x - 160) < 12 and np.ptp(np.nonzero(mask)[1]) > np.ptp(np.nonzero(mask)[0])
    )
    differs = (result != photograph(240, 320)).any(axis=-1)
    assert differs[mask > 0].mean() > 0.9 and not differs[distance_to(mask) > 4].any()


@pytest.mark.slow
@in_browser
def test_mask_file_and_added_sides_are_filled(driver, server, tmp_path):
    write_image(tmp_path / "wide.png", photograph(64, 128))
    mask = np.zeros((64, 128), np.uint8)
    mask[20:40, 30:50] = 255
    write_image(tmp_path / "hole.png", mask)
    visitor = Visitor(driver, server, 390, 844)
    visitor.open(tmp_path / "wide.png")
    visitor.tab("Inpaint")
    visitor.set_steps(1)
    visitor.wait(lambda: visitor.find("#mask input[type=file]"))[0].send_keys(str(tmp_path / "hole.png"))
    visitor.wait(lambda: "hole" in visitor.find("#mask")[0].text)
    visitor.press("#start-inpaint")
    result = read_image(visitor.download("inpaint"))
    differs = (result != photograph(64, 128)).any(axis=-1)
    assert differs[mask > 0].mean() > 0.9 and not differs[distance_to(mask) > 4].any()
    for side, pixels in (("right", "32"), ("top", "16")):
        box = visitor.find(f"[aria-label='Add at {side}, pixels']")[0]
        box.clear()
        box.send_keys(pixels, "\ue004")
    before = set(visitor.results.glob("wide_*_inpaint_*.png"))
    visitor.press("#start-inpaint")
    new = visitor.wait(lambda: set(visitor.results.glob("wide_*_inpaint_*.png")) - before).pop()
    larger = read_image(new)
    assert larger.shape == (80, 160, 3)
    assert np.array_equal(larger[40:, 64:120], photograph(64, 128)[24:, 64:120])
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
@in_browser
def test_stop_button_and_closed_page_end_the_computation(driver, server, tmp_path):
    write_image(tmp_path / "large.png", photograph(320, 400))

    def start_long_work():
        visitor = Visitor(driver, server)
        visitor.open(tmp_path / "large.png")
        visitor.tab("ControlNet")
        visitor.set_steps(100)
        visitor.press("#start-deblur")
        visitor.wait(lambda: re.search(r"[1-9]\d*/100", visitor.find("#slider-deblur")[0].text))
        return visitor

    def work_on(visitor):
        visitor.tab("SRN")
        visitor.press("#start-srn")  # waits until the other computation has ended
        visitor.download("srn")

    visitor = start_long_work()
    visitor.press("#stop-deblur")
    visitor.told("Stopped: nothing was written")
    work_on(visitor)
    start_long_work()
    visitor = Visitor(driver, server)
    visitor.open(tmp_path / "large.png")
    work_on(visitor)
    assert not list(visitor.results.glob("large_*_deblur_*.png"))


@pytest.mark.slow
@in_browser
def test_errors_are_clear_messages(driver, server, tmp_path):
    (tmp_path / "broken.jpg").write_text("a text file")
    (tmp_path / "cut.png").write_bytes(photographs()[0].read_bytes()[:20000])
    write_image(tmp_path / "many.png", np.zeros((800, 700, 3), np.uint8))
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (600, 700, 3), np.uint8)).save(
        tmp_path / "big.png"
    )
    for name, text in (
        ("broken.jpg", "cannot read image broken.jpg: cannot identify"),
        ("cut.png", "cannot read image cut.png: "),
        ("many.png", "cannot read image many.png: it has 0.6 megapixels, more than 0.5"),
        ("big.png", "exceed the maximum allowed size"),
    ):
        visitor = Visitor(driver, server)
        visitor.upload(tmp_path / name)
        said = visitor.told(text)
        assert str(server.folder) not in said and "Traceback" not in said
        assert not visitor.find("#shown img")
    visitor = Visitor(driver, server)
    write_image(tmp_path / "a.png", photograph(40, 40))
    visitor.open(tmp_path / "a.png")
    visitor.tab("DBGAN")
    visitor.press("#start-dbgan")
    visitor.told("DBGAN has no weights yet: it needs .*dbgan.safetensors.* train_dbgan.py")


@pytest.mark.slow
@in_browser
def test_compare_tab_shows_all_available_systems(driver, server, tmp_path):
    write_image(tmp_path / "both.png", photograph(64, 64))
    visitor = Visitor(driver, server, 390, 844)
    visitor.open(tmp_path / "both.png")
    visitor.tab("ControlNet")
    visitor.set_steps(2)
    visitor.tab("Compare")
    visitor.press("#start-compare")
    visitor.wait(lambda: len(visitor.find("#gallery .grid-wrap img")) == 3)
    captions = [label.text for label in visitor.find("#gallery .caption-label")]
    assert captions == ["input", "SRN", "ControlNet"]
    right = read_image(visitor.download("compare"))
    written = max(visitor.results.glob("both_*_deblur_*.png"), key=os.path.getmtime)
    assert np.array_equal(right, read_image(written))
    width = driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390  # no horizontal scrolling on a phone
