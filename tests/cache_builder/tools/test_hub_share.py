"""Push and pull through the real `huggingface_hub` client against a loopback stand-in of the Hub's file API.

What the stand-in does not imitate, the large-file storage and the permissions of the real Hub, is not tested.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from deterministic_build import SeededTeacher, contents, make_config, make_source
from hub_stand_in import HubStandIn

from cache_builder.build import build_cache
from cache_builder.tools.hub_card import CONFIG_NAME, HubError, card_of
from cache_builder.tools.hub_share import files_of, pull_cache, push_cache
from formats.cache import TeacherCache
from formats.errors import AnnealError, ConfigError

ROOT = str(Path(__file__).resolve().parents[3])
CALL = """
import json, sys
from cache_builder.tools.hub_share import pull_cache, push_cache
from formats.errors import AnnealError
name, arguments, options = sys.argv[1], *map(json.loads, sys.argv[2:])
try:
    print(json.dumps({"result": str({"push": push_cache, "pull": pull_cache}[name](*arguments, **options))}))
except AnnealError as error:
    print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""


def call(server: HubStandIn, name: str, *arguments: str, home: Path, **options: str) -> dict[str, str]:
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
        [sys.executable, "-c", CALL, name, json.dumps(arguments), json.dumps(options)],
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


def test_a_pull_brings_the_files_of_the_cache_alone(cache: Path, tmp_path: Path) -> None:
    """Files that lay beside it came along: of the repository, and of another one whose pull was interrupted."""
    out = tmp_path / "d"
    with HubStandIn() as server:
        call(server, "push", str(cache), "someone/teacher", home=tmp_path)
        server.files["someone/teacher"] |= {
            "more/huge.arrow": b"rows",
            "shard-00009.arrow": b"",
            "x.json": b"",
        }
        server.files["someone/rows"] = {"data/rows.arrow": b"rows", "README.md": b"rows"}
        server.commits["someone/rows"] = "1" * 40
        none = call(server, "pull", "someone/rows", str(out), home=tmp_path)
        assert none["error"] == "someone/rows must hold a cache, got a data set without a manifest.json"
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".pulling")]
        (tmp_path / ".d.pulling").mkdir()
        (tmp_path / ".d.pulling" / "shard-00008.arrow").write_bytes(b"of another one")
        assert call(server, "pull", "someone/teacher", str(out), home=tmp_path) == {"result": str(out)}
    found = contents(out)
    assert found.pop("README.md") and found == contents(cache)


def test_into_the_current_directory(cache: Path, tmp_path: Path, monkeypatch) -> None:
    """It cannot be replaced as a new name can: it is filled, and stays the directory that the shell is in."""
    here = tmp_path / "here"
    here.mkdir()
    before = here.stat().st_ino
    with HubStandIn() as server:
        call(server, "push", str(cache), "someone/teacher", home=tmp_path)
        monkeypatch.chdir(here)
        server.break_after = 2
        broken = call(server, "pull", "someone/teacher", ".", home=tmp_path)
        assert broken["type"] == "HubError" and os.listdir(here) == [".pulling"]
        server.break_after = None
        assert call(server, "pull", "someone/teacher", ".", home=tmp_path) == {"result": str(here)}
    assert here.stat().st_ino == before
    found = contents(here)
    assert found.pop("README.md") and found == contents(cache)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".pulling")]


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
    with pytest.raises(ConfigError, match="got the address s3://bucket/cache"):
        pull_cache("someone/teacher", "s3://bucket/cache")
    with pytest.raises(AnnealError):
        push_cache(tmp_path, "someone/teacher")
    with pytest.raises(AnnealError, match="someone/teacher"):  # the tests are offline
        pull_cache("someone/teacher", tmp_path / "d")


def front_matter(card: str) -> dict[str, Any]:
    """What the Hub reads at the top of a card."""
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def test_the_card_names_the_teacher_and_the_size(cache: Path) -> None:
    opened = TeacherCache(cache)
    card = card_of(opened, "someone/teacher")
    assert "| rows | 30 |" in card and "anneal cache pull someone/teacher DIRECTORY" in card
    assert f"| identity | {opened.identity.digest()} |" in card
    front = front_matter(card)
    assert "base_model" not in front and "huggingface.co" not in card
    assert {"knowledge-distillation", "teacher-logits", "anneal"} <= set(front["tags"])
    (config,) = front["configs"]
    assert config["data_files"] == [{"split": "train", "path": [s.name for s in opened.manifest.shards]}]


def test_datasets_opens_the_shards_by_the_card(cache: Path, tmp_path: Path) -> None:
    """`datasets` reads the card as the Hub's viewer does, and takes the cache's own shards only."""
    from datasets import load_dataset

    opened = TeacherCache(cache)
    (cache / "README.md").write_text(card_of(opened))
    (cache / "shard-00099.arrow").write_bytes(b"left behind by an earlier push")
    found = load_dataset(str(cache), cache_dir=str(tmp_path / "datasets"))
    assert list(found) == ["train"] and len(found["train"]) == len(opened) == 30
    assert len(opened.manifest.shards) == 3
    for line, row in zip(found["train"], opened, strict=True):
        assert (line["key"], line["input_ids"]) == (row.key, row.input_ids.tolist())
        assert line["loss_mask"] == row.loss_mask.tolist()


def test_a_card_that_is_there_keeps_what_others_wrote(cache: Path) -> None:
    opened = TeacherCache(cache)
    theirs = (
        "---\nlicense: apache-2.0\ntags:\n- chemistry\n- logprobs\nbase_model: other/model\nconfigs:\n"
        "- config_name: plain\n  data_files: plain.parquet\n---\n# My cache\n\nMade with care: ä.\n"
    )
    first = card_of(opened, base_model="owner/model", existing=theirs)
    front = front_matter(first)
    assert front["license"] == "apache-2.0" and front["base_model"] == ["other/model", "owner/model"]
    assert front["tags"][:2] == ["chemistry", "logprobs"] and front["tags"].count("logprobs") == 1
    assert [config["config_name"] for config in front["configs"]] == ["plain", CONFIG_NAME]
    assert first.split("---\n", 2)[2].startswith("# My cache\n\nMade with care: ä.\n\n<!--")
    # The next push replaces its own part, and that alone.
    more = first + "\n## Contact\n\nme\n"
    older = more.replace("| rows | 30 |", "| rows | 29 |").replace("shard-00001", "shard-00007")
    assert card_of(opened, base_model="owner/model", existing=older) == more
    assert card_of(opened, base_model="owner/model", existing=more) == more


@pytest.mark.parametrize("front", ["a: [", "- a\n- b", "tags: chemistry", "configs:\n  a: b"])
def test_a_card_that_cannot_be_read_is_refused(cache: Path, front: str) -> None:
    with pytest.raises(HubError, match=r"README\.md must") as refused:
        card_of(TeacherCache(cache), existing=f"---\n{front}\n---\n")
    assert "\n" not in str(refused.value)


def test_the_teacher_is_linked_where_the_hub_has_it(tmp_path: Path, monkeypatch) -> None:
    source = make_source(30)
    identity = source.settings.identity
    named = replace(identity, teacher=identity.teacher | {"name": "owner/model"})
    build_cache(
        make_config(tmp_path / "c"),
        source=replace(source, settings=replace(source.settings, identity=named)),
        make_teacher=lambda config, source: SeededTeacher(),
    )
    link = "[owner/model](https://huggingface.co/owner/model)"
    with HubStandIn() as server:

        def card() -> str:
            return server.files["someone/teacher"]["README.md"].decode()

        call(server, "push", str(tmp_path / "c"), "someone/teacher", home=tmp_path)
        assert "base_model" not in front_matter(card()) and "| teacher | owner/model |" in card()
        server.files["someone/teacher"]["README.md"] = card().encode() + b"\nMine.\n"
        server.models.add("owner/model")
        call(server, "push", str(tmp_path / "c"), "someone/teacher", home=tmp_path)
        assert front_matter(card())["base_model"] == "owner/model" and link in card()
        assert card().endswith("\nMine.\n")
        server.files["someone/teacher"]["README.md"] = b"---\na: [\n---\n"
        result = call(server, "push", str(tmp_path / "c"), "someone/teacher", home=tmp_path)
        assert result["type"] == "HubError" and "README.md" in result["error"] and "\n" not in result["error"]
        assert server.files["someone/teacher"]["README.md"] == b"---\na: [\n---\n"
        named_here = {"base_model": "else/where"}
        call(server, "push", str(tmp_path / "c"), "someone/other", home=tmp_path, **named_here)
        assert front_matter(server.files["someone/other"]["README.md"].decode())["base_model"] == "else/where"
    with pytest.raises(ConfigError, match=r"--base-model must be a name on the Hub.*got 'models'"):
        push_cache(tmp_path / "c", "someone/teacher", base_model="models")
