"""Downloads from a server on loopback that knows ranges, from one that does not, and from files."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from splitlearn.data import DATASETS, Dataset, File, Source, download, load

CONTENT = bytes(range(256)) * 3000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content`` at the paths in ``there``, and keeps what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.there = {"/toy/data.bin"}
        self.ranges = True
        self.break_after: int | None = None
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers GET, with a Range where the server knows ranges."""

    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        content, start = self.server.content, 0
        if self.path not in self.server.there:
            self.send_error(404)
            return
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.break_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        offered(monkeypatch, File("toy/data.bin", DIGEST, f"{running.url}/toy/data.bin"))
        yield running
        running.shutdown()
        thread.join()


def offered(monkeypatch: pytest.MonkeyPatch, *files: File) -> None:
    """Put a data set ``toy`` of these files into the catalogue."""

    def loaded(*paths: Path) -> Dataset:
        raise AssertionError(f"{paths} are not for loading")

    monkeypatch.setitem(DATASETS, "toy", Source("a toy", (1, 1, 1), "none", loaded, files))


def test_a_file_arrives_whole_with_progress_and_is_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    paths = download("toy", data_dir=tmp_path / "new", progress=lambda done, total: seen.append((done, total)))
    assert paths == [tmp_path / "new" / "toy" / "data.bin"]
    assert paths[0].read_bytes() == CONTENT
    assert [path.name for path in paths[0].parent.iterdir()] == ["data.bin"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert download("toy", data_dir=tmp_path / "new") == paths
    assert len(server.asked) == 1


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.break_after = 300_000
    with pytest.raises(LookupError, match=f"broke off after 300000 of {len(CONTENT)} bytes.*run it again"):
        download("toy", data_dir=tmp_path)
    assert (tmp_path / "toy" / "data.bin.part").stat().st_size == 300_000
    server.break_after = None
    [path] = download("toy", data_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=300000-"]


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "data.bin.part").write_bytes(CONTENT[:5000])
    [path] = download("toy", data_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/toy/data.bin", "bytes=5000-")]


def test_a_part_that_is_too_long_begins_anew_and_a_whole_one_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    part = tmp_path / "toy" / "data.bin.part"
    part.write_bytes(CONTENT + b"more")
    [path] = download("toy", data_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert len(server.asked) == 2
    path.rename(part)
    assert download("toy", data_dir=tmp_path)[0].read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize("part", [b"", b"another file's beginning"])
def test_a_wrong_digest_is_an_error_and_leaves_nothing(server: Server, tmp_path: Path, part: bytes) -> None:
    server.content = CONTENT if part else b"something else"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "data.bin.part").write_bytes(part)
    with pytest.raises(
        ValueError, match=f"expected a file of sha256 {DIGEST}, got [0-9a-f]{{64}}; the partial copy .*part was removed"
    ):
        download("toy", data_dir=tmp_path)
    assert list((tmp_path / "toy").iterdir()) == []


def test_a_corrupt_file_in_place_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "data.bin").write_bytes(b"corrupt")
    assert download("toy", data_dir=tmp_path)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("layout", ["toy/data.bin", "data.bin"])
@pytest.mark.parametrize("end", ["", "/", "/data.bin"])
def test_a_mirror_is_the_file_or_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, end: str) -> None:
    offered(monkeypatch, File("toy/data.bin", DIGEST))
    mirror = tmp_path / "a mirror" / layout
    mirror.parent.mkdir(parents=True)
    mirror.write_bytes(CONTENT)
    base = mirror.parent if end == "/data.bin" else tmp_path / "a mirror"
    [path] = download("toy", data_dir=tmp_path / "here", url=f"file://{base}{end}")
    assert path == tmp_path / "here" / "toy" / "data.bin"
    assert path.read_bytes() == CONTENT


def test_a_mirror_over_http_by_name_alone(server: Server, tmp_path: Path) -> None:
    server.there = {"/flat/data.bin"}
    [path] = download("toy", data_dir=tmp_path, url=f"{server.url}/flat")
    assert path.read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["/flat/toy/data.bin", "/flat/data.bin"]


def test_a_mirror_may_hold_the_packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, File("toy/data", "0" * 64, "https://nowhere.invalid/data", packed_sha256=DIGEST))
    (tmp_path / "data.gz").write_bytes(CONTENT)
    expected = [tmp_path / "here" / "toy" / "data.gz"]
    assert download("toy", data_dir=tmp_path / "here", url=f"file://{tmp_path}") == expected
    assert download("toy", data_dir=tmp_path / "here") == expected  # in place already


def test_what_cannot_be_had_says_what_to_do(server: Server, tmp_path: Path) -> None:
    server.there = set()
    with pytest.raises(LookupError, match=re.escape(f"found no toy/data.bin at {server.url}/toy/data.bin")):
        download("toy", data_dir=tmp_path)
    with pytest.raises(LookupError, match=r"found no toy/data.bin at file:.*name another address with --url"):
        download("toy", data_dir=tmp_path, url=f"file://{tmp_path}/nothing")
    with pytest.raises(LookupError, match=r"could not fetch http://127.0.0.1:9/.*name a mirror with --url"):
        download("toy", data_dir=tmp_path, url="http://127.0.0.1:9/")
    with pytest.raises(LookupError, match=r"could not fetch http://127.0.0.1:port/"):
        download("toy", data_dir=tmp_path, url="http://127.0.0.1:port/")
    for address in ("ftp://127.0.0.1/x", "toy/data.bin", "data:,x"):
        with pytest.raises(ValueError, match="begins https://, http:// or file://"):
            download("toy", data_dir=tmp_path, url=address)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the folder .*choose another --data-dir"):
        download("toy", data_dir=tmp_path / "file")


def test_derived_files_need_a_mirror_and_embedded_ones_nothing(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"ecg/mitbih_beats.npz of 'mitbih' has no official address.*--url"):
        download("mitbih", data_dir=tmp_path)
    assert download("digits", data_dir=tmp_path) == []
    with pytest.raises(LookupError, match="near it: digits"):
        download("digit", data_dir=tmp_path)


def test_a_real_mirror_feeds_the_loader(tmp_path: Path, real_data: Path) -> None:
    assert len(download("adult", data_dir=tmp_path, url=f"file://{real_data}")) == 2
    assert len(download("trec", data_dir=tmp_path, url=f"file://{real_data}/text")) == 2
    assert len(load("trec", data_dir=tmp_path)) == 5952
