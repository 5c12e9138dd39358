"""Push and pull through the real `huggingface_hub` client against a loopback stand-in of the Hub's file API.

What the stand-in does not imitate, the large-file storage and the permissions of the real Hub, is not tested.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deterministic_build import SeededTeacher, contents, make_config, make_source
from hub_stand_in import HubStandIn

from cache_builder.build import build_cache
from cache_builder.tools.hub_share import card_of, files_of, pull_cache, push_cache
from formats.cache import TeacherCache
from formats.errors import AnnealError, ConfigError

ROOT = str(Path(__file__).resolve().parents[3])
CALL = """
import json, sys
from cache_builder.tools.hub_share import pull_cache, push_cache
from formats.errors import AnnealError
name, arguments = sys.argv[1], json.loads(sys.argv[2])
try:
    print(json.dumps({"result": str({"push": push_cache, "pull": pull_cache}[name](*arguments))}))
except AnnealError as error:
    print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""


def call(server: HubStandIn, name: str, *arguments: str, home: Path) -> dict[str, str]:
    """In a process of its own: the client reads its settings when it is imported, and our tests are
    offline."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": ROOT,
    }
    result = subprocess.run(
        [sys.executable, "-c", CALL, name, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    build_cache(
        make_config(tmp_path / "c"),
        source=make_source(30),
        make_teacher=lambda config, source: SeededTeacher(),
    )
    return tmp_path / "c"


def test_there_and_back(cache: Path, tmp_path: Path) -> None:
    (cache / "notes of mine.txt").write_text("private")
    with HubStandIn() as server:
        pushed = call(server, "push", str(cache), "someone/teacher", home=tmp_path)
        assert pushed["result"].startswith(f"{server.url}/datasets/someone/teacher/commit/")
        assert set(server.files["someone/teacher"]) == {*files_of(TeacherCache(cache)), "README.md"}
        # Pushing again is one more commit, not an error.
        assert "result" in call(server, "push", str(cache), "someone/teacher", home=tmp_path)
        pulled = call(server, "pull", "someone/teacher", str(tmp_path / "there" / "d"), home=tmp_path)
        assert pulled == {"result": str(tmp_path / "there" / "d")}
    expected = contents(cache)
    del expected["notes of mine.txt"]
    found = contents(tmp_path / "there" / "d")
    assert found.pop("README.md") and found == expected
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["d"]
    TeacherCache(tmp_path / "there" / "d").validate(full=True)


def test_a_broken_download_is_one_line_and_continues(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    with HubStandIn() as server:
        call(server, "push", str(cache), "someone/teacher", home=tmp_path)
        server.break_after = 2
        broken = call(server, "pull", "someone/teacher", str(out), home=tmp_path)
        assert broken["type"] == "HubError" and "\n" not in broken["error"] and not out.exists()
        server.break_after = None
        assert call(server, "pull", "someone/teacher", str(out), home=tmp_path) == {"result": str(out)}
    TeacherCache(out).validate(full=True)


def test_a_damaged_repository_is_not_handed_out(cache: Path, tmp_path: Path) -> None:
    with HubStandIn() as server:
        call(server, "push", str(cache), "someone/teacher", home=tmp_path)
        files = server.files["someone/teacher"]
        data = bytearray(files["shard-00001.arrow"])
        data[len(data) // 2] ^= 1
        files["shard-00001.arrow"] = bytes(data)
        result = call(server, "pull", "someone/teacher", str(tmp_path / "d"), home=tmp_path)
        assert "shard-00001.arrow" in result["error"] and not (tmp_path / "d").exists()


def test_what_does_not_exist(cache: Path, tmp_path: Path) -> None:
    with HubStandIn() as server:
        result = call(server, "pull", "someone/nothing", str(tmp_path / "d"), home=tmp_path)
        assert result["type"] == "HubError" and "someone/nothing" in result["error"]
        assert "\n" not in result["error"] and not (tmp_path / "d").exists()
        damaged = cache / "shard-00001.arrow"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        result = call(server, "push", str(cache), "someone/teacher", home=tmp_path)
        assert "shard-00001.arrow" in result["error"] and server.requests.count("POST /api/repos/create") == 0


def test_calls_that_need_no_hub(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="new or empty"):
        pull_cache("someone/teacher", cache)
    with pytest.raises(AnnealError):
        push_cache(tmp_path, "someone/teacher")
    with pytest.raises(AnnealError, match="someone/teacher"):  # the tests are offline
        pull_cache("someone/teacher", tmp_path / "d")


def test_the_card_names_the_teacher_and_the_size(cache: Path) -> None:
    card = card_of(TeacherCache(cache))
    assert card.startswith("---\n") and "| rows | 30 |" in card and "anneal cache pull" in card
