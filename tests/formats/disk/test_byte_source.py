"""Addresses that cannot be opened, and servers that do not do what a reader needs, are one line."""

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from make_teachers import write_cache

from formats import TeacherCache
from formats.errors import AnnealError


@pytest.mark.parametrize("address", ["nosuch://bucket/cache", "nosuch+more://x"])
def test_an_unknown_scheme(address: str):
    with pytest.raises(AnnealError, match=rf"a URL that fsspec can open, got {address.replace('+', '.')}"):
        TeacherCache(address)


def test_a_file_where_a_cache_should_be(tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}")
    with pytest.raises(AnnealError, match=rf"a cache must be a directory, got the file {corpus}; "):
        TeacherCache(corpus)


def test_a_scheme_whose_package_is_missing(monkeypatch):
    from fsspec.registry import known_implementations

    entry = {"class": "package_that_is_not_here.FileSystem", "err": "Install package_that_is_not_here"}
    monkeypatch.setitem(known_implementations, "distant", entry)
    with pytest.raises(AnnealError, match=r"got distant://cache: Install package_that_is_not_here"):
        TeacherCache("distant://cache")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends whole files, whatever part is asked for; and refuses what is secret."""

    def do_GET(self) -> None:
        if "secret" in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    handler = partial(Handler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_without_ranges_and_one_that_refuses(tmp_path: Path, address: str):
    write_cache(tmp_path / "c", lengths=[9, 4])
    cache = TeacherCache(f"{address}/c")
    assert len(cache) == 2
    with pytest.raises(
        AnnealError, match=r"answer requests for a part of a file, got all of shard-00000\.arrow"
    ):
        cache[0]
    with pytest.raises(AnnealError, match=r"/secret must be readable, got: 403"):
        TeacherCache(f"{address}/secret")
