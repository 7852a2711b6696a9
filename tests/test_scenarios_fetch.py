"""Downloads from a real server on this machine that breaks off, refuses ranges or sends something else."""

import gzip
import hashlib
import sys
import tarfile
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from torchvision import datasets
from torchvision.datasets import CIFAR100, DTD, MNIST

from cl_plugins.scenarios import load_data
from cl_plugins.scenarios.fetch import fetch, md5_of
from cl_plugins.scenarios.transfer_archives import archives
from tests._image_folders import write_cifar100, write_mnist
from tests.test_transfer_sets import dtd

BODY = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Sends BODY; ``breaks`` many answers end early, after ``sent`` bytes."""

    def __init__(self, plan, *args):
        self.plan = plan
        super().__init__(*args)

    def do_GET(self):
        asked = self.headers.get("Range")
        self.plan["asked"].append(asked)
        if self.path == "/gone":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.plan.get("ranges", True) else 0
        whole = self.plan.get("body", BODY)
        if start >= len(whole):
            self.send_error(416)
            return
        body = whole[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.plan.get("breaks", 0) > 0:
            self.plan["breaks"] -= 1
            body = body[: self.plan["sent"]]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *texts):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    plan = {"asked": []}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, plan)) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        plan["url"] = f"http://127.0.0.1:{running.server_port}"
        yield plan
        running.shutdown()


def test_a_whole_file_arrives_once(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    assert fetch(server["url"] + "/file", path, MD5) == path
    assert path.read_bytes() == BODY
    assert md5_of(path) == MD5
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    fetch(server["url"] + "/file", path, MD5)
    assert server["asked"] == [None]
    path.write_bytes(b"damaged")
    assert fetch(server["url"] + "/file", path, MD5).read_bytes() == BODY


def test_a_broken_connection_goes_on(server, tmp_path):
    server.update(breaks=2, sent=1_000_000)
    assert fetch(server["url"] + "/file", tmp_path / "file", MD5).read_bytes() == BODY
    assert server["asked"] == [None, "bytes=1000000-", "bytes=2000000-"]


def test_the_next_call_goes_on_where_the_last_one_failed(server, tmp_path):
    server.update(breaks=5, sent=100_000)
    with pytest.raises(ConnectionError, match=r"`download` must reach .* after 500,000 of 3,000,000 bytes; .* kept"):
        fetch(server["url"] + "/file", tmp_path / "file", MD5)
    assert (tmp_path / "file.part").stat().st_size == 500_000
    assert not (tmp_path / "file").exists()
    server["asked"].clear()
    assert fetch(server["url"] + "/file", tmp_path / "file", MD5).read_bytes() == BODY
    assert server["asked"] == ["bytes=500000-"]


def test_a_part_that_is_whole_already_is_taken(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY)
    assert fetch(server["url"] + "/file", tmp_path / "file", MD5).read_bytes() == BODY


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server["ranges"] = False
    (tmp_path / "file.part").write_bytes(BODY[:10])
    assert fetch(server["url"] + "/file", tmp_path / "file", MD5).read_bytes() == BODY


def test_something_else_is_refused_and_removed(server, tmp_path):
    with pytest.raises(ValueError, match=rf"must have the MD5 sum {'0' * 32}, got {MD5}; what arrived is removed"):
        fetch(server["url"] + "/file", tmp_path / "file", "0" * 32)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file.part").write_bytes(b"of another file")
    with pytest.raises(ValueError, match="what arrived is removed, try again"):
        fetch(server["url"] + "/file", tmp_path / "file", MD5)
    assert fetch(server["url"] + "/file", tmp_path / "file", MD5).read_bytes() == BODY


def test_what_is_not_there_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"`download` must reach .*/gone, got HTTPError: HTTP Error 404"):
        fetch(server["url"] + "/gone", tmp_path / "file", MD5)
    assert server["asked"] == [None]


@pytest.fixture
def folder_server(tmp_path, monkeypatch):
    """Serves ``tmp_path/source``."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = tmp_path / "source"
    source.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(source))) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield source, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *texts):
        pass


def test_mnist_is_fetched_from_the_mirror_that_answers(folder_server, tmp_path, monkeypatch, capfd):
    source, url = folder_server
    raw = write_mnist(tmp_path / "written") / "MNIST" / "raw"
    sums = []
    for name, _ in MNIST.resources:
        (source / name).write_bytes(gzip.compress((raw / name.removesuffix(".gz")).read_bytes()))
        sums.append((name, md5_of(source / name)))
    monkeypatch.setattr(MNIST, "resources", sums)
    monkeypatch.setattr(MNIST, "mirrors", [url + "nowhere/", url])
    data = load_data("mnist", root=str(tmp_path / "root"), download=True, size=28)
    assert np.array_equal(data.train.scans, load_data("mnist", root=str(tmp_path / "written")).train.scans)
    assert "HTTP Error 404: File not found; trying the next mirror" in capfd.readouterr().err
    for path in source.iterdir():
        path.unlink()
    load_data("mnist", root=str(tmp_path / "root"), download=True)  # is there: nothing is asked for


def test_cifar_is_fetched_and_unpacked(folder_server, tmp_path, monkeypatch):
    source, url = folder_server
    written = write_cifar100(tmp_path / "written") / "cifar-100-python"
    with tarfile.open(source / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(written, "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "url", url + "cifar-100-python.tar.gz")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5_of(source / "cifar-100-python.tar.gz"))
    for attribute, names in (("train_list", ["train"]), ("test_list", ["test"])):
        monkeypatch.setattr(CIFAR100, attribute, [[n, md5_of(written / n)] for n in names])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5_of(written / "meta")})
    root = tmp_path / "root"
    with pytest.raises(FileNotFoundError, match="pass `download=True` to get it"):
        load_data("cifar100", root=str(root))
    data = load_data("cifar100", root=str(root), download=True)
    assert (len(data.train), len(data.test)) == (600, 100)
    (source / "cifar-100-python.tar.gz").unlink()
    load_data("cifar100", root=str(root), download=True)


def test_an_interrupted_transfer_set_goes_on(server, tmp_path, monkeypatch):
    dtd(tmp_path / "source")
    archive = tmp_path / "dtd-r1.0.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "dtd" / "dtd", "dtd")
    server["body"] = archive.read_bytes()
    monkeypatch.setattr(DTD, "_URL", server["url"] + "/dtd-r1.0.1.tar.gz")
    monkeypatch.setattr(DTD, "_MD5", md5_of(archive))
    server.update(breaks=6, sent=100)
    with pytest.raises(ConnectionError, match="the next attempt goes on from there"):
        load_data("dtd", root=str(tmp_path / "there"), download=True)
    assert (tmp_path / "there" / "dtd" / "dtd-r1.0.1.tar.gz.part").stat().st_size == 500
    server["breaks"] = 0
    assert load_data("dtd", root=str(tmp_path / "there"), download=True).class_names == ("banded", "woven")
    assert server["asked"] == [None, *(f"bytes={100 * k}-" for k in range(1, 6))]
    load_data("dtd", root=str(tmp_path / "there"), download=True)
    assert len(server["asked"]) == 6  # nothing is asked for when all is there


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dtd", datasets.DTD),
        ("eurosat", datasets.EuroSAT),
        ("flowers102", datasets.Flowers102),
        ("food101", datasets.Food101),
        ("oxford-pets", datasets.OxfordIIITPet),
        ("sun397", datasets.SUN397),
    ],
)
def test_archives_lie_where_torchvision_looks(name, kind, tmp_path, monkeypatch):
    """What torchvision itself would download, to which folder and with which sum."""
    wanted = set()

    def note(url, download_root, *arguments, md5=None, **options):
        wanted.add((url.rpartition("/")[2], str(download_root), md5))

    module = sys.modules[kind.__module__]
    for function in {"download_and_extract_archive", "download_url"} & vars(module).keys():
        monkeypatch.setattr(module, function, note)
    with pytest.raises((RuntimeError, FileNotFoundError)):  # nothing has come
        kind(str(tmp_path), download=True)
    assert wanted
    assert {(u.rpartition("/")[2], str(tmp_path / f).rstrip("/"), md5) for u, f, md5 in archives(name)} == wanted


def test_sets_that_are_left_to_torchvision_have_no_archives():
    assert archives("caltech101") == archives("aircraft") == []
