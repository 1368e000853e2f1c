"""Published weights in the weights folder: finding them there, and bringing them there.

A download is checked before it gets its name, so that what stands under a name is whole, whenever a process is killed
and however many download the same. Nothing but https is spoken, and nothing that a file holds is run.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

from .errors import InputError, RunError
from .model import MobileNetV2
from .registry import SOURCES, File, Source, alternatives, sources

TIMEOUT = 30.0  # seconds without a byte
_PIECE = 1 << 18  # bytes
_SHOWN = 2  # sources of a variant in a message


class _FailureError(Exception):
    """A download failed; the message is the cause."""


class DownloadError(RunError):
    """A download failed, for the reason ``cause``; the message says too what to put where by hand."""

    def __init__(self, cause: str, remedy: str):
        super().__init__(f"{cause}; {remedy}")
        self.cause = cause


def weights_folder(weights_dir: str | None = None) -> str:
    """Where weights are looked for: ``weights_dir``, else ``$MNV2_WEIGHTS``, else ``mnv2`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return weights_dir or os.environ.get("MNV2_WEIGHTS") or os.path.join(cache, "mnv2")


def find_file(alpha: float, resize: int, folder: str, origin: str | None = None) -> str | None:
    """The weights of a variant in ``folder``, a file or a folder; None where there are none.

    ``mobilenetv2_ALPHA_RESIZE.safetensors``, which is a user's own, comes first, and then what is published, in the
    order of ``registry.sources``; with ``origin`` only what that one publishes.
    """
    names = [f"mobilenetv2_{float(alpha)}_{resize}.safetensors"] if origin is None else []
    names += [source.name for source in _readable(alpha, resize) if origin in (None, source.origin)]
    paths = (os.path.join(folder, name) for name in names)
    return next(filter(os.path.exists, paths), None)


def fetch(source: Source, folder: str) -> str:
    """The path of ``source`` in ``folder``, where it is downloaded if it isn't there yet.

    Raises:
        InputError: mnv2 can't read such weights, or what bears their name already isn't what was published.
        DownloadError: the message says what to put where by hand.
        RunError: the folder can't be written.
    """
    path = os.path.join(folder, source.name)
    if source.conversion is not None:
        raise InputError(
            f"{source.name} must be converted first, by {source.conversion}; it lies at {source.weights.url}"
        )
    if os.path.lexists(path):
        _require_published(source, path)
        return path
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(".writing", f".{source.name}.", folder) as temporary:
            whole = os.path.join(temporary, source.name)
            try:
                _download_all(source, whole)
            except _FailureError as failure:
                raise DownloadError(f"can't download {failure}", _by_hand(source, path)) from None
            _put(source, whole, path)
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror or error}") from None
    return path


def offline_message(alpha: float, resize: int, folder: str, cause: str, origin: str | None = None) -> str:
    """One line for whoever has no weights of a variant in ``folder``, for the reason ``cause``: what to put where.

    With an ``origin`` it tells only what that one publishes, where it publishes something.
    """
    line = f"no weights of alpha {alpha} at {resize} px in {folder} ({cause}); "
    here, near = _readable(alpha, resize), alternatives(alpha, resize)
    if origin in {source.origin for source in (*here, *near)}:
        here, near = ([source for source in found if source.origin == origin] for found in (here, near))
    others = [source for source in near if source.resize != resize]
    if not others and not here:
        alphas = ", ".join(str(value) for value in sorted({source.alpha for source in SOURCES}, reverse=True))
        return f"{line}none are published of this alpha, but of {alphas}: name a file of yours with --pretrained FILE"
    own = " or ".join(_told(source) for source in here[:_SHOWN])
    ways = [f"put there {own}"] if own else []
    if others:
        ways.append(f"name with --pretrained FILE what was trained at {others[0].resize} px, {_told(others[0])}")
    return line + ", or ".join(ways)


def _readable(alpha: float, resize: int) -> list[Source]:
    return [source for source in sources(alpha, resize) if source.conversion is None]


def _told(source: Source) -> str:
    """What to download by hand, how to call it, and whose it is."""
    package = f", needs {source.package}" if source.package else ""
    if source.is_folder:
        files = f"{_names(source)} from {_parent(source)} in a folder {source.name}"
    else:
        renamed = "" if source.weights.url.endswith(f"/{source.name}") else f" as {source.name}"
        files = source.weights.url + renamed
    return f"{files} ({source.origin}, top-1 {source.accuracy.top1}%{package})"


def _by_hand(source: Source, path: str) -> str:
    if source.is_folder:
        return f"by hand put {_names(source)} from {_parent(source)} into the folder {path}"
    return f"put it by hand at {path}"


def _names(source: Source) -> str:
    *first, last = (file.name for file in source.files)
    return f"{', '.join(first)} and {last}"


def _parent(source: Source) -> str:
    return source.weights.url.rpartition("/")[0] + "/"


def _require_published(source: Source, path: str) -> None:
    """Raise InputError where the checksum of what lies at ``path`` is known to be another."""
    weights = os.path.join(path, source.weights.name) if source.is_folder else path
    try:
        with open(weights, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"can't read {weights}: {error.strerror}; without {path} it is downloaded anew") from None
    if not found.startswith(source.weights.sha256 or ""):
        raise InputError(
            f"{weights} is not {source.origin}'s: expected sha256 {source.weights.sha256}, got {found}; without it, it "
            "is downloaded anew"
        )


def _download_all(source: Source, path: str) -> None:
    """Download the files of ``source`` to ``path``, or into a folder there."""
    if source.is_folder:
        os.mkdir(path)
    for file in source.files:
        place = os.path.join(path, file.name) if source.is_folder else path
        least = _least_bytes(source.alpha) if file is source.weights else 0
        try:
            _download(file, place, source.name, least)
        except _FailureError as failure:
            raise _FailureError(f"{file.url} ({failure})") from None


def _least_bytes(alpha: float) -> int:
    """Bytes of the parameters in fp32: a smaller file is a page that says sorry, or cut off."""
    with torch.device("meta"):
        return sum(4 * parameter.numel() for parameter in MobileNetV2(alpha).parameters())


def _download(file: File, path: str, title: str, least: int) -> None:
    """Write ``file`` to ``path`` and check it: at least ``least`` bytes, all that were announced, the checksum."""
    digest, size = hashlib.sha256(), 0
    with _network():
        response = _open(file.url)
    with response, open(path, "wb") as out:
        announced = response.headers.get("Content-Length", "")
        total = int(announced) if announced.isdecimal() else None
        hidden = not sys.stderr.isatty()
        with tqdm(
            None, title, total, leave=False, disable=hidden, unit="B", unit_scale=True, dynamic_ncols=True
        ) as bar:
            while piece := _read(response):
                out.write(piece)
                digest.update(piece)
                size += len(piece)
                bar.update(len(piece))
        out.flush()
        os.fsync(out.fileno())
    if total is not None and size != total:
        raise _FailureError(f"got {size} of {total} bytes")
    if size < least:
        raise _FailureError(f"expected at least {least} bytes of weights, got {size}")
    if not digest.hexdigest().startswith(file.sha256 or ""):
        raise _FailureError(f"expected sha256 {file.sha256}, got {digest.hexdigest()}")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request of the place that an answer points to."""
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if urlsplit(url).scheme != "https":
        raise _FailureError(f"expected https, got {url}")


def _open(url: str) -> HTTPResponse:
    _require_https(url)
    request = urllib.request.Request(url, headers={"User-Agent": "mnv2"})
    return urllib.request.build_opener(_HttpsRedirects).open(request, timeout=TIMEOUT)


def _read(response: HTTPResponse) -> bytes:
    with _network():
        return response.read(_PIECE)


@contextmanager
def _network() -> Iterator[None]:
    """What goes wrong inside is the network's fault and becomes a ``_FailureError``."""
    try:
        yield
    except HTTPError as error:
        error.close()
        raise _FailureError(f"HTTP {error.code} {_line(error.reason)}") from None
    except URLError as error:
        raise _FailureError(_line(error.reason)) from None
    except (OSError, HTTPException) as error:
        raise _FailureError(_line(error)) from None


def _line(cause: object) -> str:
    return str(cause).partition("\n")[0] or type(cause).__name__


def _put(source: Source, whole: str, path: str) -> None:
    """Give what is ``whole`` its name; where another process was faster, its download is as good."""
    try:
        os.replace(whole, path)
    except OSError:
        if not (source.is_folder and os.path.isdir(path)):
            raise
