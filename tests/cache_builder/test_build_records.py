"""What a build says and keeps of the records: counts, the template's time, template arguments, foreign tokens."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from corpora import ANSWER, USER, write_jsonl
from tiny_models import CHAT_TEMPLATE, save_tiny_model

import cache_builder.source
from cache_builder import BuildConfig, build_cache, estimate_cache, merge_caches, plan_build
from formats.cache import TeacherCache
from formats.errors import ConfigError, CorpusError
from formats.inspect.inspect_cache import inspect_cache
from formats.progress import Progress

LONG = {"role": "user", "content": "harbour " * 40}
FOUR = [
    {"messages": [LONG, ANSWER]},
    {"messages": [USER, ANSWER]},
    {"messages": [USER, {"role": "assistant", "content": "ship " * 40}]},
    {"messages": [USER]},
    {"messages": [USER, {"role": "assistant", "content": ""}]},
]
TIMED = "{{ 'Today is ' + strftime_now('%Y-%m-%d %H:%M') + '. ' }}" + CHAT_TEMPLATE


class Told(Progress):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def config_of(tmp_path: Path, model: Path, records: list[dict[str, Any]], **options: Any) -> BuildConfig:
    return BuildConfig(
        corpus=str(write_jsonl(tmp_path / "data.jsonl", records)),
        model=str(model),
        out=str(tmp_path / "cache"),
        engine="transformers",
        **{"max_length": 32, "draw_rate": 0, **options},
    )


@pytest.fixture(scope="module")
def timed_model(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template tells the time."""
    directory = tmp_path_factory.mktemp("timed") / "model"
    shutil.copytree(tiny_llama_dir, directory)
    (directory / "chat_template.jinja").write_text(TIMED)
    return directory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what the build's clock tells."""

    def to(moment: str) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.fromisoformat(moment)

        monkeypatch.setattr(cache_builder.source, "datetime", Clock)

    return to


def text_of_row(cache: TeacherCache, index: int, tokenizer: Any) -> str:
    return str(tokenizer.decode(cache[index].input_ids.tolist()))


def test_every_lost_record_is_told_kept_and_shown(
    tmp_path: Path, tiny_llama_dir: Path, tiny_tokenizer: Any
) -> None:
    config = config_of(tmp_path, tiny_llama_dir, FOUR)
    lengths = [
        len(tiny_tokenizer.apply_chat_template(record["messages"], return_dict=False)) for record in FOUR
    ]
    cut = sum(max(0, length - 32) for length in lengths)
    assert cut > 20
    notes = [
        f"2 records truncated ({cut} tokens cut off)",
        "1 record skipped: empty text or answer",
        "2 records skipped: no token carries loss",
    ]
    line = f"records    5: {'; '.join(notes)}"
    planned = plan_build(config)
    assert line in planned.text().splitlines()
    assert planned.num_rows == 2
    told = Told()
    report = build_cache(config, told)
    assert "; ".join(notes) in told.notes
    assert line in report.text().splitlines()
    cache = TeacherCache(config.out)
    assert len(cache) == 2
    corpus = cache.identity.corpus
    assert corpus["notes"] == notes
    counts = corpus["counts"]
    names = (
        "num_records",
        "num_rows",
        "num_truncated",
        "num_truncated_tokens",
        "num_empty",
        "num_without_target",
    )
    assert [counts[name] for name in names] == [5, 2, 2, cut, 1, 2]
    shown = inspect_cache(config.out).splitlines()
    at = shown.index("records of the corpus: 5")
    assert shown[at + 1 : at + 4] == [f"  {note}" for note in notes]
    assert not any("num_truncated" in text for text in shown)
    assert json.loads(inspect_cache(config.out, as_json=True))["identity"]["corpus"]["notes"] == notes
    assert build_cache(config).was_complete  # the counts are no part of what is compared
    estimate = estimate_cache(config, rows=2, min_probs=[1e-2])
    assert line in estimate.text().splitlines()
    assert estimate.to_dict()["corpus"]["num_truncated"] == 2


def test_nothing_lost_is_told_too(tmp_path: Path, tiny_llama_dir: Path) -> None:
    config = config_of(tmp_path, tiny_llama_dir, [{"messages": [USER, ANSWER]}])
    assert "records    1: none skipped, none cut" in build_cache(config).text().splitlines()
    shown = inspect_cache(config.out).splitlines()
    assert shown[shown.index("records of the corpus: 1") + 1] == "  none skipped, none cut"


def test_a_merged_cache_keeps_the_counts_of_both(tmp_path: Path, tiny_llama_dir: Path) -> None:
    one = config_of(tmp_path, tiny_llama_dir, FOUR[1:4])
    build_cache(one)
    (tmp_path / "b").mkdir()
    other = config_of(
        tmp_path / "b", tiny_llama_dir, [{"messages": [USER, {**ANSWER, "content": "Oh"}]}, FOUR[3]]
    )
    build_cache(other)
    merge_caches([one.out, other.out], tmp_path / "both")
    corpus = TeacherCache(tmp_path / "both").identity.corpus
    assert corpus["counts"] == {"num_records": 5}
    assert corpus["notes"][-1] == f"{other.corpus}: 1 record skipped: no token carries loss"
    assert all(set(part) & {"counts", "notes"} == set() for part in corpus["merged"])


def test_the_templates_time_is_recorded_and_used_again(
    tmp_path: Path, timed_model: Path, tiny_tokenizer: Any, clock: Callable[[str], None]
) -> None:
    records = [{"messages": [USER, {**ANSWER, "content": f"Yo {n}"}]} for n in range(3)]
    config = config_of(tmp_path, timed_model, records, rows_per_shard=1)

    class Stop(Exception):
        pass

    def stop(name: str) -> None:
        if name == "committed 0":
            raise Stop

    clock("2026-02-03T04:05:06.789")
    with pytest.raises(Stop):
        build_cache(config, step=stop)
    clock("2026-02-04T00:00:00")
    assert build_cache(config).complete
    cache = TeacherCache(config.out)
    assert cache.identity.preprocessing["template_time"] == "2026-02-03T04:05:06"
    for index in range(3):
        assert text_of_row(cache, index, tiny_tokenizer).startswith("Today is 2026-02-03 04:05. <s>")
    assert build_cache(config).was_complete
    assert plan_build(config).identity.digest() == plan_build(config).identity.digest()
    assert "identity" in plan_build(config).text()
    again = build_cache(replace(config, overwrite=True))
    assert again.identity["preprocessing"]["template_time"] == "2026-02-04T00:00:00"


def test_interrupted_before_the_plan_the_time_is_kept_as_well(
    tmp_path: Path, timed_model: Path, tiny_tokenizer: Any, clock: Callable[[str], None]
) -> None:
    config = config_of(tmp_path, timed_model, [{"messages": [USER, ANSWER]}])

    class Stop(Exception):
        pass

    def stop(name: str) -> None:
        if name == "settings":
            raise Stop

    clock("2026-02-03T04:05:06")
    with pytest.raises(Stop):
        build_cache(config, step=stop)
    clock("2027-01-01T00:00:00")
    build_cache(config)
    assert text_of_row(TeacherCache(config.out), 0, tiny_tokenizer).startswith(
        "Today is 2026-02-03 04:05. <s>"
    )


def test_of_two_workers_that_begin_at_once_the_first_ones_time_holds(
    tmp_path: Path, timed_model: Path, tiny_tokenizer: Any, clock: Callable[[str], None], monkeypatch: Any
) -> None:
    """The second one has opened its source, and asked the clock, before the first one's settings are there."""
    import cache_builder.build

    config = config_of(tmp_path, timed_model, [{"messages": [USER, ANSWER]}])
    real = cache_builder.build.open_source
    opened: list[Any] = []

    def late(given: BuildConfig) -> Any:
        source = real(given)
        opened.append(source)
        if len(opened) == 1:
            clock("2026-02-03T04:05:07")
            first = real(replace(given, template_time=None))
            assert first.settings.identity != source.settings.identity
            from cache_builder.commit.build_directory import BuildDirectory

            directory = BuildDirectory(given.directory)
            directory.prepare()
            directory.settle_settings(first.settings)
        return source

    clock("2026-02-03T04:05:06")
    monkeypatch.setattr(cache_builder.build, "open_source", late)
    report = build_cache(config)
    assert report.identity["preprocessing"]["template_time"] == "2026-02-03T04:05:07"
    assert len(opened) == 2


def test_a_time_can_be_asked_for(
    tmp_path: Path, timed_model: Path, tiny_llama_dir: Path, tiny_tokenizer: Any
) -> None:
    records = [{"messages": [USER, ANSWER]}]
    config = config_of(tmp_path, timed_model, records, template_time="2024-07-26T08:00")
    build_cache(config)
    assert text_of_row(TeacherCache(config.out), 0, tiny_tokenizer).startswith(
        "Today is 2024-07-26 08:00. <s>"
    )
    with pytest.raises(
        ConfigError, match=r"--template-time: 2024-07-26T08:00:00 there, 2025-01-01T00:00:00 now"
    ):
        build_cache(replace(config, template_time="2025-01-01"))
    with pytest.raises(
        ConfigError, match="template_time needs a chat template that reads strftime_now, got none"
    ):
        plan_build(replace(config, model=str(tiny_llama_dir)))
    with pytest.raises(
        ConfigError, match="template_time must be a time such as 2026-11-25T08:00, got 'noon'"
    ):
        replace(config, template_time="noon")


def test_other_templates_have_no_time_in_their_identity(
    tmp_path: Path, tiny_llama_dir: Path, timed_model: Path
) -> None:
    for model, records in (
        (tiny_llama_dir, [{"messages": [USER, ANSWER]}]),
        (timed_model, [{"text": "abc def"}]),
    ):
        planned = plan_build(config_of(tmp_path, model, records))
        assert not {"template_time", "chat_template_kwargs"} & set(planned.identity.preprocessing)


def test_template_arguments_are_part_of_the_identity(
    tmp_path: Path, tiny_llama_dir: Path, tiny_tokenizer: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    (model / "chat_template.jinja").write_text("{{ mood | default('') }}" + CHAT_TEMPLATE)
    config = config_of(
        tmp_path, model, [{"messages": [USER, ANSWER]}], chat_template_kwargs={"mood": "calm "}
    )
    build_cache(config)
    cache = TeacherCache(config.out)
    assert cache.identity.preprocessing["chat_template_kwargs"] == {"mood": "calm "}
    assert text_of_row(cache, 0, tiny_tokenizer).startswith("calm <s>")
    with pytest.raises(ConfigError, match=r'--template-arg: \{"mood": "calm "\} there, none now'):
        build_cache(replace(config, chat_template_kwargs={}))


@pytest.mark.parametrize("layout", ["input_ids", "text", "prompt", "messages"])
def test_a_token_beyond_the_output_head_names_the_line(
    tmp_path: Path, tiny_tokenizer_dir: Path, tiny_tokenizer: Any, layout: str
) -> None:
    """The tokenizer has 1003 tokens, the model 1001 rows: the last two cannot be predicted."""
    model = save_tiny_model(tmp_path / "model", "llama", tiny_tokenizer_dir, vocab_size=1001)
    token = tiny_tokenizer.convert_ids_to_tokens(1002)
    text = tiny_tokenizer.decode([1002])
    assert tiny_tokenizer(text)["input_ids"] == [1002]
    bad: Any = {"input_ids": [7, 1002, 8]}[layout] if layout == "input_ids" else text
    good, wrong = {
        "input_ids": ({"input_ids": [7, 8]}, {"input_ids": bad}),
        "text": ({"text": "a b"}, {"text": bad}),
        "prompt": ({"prompt": "a", "completion": "b"}, {"prompt": bad, "completion": "b"}),
        "messages": ({"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, "content": bad}]}),
    }[layout]
    config = config_of(tmp_path, model, [good, wrong])
    for run in (plan_build, build_cache):
        with pytest.raises(CorpusError) as caught:
            run(config)
        assert str(caught.value) == (
            f"token ids must be from 0 to 1000 (the rows of the model's output head), got 1002 ({token}) in "
            "data.jsonl, line 2; use the tokenizer that belongs to the model"
        )
        assert not Path(config.out).exists()
