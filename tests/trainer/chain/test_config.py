"""What a chain may be asked for, and what is refused in one line."""

import pytest
import yaml

from formats.errors import ConfigError
from trainer.chain.config import chain_from_dict, chain_from_options

TASK = {"train": "a", "heldout": "b"}


def asked(**changes) -> dict:
    return {"model": "base", "out": "out", "tasks": {"one": TASK, "two": TASK}, **changes}


def test_file_and_options_mean_the_same(tmp_path) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(
        yaml.safe_dump(
            asked(
                general="prose", method={"sfa": {"beta": 0.5, "period": 0.25}}, replay=0.1,
                compare=["direct"], training={"max_steps": 4}, base={"packing": True}, build={"engine": "transformers"},
            )
        )
    )  # fmt: skip
    typed = chain_from_options(
        None, tasks=["one=a,b", "two=a,b"], general=["prose"], method=["sfa.beta=0.5", "sfa.period=0.25"], replay=0.1,
        compare=["direct"], overrides=["training.max_steps=4", "packing=true"], build=["engine=transformers"],
        out="out", model="base",
    )  # fmt: skip
    assert chain_from_options(file) == typed
    assert typed.general == {"general": "prose"} and list(typed.tasks) == ["one", "two"]
    changed = chain_from_options(file, method=["sfa.beta=0.25"], out="other")
    assert changed.method == {"sfa": {"beta": 0.25, "period": 0.25}} and changed.out == "other"


def test_a_stage_may_have_a_method_of_its_own() -> None:
    config = chain_from_dict(asked(tasks={"one": {**TASK, "method": {}}, "two": TASK}, method={"kl_coef": 2}))
    assert config.method_of("one") == {} and config.method_of("two") == {"kl_coef": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "a chain needs tasks, got none"),
        ({"tasks": {"a/b": TASK}}, "letters, digits, dots and dashes"),
        ({"tasks": {"one": {"train": "a"}}}, "tasks.one needs heldout"),
        ({"tasks": {"one": {"heldout": "a"}}}, r"tasks\.one: a task needs train .* or model"),
        ({"tasks": {"one": {**TASK, "model": "m"}}}, "and not both"),
        ({"tasks": {"one": TASK, "two": {"model": "m", "heldout": "h"}}}, "got both kinds"),
        ({"tasks": {"one": {**TASK, "trian": "a"}}}, r"unknown setting tasks\.one\.trian; did you mean"),
        ({"general": {"one": "x"}}, "general must have other names than tasks, got 'one'"),
        ({"anchor": "base"}, "anchor must be one of previous, initial, got 'base'"),
        ({"replay": 1.0}, r"replay must lie in \[0, 1\), got 1"),
        ({"compare": ["single"]}, "compare must be one of direct, multitask, never-seen"),
        ({"anchor": "initial", "method": {"l2": {"coef": 1}}}, "got initial and no method with kl_coef"),
        ({"tasks": {"one": TASK}, "compare": ["never-seen"]}, "compare never-seen .* got one task"),
        ({"metric": "bleu"}, "metric must be one of ce, accuracy"),
        ({"method": {"cache": "x"}}, "method must not set cache: it is that of each task"),
        ({"base": {"training": {}}}, "base must not set training"),
        ({"base": {"packin": 1}}, r"unknown setting base\.packin; did you mean base\.packing"),
        (
            {"base": {"kl_coef": 1}},
            "base must not set kl_coef, of which controls are made too: put it into method",
        ),
        ({"tasks": {"one": {**TASK, "method": {"out": "x"}}}}, r"tasks\.one\.method must not set out"),
        ({"model": None}, "model must name the initial model"),
        ({"stages": 3}, "unknown setting stages"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chain_from_dict(asked(**changes))


def test_finished_models_take_no_training() -> None:
    tasks = {"one": {"model": "m", "heldout": "h"}}
    assert chain_from_dict({"out": "o", "tasks": tasks}).finished == 1
    with pytest.raises(ConfigError, match="replay is for stages that are trained here"):
        chain_from_dict({"out": "o", "tasks": tasks, "replay": 0.5})
    with pytest.raises(ConfigError, match="anchor is for stages that are trained here"):
        chain_from_dict({"out": "o", "tasks": tasks, "anchor": "initial"})


@pytest.mark.parametrize("word", ["law", "law=train", "=a,b", "law=,b"])
def test_a_task_on_the_command_line_has_two_texts(word: str) -> None:
    with pytest.raises(ConfigError, match="--task takes NAME=TRAIN,HELDOUT"):
        chain_from_options(None, tasks=[word], out="o", model="m")


@pytest.mark.parametrize(
    "texts", [{"general": ["a", "b"]}, {"general": ["x=a", "x=b"]}, {"tasks": ["x=a,b", "x=c,d"]}]
)
def test_no_text_takes_the_place_of_another(texts) -> None:
    with pytest.raises(ConfigError, match=r"texts must have different names, got '(general|x)' in"):
        chain_from_options(None, **{"tasks": ["one=a,b"], **texts}, out="o", model="m")
