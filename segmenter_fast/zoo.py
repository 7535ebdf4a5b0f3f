"""The official model zoo: which models there are, and a download that survives bad networks.

Files land in `<cache>/zoo/<dataset>/<model>/`, first as `<file>.part`, which the next attempt or
the next call continues. The zoo publishes no hashes, so the SHA-256 of the first download is
written down beside the files, and a later file that differs is refused.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from segmenter_fast.checkpoint import OFFICIAL_CONFIG, OFFICIAL_WEIGHTS, CheckpointError
from segmenter_fast.files import replacing

try:
    import fcntl
except ImportError:  # no file locks on this system: simultaneous downloads are the user's to avoid
    fcntl = None

BASE_URL = "https://www.rocq.inria.fr/cluster-willow/rstrudel/segmenter/checkpoints"
FILES = (OFFICIAL_CONFIG, OFFICIAL_WEIGHTS)  # the small one first: a dead host shows at once
RECORD = "sha256.json"
_ATTEMPTS = 4
_BACKOFF_S = 0.5  # doubled after each failed attempt
_CHUNK_BYTES = 1 << 20


class DownloadError(CheckpointError):
    """A file did not arrive; the message says which, from where, why and what to do."""


class ZooModel(NamedTuple):
    """A published model.

    Args:
        name: folder on the server, "<dataset>/<model>".
        variant: in the notation of `create_model`.
        resolution: side of the training crop in pixels.
        miou, miou_multiscale: percent, as published.
        sha256: of checkpoint.pth, where known.
    """

    name: str
    variant: str
    resolution: int
    miou: float
    miou_multiscale: float
    sha256: str | None = None

    @property
    def dataset(self) -> str:
        """What it was trained on."""
        return self.name.split("/")[0]

    def url(self, file: str) -> str:
        """Address of one of its files; SEGMENTER_FAST_ZOO_URL names a mirror."""
        base = os.environ.get("SEGMENTER_FAST_ZOO_URL") or BASE_URL
        return f"{base.rstrip('/')}/{self.name}/{file}"


# Source: model zoo in the official README; single-scale and multi-scale mIoU.
ZOO = (
    ZooModel("ade20k/seg_tiny_mask", "Seg-T-Mask/16", 512, 38.1, 38.8),
    ZooModel("ade20k/seg_small_mask", "Seg-S-Mask/16", 512, 45.3, 46.9),
    ZooModel("ade20k/seg_base_mask", "Seg-B-Mask/16", 512, 48.5, 50.0),
    ZooModel("ade20k/seg_base_patch8", "Seg-B/8", 512, 49.5, 50.5),
    ZooModel("ade20k/seg_large_mask_640", "Seg-L-Mask/16", 640, 51.8, 53.6),
    ZooModel("ade20k/seg_base_deit_linear", "Seg-B-DeiT/16", 512, 47.1, 48.1),
    ZooModel("ade20k/seg_base_deit_mask", "Seg-B-DeiT-Mask/16", 512, 48.7, 50.1),
    ZooModel("pascal_context/seg_large_mask", "Seg-L-Mask/16", 480, 58.1, 59.0),
    ZooModel("cityscapes/seg_large_mask", "Seg-L-Mask/16", 768, 79.1, 81.3),
)


def list_zoo() -> list[str]:
    """Names of the published models, "<dataset>/<model>"."""
    return [model.name for model in ZOO]


def _normal(name: str) -> str:
    """One spelling: "Seg-B†-Mask/16" (the official README's) is "seg-b-deit-mask/16"."""
    return re.sub(r"[\s_-]+", "-", name.casefold().replace("†", "-deit")).strip("-/")


def _aliases() -> dict[str, tuple[str, ZooModel]]:
    """Normal form to its readable spelling and the model.

    "<dataset>/<variant>" and "<dataset>/<folder>" name one model each. Alone, a variant means
    ADE20K's, which come first, and a folder counts only if no other data set has the same.
    """
    folders = [model.name.split("/")[1] for model in ZOO]
    aliases = {}
    for model, folder in zip(ZOO, folders, strict=True):
        names = [model.name, f"{model.dataset}/{model.variant}", model.variant]
        if folders.count(folder) == 1:
            names.append(folder)
        for name in names:
            aliases.setdefault(_normal(name), (name, model))
    return aliases


def spellings() -> list[str]:
    """Every name that `find` knows, up to case and hyphens."""
    return [name for name, _ in _aliases().values()]


def find(name: str) -> ZooModel | None:
    """The published model of that name, or None.

    Args:
        name: "Seg-T-Mask/16", "seg_tiny_mask", "ade20k/seg_tiny_mask", "cityscapes/Seg-L-Mask/16";
            case, hyphens, underscores and blanks do not matter.
    """
    return _aliases().get(_normal(name), (name, None))[1]


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else $SEGMENTER_FAST_CACHE, else ~/.cache/segmenter_fast."""
    folder = cache_dir or os.environ.get("SEGMENTER_FAST_CACHE") or "~/.cache/segmenter_fast"
    return Path(folder).expanduser()


def download(
    name: str,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    timeout: float = 10.0,
    force: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Bring a published model's two files to this machine, or find them there.

    Args:
        name: see `find`.
        cache_dir: see `cache_folder`.
        progress: show a bar on standard error.
        timeout: seconds to wait for a connection, and for each piece of data.
        force: fetch again, and accept files unlike the first ones.
        local_files_only: never use the network.

    Returns:
        Folder with checkpoint.pth and variant.yml.

    Raises:
        ValueError: no such model.
        FileNotFoundError: not there and `local_files_only`.
        DownloadError: the host is gone, refuses or sends something else; the disk is full; or a
            file differs from the one first downloaded. An unfinished file is continued next time.
    """
    model = find(name)
    if model is None:
        raise ValueError(f"no model {name!r} in the zoo; there are {', '.join(list_zoo())}")
    folder = cache_folder(cache_dir) / "zoo" / model.name
    missing = [file for file in FILES if force or not (folder / file).is_file()]
    if missing and local_files_only:
        raise FileNotFoundError(f"{model.name} was not downloaded before: no {folder / missing[0]}")
    try:
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / ".lock"):
                for file in missing:
                    # Asked again under the lock: another process may just have brought it.
                    if force or not (folder / file).is_file():
                        _fetch(model.url(file), folder / file, progress, timeout)
                        _record(model, folder, file, replace=force)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DownloadError(
            f"cannot write to {folder}: {'the disk is full' if full else error}. What has arrived "
            "is kept and continued next time; SEGMENTER_FAST_CACHE names another folder."
        ) from error
    for file in FILES:
        _verify(model, folder, file)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- Hashes --------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written: unchanged, it need not be read again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_record(folder: Path) -> dict:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _known_hash(model: ZooModel, record: dict, file: str) -> str | None:
    if file == OFFICIAL_WEIGHTS and model.sha256:
        return model.sha256
    entry = record.get(file)
    return entry.get("sha256") if isinstance(entry, dict) else None


def _record(model: ZooModel, folder: Path, file: str, replace: bool = False) -> None:
    """Compare with the hash that is known, or write down a first one."""
    record = _read_record(folder)
    if replace:
        record.pop(file, None)
    known, actual = _known_hash(model, record, file), _sha256(folder / file)
    if known is not None and actual != known:
        first = "published" if known == model.sha256 else "first downloaded"
        raise DownloadError(
            f"{folder / file} is not the file that was {first}: SHA-256 {actual}, expected "
            f"{known}. Delete {folder}, or load with force_download=True, to start afresh."
        )
    record[file] = {"sha256": actual, "stamp": _stamp(folder / file)}
    with replacing(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _verify(model: ZooModel, folder: Path, file: str) -> None:
    """Read a file again only if it was written since its hash was taken."""
    record = _read_record(folder)
    entry = record.get(file)
    if (
        isinstance(entry, dict)
        and entry.get("stamp") == _stamp(folder / file)
        and entry.get("sha256") == _known_hash(model, record, file)
    ):
        return
    with contextlib.suppress(PermissionError):  # a cache that is shared read-only
        _record(model, folder, file)


# --- Transfer ------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """The transfer stopped in a way that another attempt may mend."""


def _fetch(url: str, target: Path, progress: bool, timeout: float) -> None:
    """Download `url` to `target`, continuing `<target>.part`."""
    host = urllib.parse.urlsplit(url)
    if host.scheme not in ("http", "https") or not host.netloc:
        raise ValueError(f"the zoo's address must be http or https, got {url!r}")
    part = target.with_name(f"{target.name}.part")
    for attempt in range(_ATTEMPTS):
        try:
            _transfer(url, part, progress, timeout)
            break
        except _Interrupted as error:
            if attempt == _ATTEMPTS - 1:
                raise _failure(url, f"{error} ({_ATTEMPTS} attempts)", target) from error
            time.sleep(_BACKOFF_S * 2**attempt)
    _check_content(url, part, target)
    os.replace(part, target)
    _validator_file(part).unlink(missing_ok=True)


def _failure(url: str, reason: str, target: Path) -> DownloadError:
    host = urllib.parse.urlsplit(url).netloc
    return DownloadError(
        f"cannot download {url} from {host}: {reason}. If the host is gone, get "
        f"{' and '.join(FILES)} by other means and put them into {target.parent}, or pass the "
        "folder that holds them; SEGMENTER_FAST_ZOO_URL names a mirror."
    )


def _validator_file(part: Path) -> Path:
    """Where the server's name for this version of the file (ETag, or date) is kept meanwhile."""
    return part.with_name(f"{part.name}.version")


def _open(url: str, part: Path, timeout: float) -> tuple[http.client.HTTPResponse, int]:
    """Ask for what is still missing; the response and the offset that it starts at."""
    offset = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "segmenter_fast", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if _validator_file(part).exists():
            headers["If-Range"] = _validator_file(part).read_text(encoding="ascii")
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:
            # Nothing lies beyond the offset: the part is another version's, or the whole file.
            part.unlink()
            raise _Interrupted("the server has no such range") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(f"HTTP {error.code} {error.reason}") from error
        raise _failure(url, f"HTTP {error.code} {error.reason}", part) from error
    except urllib.error.URLError as error:
        # Name not found, refused, unreachable, timed out, bad certificate: trying again is no use.
        raise _failure(url, f"no connection ({error.reason})", part) from error
    except (http.client.HTTPException, OSError) as error:
        raise _Interrupted(f"no answer ({error or type(error).__name__})") from error
    if response.status == 206:
        span = response.headers.get("Content-Range", "")
        if not span.startswith(f"bytes {offset}-"):
            response.close()
            part.unlink()
            raise _Interrupted(f"the server sent the wrong range {span!r}")
        return response, offset
    return response, 0


def _transfer(url: str, part: Path, progress: bool, timeout: float) -> None:
    response, offset = _open(url, part, timeout)
    with response:
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length and length.isdecimal() else None
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if version.startswith("W/") or not (version.isascii() and version.isprintable()):
            version = ""  # weak, or not fit to be sent back
        with (
            open(part, "ab" if offset else "wb") as file,
            tqdm(
                total=total,
                initial=offset,
                desc="/".join(urllib.parse.urlsplit(url).path.split("/")[-2:]),
                unit="B",
                unit_scale=True,
                disable=not progress,
            ) as bar,
        ):
            if version:
                _validator_file(part).write_text(version, encoding="ascii")
            else:
                _validator_file(part).unlink(missing_ok=True)
            while True:
                try:
                    chunk = response.read1(_CHUNK_BYTES)
                except (http.client.HTTPException, OSError) as error:
                    raise _Interrupted(f"interrupted ({error or type(error).__name__})") from error
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size < total:
        raise _Interrupted(f"{size} of {total} bytes arrived")


def _check_content(url: str, part: Path, target: Path) -> None:
    """An error page that calls itself a success must not become a checkpoint."""
    with open(part, "rb") as file:
        head = file.read(256)
    if target.name == OFFICIAL_WEIGHTS:
        # A whole zip archive, or the pickle that torch.save wrote before version 1.6.
        good = zipfile.is_zipfile(part) or head.startswith(b"\x80\x02")
    else:
        good = bool(head.strip()) and not head.lstrip().startswith(b"<")
    if not good:
        part.unlink()
        raise _failure(url, f"the server sent no such file, it begins {head[:40]!r}", target)
