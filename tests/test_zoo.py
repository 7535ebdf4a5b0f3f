"""The official zoo against a loopback server that misbehaves in every way a network can."""

import errno
import hashlib
import io
import json
import os
import socket
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from segmenter_fast import SegmenterModel, checkpoint, list_variants, zoo
from segmenter_fast.zoo import DownloadError

GOLDEN = Path(__file__).parent / "golden"
TINY, FOLDER = "Seg-T-Mask/16", "ade20k/seg_tiny_mask"
YML, PTH = f"/{FOLDER}/variant.yml", f"/{FOLDER}/checkpoint.pth"


def archive(seed: int, size: int = 300_000) -> bytes:
    """A zip archive of incompressible bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data", hashlib.shake_256(bytes([seed])).digest(size))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Files by path, and faults by path that are used up one per request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {YML: b"net_kwargs: {}\n", PTH: archive(0)}
        self.faults = {}  # path -> list of dicts, see Handler
        self.requests = []  # (path, Range header)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Connections are broken on purpose."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        span = self.headers.get("Range")
        self.server.requests.append((self.path, span))
        faults = self.server.faults.get(self.path)
        fault = faults.pop(0) if faults else {}
        data = self.server.files.get(self.path)
        if data is None:
            return self.send_error(404)
        if "status" in fault:
            return self.send_error(fault["status"])
        if fault.get("hang_up"):
            return self.connection.close()
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        start, status = 0, 200
        fresh = self.headers.get("If-Range") in (None, tag)
        if span and fresh and not fault.get("ignore_range"):
            start, status = int(span.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        body = data[start:]
        self.send_response(status)
        if status == 206:
            first = start + fault.get("shift", 0)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if not fault.get("no_tag"):
            self.send_header("ETag", tag)
        if not fault.get("no_length"):
            self.send_header("Content-Length", str(fault.get("length", len(body))))
        self.end_headers()
        self.wfile.write(body[: fault.get("cut", len(body))])
        if "stall" in fault:
            self.wfile.flush()
            time.sleep(fault["stall"])

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMENTER_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(zoo, "_BACKOFF_S", 0.0)
    with Server() as server:
        monkeypatch.setenv("SEGMENTER_FAST_ZOO_URL", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "zoo" / FOLDER


def get(**options):
    return zoo.download(TINY, progress=False, **{"timeout": 5.0} | options)


def spans(server):
    """Range headers of the requests for the weights."""
    return [span for path, span in server.requests if path == PTH]


def assert_arrived(server, folder):
    assert (folder / "checkpoint.pth").read_bytes() == server.files[PTH]
    assert (folder / "variant.yml").read_bytes() == server.files[YML]
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        "checkpoint.pth",
        "variant.yml",
        "sha256.json",
    }


# --- Names ---------------------------------------------------------------------------------------


def test_the_table():
    assert len(zoo.list_zoo()) == len(set(zoo.list_zoo())) == 9
    assert {model.variant for model in zoo.ZOO} <= set(list_variants())
    large = zoo.find("cityscapes/Seg-L-Mask/16")
    assert (large.dataset, large.resolution, large.miou) == ("cityscapes", 768, 79.1)
    for model in zoo.ZOO:
        assert model.miou < model.miou_multiscale


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Seg-T-Mask/16", "ade20k/seg_tiny_mask"),
        ("seg_tiny_mask", "ade20k/seg_tiny_mask"),
        ("ade20k/seg_tiny_mask", "ade20k/seg_tiny_mask"),
        ("SEG-tiny mask", "ade20k/seg_tiny_mask"),
        ("Seg-B/8", "ade20k/seg_base_patch8"),
        ("Seg-B†-Mask/16", "ade20k/seg_base_deit_mask"),
        ("Seg-B-DeiT/16", "ade20k/seg_base_deit_linear"),
        ("Seg-L-Mask/16", "ade20k/seg_large_mask_640"),
        ("pascal_context/Seg-L-Mask/16", "pascal_context/seg_large_mask"),
        ("Pascal-Context/seg_large_mask", "pascal_context/seg_large_mask"),
        ("seg_large_mask", None),  # two data sets have it
        ("Seg-S/16", None),
        ("", None),
    ],
)
def test_spellings(name, expected):
    found = zoo.find(name)
    assert (found and found.name) == expected


def test_every_listed_spelling_is_found():
    assert all(zoo.find(name) for name in zoo.spellings())


def test_addresses(monkeypatch):
    monkeypatch.delenv("SEGMENTER_FAST_ZOO_URL", raising=False)
    assert zoo.find(TINY).url("variant.yml") == (
        "https://www.rocq.inria.fr/cluster-willow/rstrudel/segmenter/checkpoints/"
        "ade20k/seg_tiny_mask/variant.yml"
    )
    monkeypatch.setenv("SEGMENTER_FAST_ZOO_URL", "http://mirror/x/")
    assert zoo.find(TINY).url("variant.yml") == "http://mirror/x/ade20k/seg_tiny_mask/variant.yml"


def test_unknown_name_and_bad_address(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"no model 'Seg-S/16' in the zoo; there are ade20k/"):
        zoo.download("Seg-S/16", tmp_path)
    monkeypatch.setenv("SEGMENTER_FAST_ZOO_URL", "file:///etc")
    with pytest.raises(ValueError, match="must be http or https"):
        zoo.download(TINY, tmp_path)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SEGMENTER_FAST_CACHE", raising=False)
    assert zoo.cache_folder() == tmp_path / ".cache" / "segmenter_fast"
    monkeypatch.setenv("SEGMENTER_FAST_CACHE", "~/elsewhere")
    assert zoo.cache_folder() == tmp_path / "elsewhere"
    assert zoo.cache_folder(tmp_path / "given") == tmp_path / "given"


# --- When all is well ----------------------------------------------------------------------------


def test_from_pretrained_by_name(server):
    for file, path in (("variant.yml", YML), ("checkpoint.pth", PTH)):
        server.files[path] = (GOLDEN / "seg_linear_8" / file).read_bytes()
    model = SegmenterModel.from_pretrained("seg-t-mask/16")
    expected = checkpoint.load_checkpoint(GOLDEN / "seg_linear_8")[1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert len(server.requests) == 2
    SegmenterModel.from_pretrained(FOLDER, local_files_only=True)
    assert len(server.requests) == 2, "what is there is not fetched again"


def test_download_and_progress(server, folder, capsys):
    assert zoo.download(TINY) == folder
    assert_arrived(server, folder)
    assert "seg_tiny_mask/checkpoint.pth: 100%" in capsys.readouterr().err
    assert get() == folder
    assert capsys.readouterr().err == ""
    assert len(server.requests) == 2


def test_cache_dir_argument(server, tmp_path):
    assert get(cache_dir=tmp_path / "mine") == tmp_path / "mine" / "zoo" / FOLDER


def test_local_files_only(server):
    with pytest.raises(FileNotFoundError, match="was not downloaded before"):
        get(local_files_only=True)
    assert not server.requests


def test_two_at_once_fetch_it_once(server, folder):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: get(), range(2))) == [folder, folder]
    assert_arrived(server, folder)
    assert len(server.requests) == 2


# --- Interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"no_tag": True}, {"no_length": True}], ids=str)
def test_a_cut_connection_is_continued(server, folder, extra):
    server.faults[PTH] = [{"cut": 100_000} | extra, {"cut": 50_000}]
    if "no_length" in extra:
        # Without a length a cut cannot be told from the end; the archive's end is missing, though.
        with pytest.raises(DownloadError, match="no such file, it begins b'PK"):
            get()
        assert not (folder / "checkpoint.pth").exists()
        get()
    else:
        get()
        assert spans(server) == [None, "bytes=100000-", "bytes=150000-"]
    assert_arrived(server, folder)


def test_the_next_call_continues(server, folder):
    server.faults[PTH] = [{"cut": 1000}] * 4
    with pytest.raises(DownloadError, match=r"4000 of \d+ bytes arrived \(4 attempts\)"):
        get()
    assert (folder / "checkpoint.pth.part").stat().st_size == 4000
    assert not (folder / "checkpoint.pth").exists()
    get()
    assert spans(server)[-1] == "bytes=4000-"
    assert_arrived(server, folder)


def test_interrupted_by_the_user(server, folder, monkeypatch):
    original = zoo.tqdm.update

    def update(bar, n):
        original(bar, n)
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "_CHUNK_BYTES", 4096)
    folder.mkdir(parents=True)
    (folder / "variant.yml").write_bytes(b"a: 1\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zoo.tqdm, "update", update)
        get()
    size = (folder / "checkpoint.pth.part").stat().st_size
    assert 0 < size <= 4096
    get()
    assert spans(server) == [None, f"bytes={size}-"]
    assert (folder / "checkpoint.pth").read_bytes() == server.files[PTH]


def test_server_that_ignores_ranges(server, folder):
    server.faults[PTH] = [{"cut": 100_000}, {"ignore_range": True}]
    get()
    assert_arrived(server, folder)


def test_server_that_sends_the_wrong_range(server, folder):
    server.faults[PTH] = [{"cut": 100_000}, {"shift": 1}]
    get()
    assert spans(server) == [None, "bytes=100000-", None]
    assert_arrived(server, folder)


def test_file_that_changed_meanwhile(server, folder):
    """If-Range: the new version is fetched from its start, never glued to the old one."""
    server.faults[PTH] = [{"cut": 10_000}] * 4
    with pytest.raises(DownloadError, match="40000 of"):
        get()
    server.files[PTH] = archive(1)
    get()
    assert_arrived(server, folder)


def test_part_that_is_longer_than_the_file(server, folder):
    folder.mkdir(parents=True)
    (folder / "checkpoint.pth.part").write_bytes(bytes(400_000))
    get()
    assert spans(server) == ["bytes=400000-", None]
    assert_arrived(server, folder)


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"hang_up": True}], ids=str)
def test_passing_trouble(server, folder, fault):
    server.faults[PTH] = [fault] * 3
    get()
    assert_arrived(server, folder)


def test_lasting_trouble_is_bounded(server):
    server.faults[YML] = [{"status": 500}] * 100
    with pytest.raises(DownloadError, match=r"HTTP 500 .*\(4 attempts\)"):
        get()
    assert len(server.requests) == 4


def test_stalled_connection(server, folder):
    server.faults[PTH] = [{"cut": 10, "stall": 1.0}]
    get(timeout=0.2)
    assert spans(server) == [None, "bytes=10-"]
    assert_arrived(server, folder)


# --- Failures that no second attempt mends -------------------------------------------------------


def assert_helpful(error, host):
    message = str(error.value)
    assert host in message and f"{FOLDER}/variant.yml" in message
    assert "pass the folder that holds them" in message and "SEGMENTER_FAST_ZOO_URL" in message


def test_not_found(server):
    del server.files[YML]
    with pytest.raises(DownloadError, match="HTTP 404") as error:
        get()
    assert_helpful(error, server.url.removeprefix("http://"))
    assert len(server.requests) == 1


def test_connection_refused(server, monkeypatch):
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("SEGMENTER_FAST_ZOO_URL", f"http://{host}")
        with pytest.raises(DownloadError, match=r"no connection.*refused") as error:
            get()
    assert_helpful(error, host)


def test_unknown_host(server, monkeypatch):
    def getaddrinfo(*args, **options):
        calls.append(args)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setenv("SEGMENTER_FAST_ZOO_URL", "http://gone.invalid/zoo")
    with pytest.raises(checkpoint.CheckpointError, match="Name or service not known") as error:
        checkpoint.load_model(TINY)
    assert_helpful(error, "gone.invalid")
    assert len(calls) == 1, "fails fast"


def test_host_that_does_not_answer_the_call(server, monkeypatch):
    def connect(*args, **options):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(DownloadError, match=r"no connection \(timed out\)") as error:
        get()
    assert_helpful(error, server.url.removeprefix("http://"))


@pytest.mark.parametrize("path", [YML, PTH])
def test_error_page_that_calls_itself_a_success(server, folder, path):
    good = server.files[path]
    server.files[path] = b"<!DOCTYPE html><html>Log in to this network</html>"
    with pytest.raises(DownloadError, match="no such file, it begins b'<!DOCTYPE"):
        get()
    server.files[path] = good
    get()
    assert_arrived(server, folder)


def test_length_that_is_too_short(server, folder):
    """The archive's end is missing although every announced byte arrived."""
    server.faults[PTH] = [{"length": 200_000}]
    with pytest.raises(DownloadError, match="no such file"):
        get()
    get()
    assert_arrived(server, folder)


def test_length_that_is_too_long(server):
    server.faults[PTH] = [{"length": 10**6}] + [{"ignore_range": True, "length": 10**6}] * 3
    with pytest.raises(DownloadError, match=r"of 1000000 bytes arrived"):
        get()


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")]
)
def test_disk_trouble(server, folder, monkeypatch, code, message):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() >= 8192:
                raise OSError(code, os.strerror(code))
            return super().write(data)

    def full_disk(path, mode="r", *args, **options):
        return (Full if "checkpoint.pth.part" in str(path) else open)(path, mode, *args, **options)

    monkeypatch.setattr(zoo, "_CHUNK_BYTES", 4096)
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "open", full_disk, raising=False)
        with pytest.raises(DownloadError, match=message) as error:
            get()
    assert str(folder) in str(error.value) and "SEGMENTER_FAST_CACHE" in str(error.value)
    assert spans(server) == [None], "no second attempt"
    get()
    assert spans(server)[1].startswith("bytes=")
    assert_arrived(server, folder)


# --- Hashes --------------------------------------------------------------------------------------


def test_hash_is_recorded_and_kept_to(server, folder):
    get()
    record = json.loads((folder / "sha256.json").read_text())
    expected = hashlib.sha256(server.files[PTH]).hexdigest()
    assert record["checkpoint.pth"]["sha256"] == expected
    os.utime(folder / "checkpoint.pth")  # touched, not changed
    get()
    (folder / "checkpoint.pth").write_bytes(archive(2))
    for _ in range(2):
        with pytest.raises(DownloadError, match="not the file that was first downloaded"):
            get()
    get(force=True)
    assert_arrived(server, folder)


def test_unchanged_files_are_not_hashed_again(server, monkeypatch):
    get()
    monkeypatch.setattr(zoo, "_sha256", None)
    get()


def test_host_that_sends_another_file_later(server, folder):
    get()
    (folder / "checkpoint.pth").unlink()
    server.files[PTH] = archive(3)
    with pytest.raises(DownloadError, match="not the file that was first downloaded"):
        get()
    get(force=True)
    assert_arrived(server, folder)


def test_known_hash(server, folder, monkeypatch):
    good = hashlib.sha256(server.files[PTH]).hexdigest()
    for sha256 in (good, "0" * 64):
        table = tuple(m._replace(sha256=sha256) if m.name == FOLDER else m for m in zoo.ZOO)
        monkeypatch.setattr(zoo, "ZOO", table)
        if sha256 == good:
            get(force=True)
        else:
            for force in (False, True):
                with pytest.raises(DownloadError, match="not the file that was published"):
                    get(force=force)


def test_files_brought_by_hand(server, folder):
    folder.mkdir(parents=True)
    for file, path in (("variant.yml", YML), ("checkpoint.pth", PTH)):
        (folder / file).write_bytes(server.files[path])
    assert get() == folder
    assert not server.requests
    assert "checkpoint.pth" in json.loads((folder / "sha256.json").read_text())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"checkpoint.pth": 3}'])
def test_broken_record(server, folder, text):
    get()
    (folder / "sha256.json").write_text(text)
    assert get() == folder
    assert set(json.loads((folder / "sha256.json").read_text())) >= {"checkpoint.pth"}
