"""The weights folder, and downloads into it from a made-up network under urllib."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import socket
import sys
import urllib.request
from dataclasses import dataclass, field, replace
from email.message import Message
from urllib.error import URLError
from urllib.response import addinfourl

import pytest

from mnv2 import download
from mnv2.errors import InputError, RunError
from mnv2.registry import SOURCES, by_file_name, sources

NAME = "mobilenetv2_0.35-b2e15951.pth"
LEAST = 4 * 1_677_128  # bytes of the parameters of alpha 0.35 in fp32


@dataclass
class Answer:
    """What the network says to a URL: an error to raise, or a status, headers and a body read in pieces of ``piece``.

    ``during`` is called once, before the second piece.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    announced: bool = True
    piece: int = 1 << 20
    error: BaseException | None = None
    during: object = None


class Body(io.RawIOBase):
    def __init__(self, answer):
        self.rest, self.answer, self.reads = io.BytesIO(answer.body), answer, 0

    def read(self, size=-1):
        self.reads += 1
        if self.reads == 2 and self.answer.during is not None:
            self.answer.during()
        return self.rest.read(min(size, self.answer.piece))


class Network(dict):
    """Answers by URL; ``asked`` are the URLs that were asked for."""

    def __init__(self):
        self.asked = []

    def answer(self, request):
        assert request.timeout == download.TIMEOUT
        url = request.full_url
        self.asked.append(url)
        answer = self[url]
        if answer.error is not None:
            raise answer.error
        headers = Message()
        length = {"Content-Length": str(len(answer.body))} if answer.announced else {}
        for name, value in (length | answer.headers).items():
            headers[name] = value
        response = addinfourl(Body(answer), headers, url, answer.status)
        response.msg = {200: "OK", 302: "Found", 404: "Not Found"}[answer.status]
        return response


@pytest.fixture
def network(monkeypatch):
    """The only network that there is."""

    def refuse(handler, request):
        raise AssertionError(f"{request.full_url} was asked for without https")

    network = Network()
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", lambda handler, request: network.answer(request))
    for handler, name in (("HTTPHandler", "http_open"), ("FTPHandler", "ftp_open"), ("FileHandler", "file_open")):
        monkeypatch.setattr(getattr(urllib.request, handler), name, refuse)
    return network


@pytest.fixture(scope="module")
def body() -> bytes:
    return random.Random(1).randbytes(LEAST + 5000)


@pytest.fixture
def source(body):
    """A file with the checksum of ``body``, whose first digits are known."""
    published = by_file_name(NAME)
    return replace(published, files=(replace(published.files[0], sha256=hashlib.sha256(body).hexdigest()[:8]),))


@pytest.fixture
def hub(body):
    """A folder of three files, the checksum of the last known."""
    published = by_file_name("mobilenet_v2_0.35_96")
    return replace(
        published, files=(*published.files[:2], replace(published.weights, sha256=hashlib.sha256(body).hexdigest()))
    )


def answers_of_hub(network, hub, weights):
    settings, processor, file = hub.files
    network |= {settings.url: Answer(b"{}"), processor.url: Answer(b'{"size": 1}'), file.url: weights}


def touched(path):
    path.touch()
    return path


def mode(path) -> int:
    return os.stat(path).st_mode


def left(folder) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


@pytest.mark.parametrize("known", ["whole", "first digits", "nothing"])
@pytest.mark.parametrize("announced", [True, False])
def test_a_download_is_what_was_published(network, source, body, tmp_path, known, announced):
    digest = {"whole": hashlib.sha256(body).hexdigest(), "first digits": source.weights.sha256, "nothing": None}[known]
    source = replace(source, files=(replace(source.weights, sha256=digest),))
    network[source.weights.url] = Answer(body, announced=announced, piece=70_001)
    folder = tmp_path / "new" / "weights"
    path = download.fetch(source, str(folder))
    assert path == str(folder / NAME)
    assert (folder / NAME).read_bytes() == body
    assert left(folder) == [NAME]
    assert mode(folder / NAME) == mode(touched(tmp_path / "own"))
    assert download.fetch(source, str(folder)) == path
    assert network.asked == [source.weights.url]


def test_a_redirection_is_followed(network, source, body, tmp_path):
    elsewhere = "https://cdn.example/blob?signature=1"
    network[source.weights.url] = Answer(status=302, headers={"Location": elsewhere})
    network[elsewhere] = Answer(body)
    download.fetch(source, str(tmp_path))
    assert (tmp_path / NAME).read_bytes() == body
    assert network.asked == [source.weights.url, elsewhere]


PAGE = b"<html>sorry</html>"
FAILURES = {
    "no network": (
        lambda body: Answer(error=URLError(socket.gaierror(-2, "Name or service not known"))),
        r"\[Errno -2\] Name or service not known",
    ),
    "no answer": (lambda body: Answer(error=URLError(TimeoutError("timed out"))), "timed out"),
    "reset": (lambda body: Answer(error=ConnectionResetError(104, "Connection reset by peer")), "Connection reset"),
    "404": (lambda body: Answer(PAGE, status=404), "HTTP 404 Not Found"),
    "http": (
        lambda body: Answer(status=302, headers={"Location": "http://elsewhere.example/x"}),
        "expected https, got http://elsewhere.example/x",
    ),
    "file": (lambda body: Answer(status=302, headers={"Location": "file:///etc/passwd"}), "HTTP 302 .*not allowed"),
    "loop": (lambda body: Answer(status=302, headers={"Location": by_file_name(NAME).weights.url}), "HTTP 302 .*loop"),
    "stall": (lambda body: Answer(body, during=raising(TimeoutError("The read operation timed out"))), "timed out"),
    "cut off": (lambda body: Answer(body[:-1], headers={"Content-Length": str(len(body))}), r"got \d+ of \d+ bytes"),
    "cut off unannounced": (lambda body: Answer(body[:-1], announced=False), "expected sha256 .*, got [0-9a-f]{64}"),
    "another": (lambda body: Answer(body[:-1] + b"\0"), "expected sha256 .*, got [0-9a-f]{64}"),
    "page": (lambda body: Answer(PAGE), f"expected at least {LEAST} bytes of weights, got {len(PAGE)}"),
    "nothing": (lambda body: Answer(b""), f"expected at least {LEAST} bytes of weights, got 0"),
}


def raising(error):
    def during():
        raise error

    return during


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(network, source, body, tmp_path, name):
    make, words = FAILURES[name]
    network[source.weights.url] = make(body)
    with pytest.raises(RunError, match=words) as caught:
        download.fetch(source, str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"can't download {source.weights.url} (")
    assert message.endswith(f"; put it by hand at {tmp_path / NAME}")
    assert "\n" not in message
    assert left(tmp_path) == []


def test_a_page_is_no_file_of_weights_where_no_checksum_is_known(network, tmp_path):
    source = by_file_name("mobilenet_v2_0.35_96.ckpt")
    network[source.weights.url] = Answer(PAGE, announced=False)
    with pytest.raises(RunError, match="expected at least"):
        download.fetch(source, str(tmp_path))
    assert left(tmp_path) == []


def test_ctrl_c_leaves_nothing(network, source, body, tmp_path):
    seen = []

    def during():
        seen.extend(left(tmp_path))
        raise KeyboardInterrupt

    network[source.weights.url] = Answer(body, during=during)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(source, str(tmp_path))
    assert left(tmp_path) == []
    # What a killed process leaves, which can clean nothing up, bears no name that anybody looks for.
    assert [name.startswith(f".{NAME}.") for name in seen] == [True]
    assert all(by_file_name(name) is None for name in seen)


@pytest.mark.parametrize("when", ["writing", "syncing"])
def test_a_full_disk_is_one_line(network, source, body, tmp_path, monkeypatch, when):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullFile(io.FileIO):
        def write(self, piece):
            raise full

    if when == "writing":
        monkeypatch.setattr(download, "open", lambda path, mode: FullFile(path, mode), raising=False)
    else:
        monkeypatch.setattr(os, "fsync", lambda file: raising(full)())
    network[source.weights.url] = Answer(body)
    with pytest.raises(RunError) as caught:
        download.fetch(source, str(tmp_path))
    assert str(caught.value) == f"can't write {tmp_path / NAME}: No space left on device"
    assert left(tmp_path) == []


def test_a_folder_that_is_none_is_one_line(network, source, tmp_path):
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(RunError, match=f"can't write {tmp_path}/weights/{NAME}: "):
        download.fetch(source, str(tmp_path / "weights"))
    assert network.asked == []


def test_a_folder_is_put_in_place_whole(network, hub, body, tmp_path):
    seen = []
    answers_of_hub(network, hub, Answer(body, during=lambda: seen.extend(left(tmp_path))))
    path = download.fetch(hub, str(tmp_path))
    assert path == str(tmp_path / "mobilenet_v2_0.35_96")
    assert left(path) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert (tmp_path / "mobilenet_v2_0.35_96" / "model.safetensors").read_bytes() == body
    assert len(seen) == 1
    assert seen[0].startswith(".mobilenet_v2_0.35_96.")
    assert left(tmp_path) == ["mobilenet_v2_0.35_96"]
    (tmp_path / "own").mkdir()
    assert mode(path) == mode(tmp_path / "own")
    assert download.fetch(hub, str(tmp_path)) == path
    assert len(network.asked) == 3


def test_a_folder_without_its_weights_is_no_folder(network, hub, tmp_path):
    answers_of_hub(network, hub, Answer(PAGE, status=404))
    with pytest.raises(RunError) as caught:
        download.fetch(hub, str(tmp_path))
    parent = hub.weights.url.removesuffix("model.safetensors")
    assert str(caught.value) == (
        f"can't download {hub.weights.url} (HTTP 404 Not Found); by hand put config.json, preprocessor_config.json and "
        f"model.safetensors from {parent} into the folder {tmp_path}/mobilenet_v2_0.35_96"
    )
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", ["source", "hub"])
def test_two_downloads_at_once_do_not_harm_each_other(network, request, body, tmp_path, kind):
    source = request.getfixturevalue(kind)
    second = []

    def during():
        if not second:
            second.append("asked")
            second.append(download.fetch(source, str(tmp_path)))

    if kind == "hub":
        answers_of_hub(network, source, Answer(body, during=during))
    else:
        network[source.weights.url] = Answer(body, during=during)
    path = download.fetch(source, str(tmp_path))
    assert second == ["asked", path]
    assert left(tmp_path) == [source.name]
    weights = os.path.join(path, source.weights.name) if source.is_folder else path
    with open(weights, "rb") as file:
        assert file.read() == body


@pytest.mark.parametrize("kind", ["source", "hub"])
@pytest.mark.parametrize("content", [b"another", None], ids=["another", "missing"])
def test_what_is_there_under_the_name_is_checked_and_kept(network, request, tmp_path, kind, content):
    source = request.getfixturevalue(kind)
    path = tmp_path / source.name
    if content is None:
        if kind == "source":
            path.symlink_to(tmp_path / "nowhere")
        else:
            path.mkdir()
        words = "can't read .*: No such file or directory; without .* it is downloaded anew"
    else:
        if kind == "hub":
            path.mkdir()
        (path / source.weights.name if kind == "hub" else path).write_bytes(content)
        words = f"is not {source.origin}'s: expected sha256 {source.weights.sha256}, got [0-9a-f]{{64}}; without it"
    before = left(tmp_path)
    with pytest.raises(InputError, match=words):
        download.fetch(source, str(tmp_path))
    assert left(tmp_path) == before
    assert network.asked == []


def test_a_url_without_https_is_not_asked_for(network, source, tmp_path):
    source = replace(source, files=(replace(source.weights, url="http://example.org/x.pth"),))
    with pytest.raises(
        RunError, match="can't download http://example.org/x.pth .expected https, got http://example.org"
    ):
        download.fetch(source, str(tmp_path))


def test_what_mnv2_cannot_read_is_not_downloaded(network, tmp_path):
    tarball = by_file_name("mobilenet_v2_0.75_192.tgz")
    with pytest.raises(InputError, match="mobilenet_v2_0.75_192.tgz must be converted first, by .*transformers 4"):
        download.fetch(tarball, str(tmp_path))
    assert left(tmp_path) == network.asked == []


def test_a_bar_is_for_terminals(network, source, body, tmp_path, monkeypatch, capsys):
    network[source.weights.url] = Answer(body)
    download.fetch(source, str(tmp_path / "quiet"))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    download.fetch(source, str(tmp_path / "terminal"))
    out, err = capsys.readouterr()
    assert out == ""
    assert NAME in err
    assert "6.71M" in err


def test_the_weights_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("MNV2_WEIGHTS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert download.weights_folder() == "/home/ann/.cache/mnv2"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert download.weights_folder() == "/cache/mnv2"
    monkeypatch.setenv("MNV2_WEIGHTS", "/weights")
    assert download.weights_folder() == "/weights"
    assert download.weights_folder("here") == "here"


def test_files_are_found_in_order_of_preference(tmp_path):
    folder = str(tmp_path)
    assert download.find_file(1.0, 224, folder) is None
    assert download.find_file(1.0, 224, folder + "/missing") is None
    names = [source.name for source in sources(1.0, 224) if source.conversion is None]
    (tmp_path / "mobilenet_v2_1.0_224.tgz").touch()  # can't be read
    (tmp_path / ".mobilenet_v2-b0353104.pth.k1ll3d.writing").mkdir()
    for name in reversed(names):
        assert download.find_file(1.0, 224, folder) in (None, *(str(tmp_path / later) for later in names))
        (tmp_path / name).touch()
        assert download.find_file(1.0, 224, folder) == str(tmp_path / name)
    assert download.find_file(1.0, 224, folder, "keras").endswith("kernels_1.0_224.h5")
    assert download.find_file(1.0, 224, folder, "d-li14") == str(tmp_path / "mobilenetv2-c5e733a8.pth")
    assert download.find_file(1.0, 224, folder, "tf-slim") is None
    assert download.find_file(0.75, 224, folder) is None
    own = tmp_path / "mobilenetv2_1.0_224.safetensors"
    own.touch()
    assert download.find_file(1, 224, folder) == str(own)
    assert download.find_file(1.0, 224, folder, "timm") == str(tmp_path / "mobilenetv2_100.ra_in1k.safetensors")
    (tmp_path / "mobilenetv2_0.6_64.safetensors").touch()
    assert download.find_file(0.6, 64, folder) == str(tmp_path / "mobilenetv2_0.6_64.safetensors")


def test_who_is_offline_learns_what_to_put_where():
    message = download.offline_message(0.75, 192, "/weights", "no network")
    assert message == (
        "no weights of alpha 0.75 at 192 px in /weights (no network); put there "
        "https://download.mindspore.cn/vision/classification/mobilenet_v2_0.75_192.ckpt (mindspore, top-1 69.2%) or "
        "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
        "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.75_192.h5 (keras, top-1 68.7%, needs h5py), or name with "
        f"--pretrained FILE what was trained at 224 px, {by_file_name('mobilenetv2_0.75-dace9791.pth').weights.url} "
        "(d-li14, top-1 69.952%)"
    )
    folder = download.offline_message(0.35, 96, "/weights", "not downloaded")
    assert "put there config.json, preprocessor_config.json and model.safetensors from https://hugg" in folder
    assert "/ in a folder mobilenet_v2_0.35_96 (transformers, top-1 45.5%) or " in folder
    other = download.offline_message(1.3, 96, "/weights", "not downloaded")
    assert "; name with --pretrained FILE what was trained at 224 px, https://download.mindspore.cn/" in other
    none = download.offline_message(0.6, 224, "/weights", "not downloaded")
    assert none.endswith(
        "; none are published of this alpha, but of 1.4, 1.3, 1.0, 0.75, 0.5, 0.35, 0.25: name a file of yours with "
        "--pretrained FILE"
    )
    for source in SOURCES:
        line = download.offline_message(source.alpha, source.resize, "/weights", "x")
        assert "\n" not in line
        assert len(line) < 800
