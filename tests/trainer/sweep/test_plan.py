"""Which runs a sweep comes to, and their names; what is refused before anything runs."""

import itertools
from pathlib import Path

import pytest
import yaml

from formats.errors import ConfigError
from trainer.sweep.config import SweepConfig, sweep_from_dict, sweep_from_options
from trainer.sweep.merges import plan_merges
from trainer.sweep.names import number_text, run_name
from trainer.sweep.plan import estimated_tokens, plan_runs

TEXTS = {"source": {"s": "S"}, "target": {"t": "T"}}
BASE = {"cache": "C", "model": "M"}


def typed(*words: str, **options) -> SweepConfig:
    """A sweep from option words such as `grid kl_coef=1,2`."""
    asked: dict[str, list[str]] = {}
    for word in words:
        option, _, value = word.partition(" ")
        asked.setdefault(option, []).append(value)
    return sweep_from_options("C", model="M", out="OUT", **TEXTS, **{**asked, **options})


def names(config: SweepConfig) -> list[str]:
    return [run.name for run in plan_runs(config)]


def test_a_grid_is_crossed_and_direct_runs_once():
    found = names(
        typed("grid kl_coef=0,0.5,4", "grid temperature=1,2", "also l2.coef=0.03,0.1", "also lora.r=16")
    )
    assert found == [
        "direct",
        *("kl_coef=0.5", "kl_coef=0.5,temperature=2", "kl_coef=4", "kl_coef=4,temperature=2"),
        *("l2.coef=0.03", "l2.coef=0.1", "lora.r=16"),
    ]  # kl_coef 0 at both temperatures is direct fine-tuning again


def test_every_and_seeds_are_crossed_with_all_runs_and_direct_is_not_repeated_per_temperature():
    config = typed(
        "grid kl_coef=1", "grid temperature=1,2", "every training.learning_rate=1e-4,3e-4", seeds="2"
    )
    runs = plan_runs(config)
    assert len(runs) == (1 + 2) * 2 * 2
    assert [run.name for run in runs if run.direct] == [
        "direct,lr=1e-4", "direct,lr=1e-4,seed=1", "direct,lr=3e-4", "direct,lr=3e-4,seed=1"
    ]  # fmt: skip
    assert "kl_coef=1,temperature=2,lr=3e-4,seed=1" in {run.name for run in runs}
    for run in runs:
        settings = run.config(Path("OUT"))
        assert settings.training["learning_rate"] in (1e-4, 3e-4) and settings.training["seed"] in (0, 1)
        assert settings.out == f"OUT/runs/{run.name}"


def test_a_base_with_a_coefficient_is_a_run_of_its_own_unless_something_else_names_one():
    base = {"base": {"cache": "c", "model": "m", "kl_coef": 2}, "source": {"a": "s"}, "target": {"b": "t"}}
    for more, expected in (
        ({}, ["direct", "kl_coef=2"]),
        ({"runs": [{"l2.coef": 0.1}]}, ["direct", "kl_coef=2", "l2.coef=0.1"]),
        ({"runs": [{"kl_coef": 4}]}, ["direct", "kl_coef=4"]),
        ({"every": {"kl_coef": [1]}}, ["direct", "kl_coef=1"]),
        ({"search": True}, ["direct"]),
    ):
        assert names(sweep_from_dict({"out": "o", **base, **more})) == expected


def test_names_do_not_depend_on_the_order_in_which_settings_are_typed():
    words = [
        "grid kl_coef=1,2",
        "grid temperature=2,4",
        "every training.weight_decay=0.1",
        "grid kl_direction=reverse",
    ]
    found = {frozenset(names(typed(*order))) for order in itertools.permutations(words)}
    assert len(found) == 1
    assert "kl_coef=1,temperature=2,kl_direction=reverse,weight_decay=0.1" in next(iter(found))


def test_more_values_leave_the_names_of_the_runs_that_are_there():
    one = names(typed("grid kl_coef=1,4"))
    rates = "every training.learning_rate=1e-5,1e-4"
    more = names(typed("grid kl_coef=1,2,4", "grid temperature=1,2", rates, seeds="3"))
    assert set(one) < set(more)


def test_an_entry_may_set_its_own_learning_rate_and_several_methods():
    with_rate = sweep_from_options(
        "C", model="M", out="OUT", **TEXTS, also=["lora.r=8 training.learning_rate=1e-3", "l2.coef=0.1 kl_coef=1"],
        every=["training.learning_rate=1e-4"],
    )  # fmt: skip
    assert names(with_rate) == ["direct,lr=1e-4", "lora.r=8,lr=0.001", "kl_coef=1,l2.coef=0.1,lr=1e-4"]


def test_the_file_and_the_options_are_one_sweep(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "base": {**BASE, "training": {"max_steps": 3}},
                "runs": [{"kl_coef": [1, 4], "temperature": 2}, {"l2": {"coef": [0.1]}}],
                "every": {"training": {"learning_rate": [1e-4]}},
                "merges": [{"method": "wise-ft", "values": [0.25, 0.5]}],
                "seeds": 2,
                **TEXTS,
            }
        )
    )
    from_file = sweep_from_options(str(file), out="OUT")
    options = typed(
        "grid kl_coef=1,4", "grid temperature=2", "also l2.coef=0.1", "every training.learning_rate=1e-4",
        "merge wise-ft:0.25,0.5", "overrides training.max_steps=3", seeds="2",
    )  # fmt: skip
    assert plan_runs(from_file) == plan_runs(options)
    assert plan_merges(from_file, plan_runs(from_file)) == plan_merges(options, plan_runs(options))
    added = sweep_from_options(str(file), out="OUT", also=["sfa.beta=0.5"])
    assert set(names(added)) - set(names(from_file)) == {
        "sfa.beta=0.5,lr=1e-4",
        "sfa.beta=0.5,lr=1e-4,seed=1",
    }


def test_replay_is_a_setting_like_others_and_its_list_is_one_value():
    replay = [{"path": "old/text", "weight": 0.1, "loss": "ce"}]
    entries = [{"caches": replay}, {"name": "mix", "caches": [replay, replay * 2]}]
    config = sweep_from_dict({"base": BASE, "out": "OUT", **TEXTS, "runs": entries})
    assert names(config) == ["direct", "caches=text-0.1-ce", "mix,caches=text-0.1-ce+text-0.1-ce"]
    share = [{"path": "x/text", "share": 0.1}]
    assert names(sweep_from_dict({"base": BASE, "out": "OUT", **TEXTS, "runs": [{"caches": share}]}))[1] == (
        "caches=text-share0.1"
    )
    assert plan_runs(config)[1].settings["caches"] == replay  # the same again under another prefix is dropped


def test_a_base_with_text_to_retain_serves_direct_fine_tuning_too():
    """Self-generated text in the base: runs without KL leave it out, and other mixed text in."""
    caches = [{"path": "self", "loss": "kl", "weight": 0.25}, {"path": "old", "loss": "ce"}]
    base = BASE | {"loss": "ce", "caches": caches}
    plain = {"base": base, "runs": [{"kl_coef": [1, 3]}, {"kl_coef": 0, "l2.coef": 0.1}], **TEXTS}
    runs = {run.name: run for run in plan_runs(sweep_from_dict({**plain, "out": "OUT"}))}
    assert list(runs) == ["direct", "kl_coef=1", "kl_coef=3", "l2.coef=0.1"]
    with pytest.raises(ConfigError, match="loss: kl would have no effect"):
        plan_runs(sweep_from_dict(plain | {"out": "OUT", "runs": [{"l2.coef": 0.1}]}))
    for name in ("direct", "l2.coef=0.1"):
        assert runs[name].settings["caches"] == caches[1:]
    assert runs["kl_coef=3"].settings["caches"] == caches
    direct, annealed = plan_runs(typed("grid kl_coef=1", "retain self:0.5"))
    assert not direct.settings.get("caches")
    assert annealed.settings["caches"] == [{"path": "self", "loss": "kl", "weight": 0.5}]


def test_a_list_of_earlier_tasks_is_one_value():
    one, two = {"coef": 10, "cache": "x/A"}, {"coef": 5, "cache": "B", "model": "M2"}
    plain = {"base": BASE, "out": "OUT", **TEXTS, "runs": [{"ewc": [one, two]}, {"ewc": [[one], [one, two]]}]}
    config = sweep_from_dict(plain)
    assert names(config) == ["direct", "ewc=A-10+B-M2-5", "ewc=A-10"]
    tasks = plan_runs(config)[1].config(Path("OUT")).ewc_tasks
    assert [(task.coef, task.cache, task.model) for task in tasks] == [(10, "x/A", None), (5, "B", "M2")]
    assert names(sweep_from_dict({**plain, "runs": [{"ewc": {"coef": [1, 2], "cache": "A"}}]})) == [
        "direct", "ewc.cache=A,ewc.coef=1", "ewc.cache=A,ewc.coef=2"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="ewc must hold settings, got 3"):
        names(sweep_from_dict({**plain, "runs": [{"ewc": 3}]}))


def test_frozen_parameters_are_a_method_and_a_list_is_one_value():
    plain = {
        "base": BASE,
        "out": "OUT",
        **TEXTS,
        "runs": [{"freeze": ["a", "b"]}, {"freeze": [["a"], ["b"]]}],
    }
    runs = plan_runs(sweep_from_dict(plain))
    assert [run.name for run in runs] == ["direct", "freeze=a+b", "freeze=a", "freeze=b"]
    assert [run.direct for run in runs] == [True, False, False, False]
    assert runs[1].config(Path("OUT")).freeze == ("a", "b")
    with pytest.raises(ConfigError, match="freeze must hold regular expressions"):
        names(sweep_from_dict({**plain, "runs": [{"freeze": "a("}]}))


def test_what_weighs_or_smooths_the_labels_is_not_direct_fine_tuning():
    plan = typed("also ce_weight=dft,none", "also label_smoothing=0.1", "merge wise-ft:0.5")
    runs = plan_runs(plan)
    assert [(run.name, run.direct) for run in runs] == [
        ("direct", True), ("ce_weight=dft", False), ("label_smoothing=0.1", False)
    ]  # fmt: skip
    assert [merge.name for merge in plan_merges(plan, runs)] == ["direct+wise-ft,alpha=0.5"]


def test_what_every_run_has_direct_fine_tuning_has_too():
    runs = plan_runs(typed("grid kl_coef=1", "every lora.r=8,16", "every training.learning_rate=1e-3"))
    assert [(run.name, run.direct) for run in runs] == [
        ("direct,lora.r=8,lr=0.001", True), ("direct,lora.r=16,lr=0.001", True),
        ("kl_coef=1,lora.r=8,lr=0.001", False), ("kl_coef=1,lora.r=16,lr=0.001", False),
    ]  # fmt: skip
    assert [run.crossed for run in runs[:2]] == [run.crossed for run in runs[2:]]
    assert runs[0].crossed != runs[1].crossed


def test_merges_of_direct_of_all_and_of_named_entries():
    plain = {"base": BASE, "out": "OUT", **TEXTS, "runs": [{"name": "hold", "l2.coef": [0.1, 1]}]}

    def merged(**entry) -> list[str]:
        config = sweep_from_dict({**plain, "merges": [entry]})
        return [merge.name for merge in plan_merges(config, plan_runs(config))]

    assert merged(method="wise-ft", values=[0.25, 0.5]) == [
        "direct+wise-ft,alpha=0.25",
        "direct+wise-ft,alpha=0.5",
    ]
    assert len(merged(method="task-arithmetic", scale=[0.5], of="all")) == 3
    assert merged(method="ties", density=[0.1], of=["hold"]) == [
        f"hold,l2.coef={coef}+ties,scale=1,density=0.1,trim=model" for coef in ("0.1", "1")
    ]
    assert merged(method="ties", trim=["model", "tensor"]) == [
        f"direct+ties,scale=1,density=0.2,trim={trim}" for trim in ("model", "tensor")
    ]
    assert merged(method="wise-ft", of=["hold,l2.coef=1"]) == ["hold,l2.coef=1+wise-ft,alpha=0.5"]
    assert merged(method="soup", of=["hold", "direct"]) == ["direct,hold+soup"]
    assert merged(method="soup", by=["V1", "x/V2"], of="all") == ["all+soup,by=V1", "all+soup,by=V2"]
    with pytest.raises(ConfigError, match=r"a soup needs at least two runs, got 1 \(direct\)"):
        merged(method="soup")
    with pytest.raises(ConfigError, match=r"got all\+soup,by=V1 twice"):
        merged(method="soup", by=["V1", "x/V1"], of="all")
    assert merged(method="soup", by=["V1", "V1"], of="all") == ["all+soup,by=V1"]
    with pytest.raises(ConfigError, match="names of entries or runs, got 'held'"):
        merged(method="wise-ft", of=["held"])


def test_a_run_named_without_its_seed_is_merged_at_every_seed():
    plan = {"base": BASE, "out": "OUT", **TEXTS, "seeds": [0, 3], "runs": [{"kl_coef": [1, 4]}]}
    config = sweep_from_dict({**plan, "merges": [{"method": "wise-ft", "of": "kl_coef=1"}]})
    runs = plan_runs(config)
    of_one = [run.name for run in runs if run.varied.get("kl_coef") == 1 and not run.direct]
    assert len(of_one) == 2
    merges = [merge.name for merge in plan_merges(config, runs)]
    assert merges == [f"{name}+wise-ft,alpha=0.5" for name in of_one]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-4, "3e-4"), (1e-05, "1e-5"), (0.25, "0.25"), (16, "16"), (1.0, "1"), (1.23e-7, "1.23e-7"), (0.01, "0.01"),
     (1e-3, "0.001"), (0.0015, "0.0015"), (2e9, "2e9"), (-0.5, "-0.5"), (0.1 + 0.2, "0.30000000000000004"),
     (1 / 3 * 1e-4, "3.3333333333333335e-5")],
)  # fmt: skip
def test_numbers_in_names_read_back(value, text):
    assert number_text(value) == text and float(text) == value


def test_names_are_safe_as_directories():
    name = run_name({"cache": "a b/../c;d é", "training.optim": "-x/.hidden"}, prefix="my run/1")
    assert not set(name) & set(" /;é'\"\\$&*?<>|\n") and not name.startswith((".", "-"))
    long = [run_name({"cache": "x" * 300, "training.seed": seed}) for seed in (1, 2)]
    assert len({*long}) == 2 and all(len(name) <= 150 for name in long)


BAD = [
    (["grid kl_cof=1"], "unknown setting kl_cof; did you mean kl_coef"),
    (
        ["every training.learning_rat=1"],
        "unknown setting training.learning_rat; did you mean training.learning_rate",
    ),
    (["grid kl_coef="], "--grid kl_coef needs values"),
    (["grid kl_coef"], "--grid takes KEY=V1,V2"),
    (["grid kl_coef=1,,2"], "must be valid YAML"),
    (["grid kl_coef=1", "grid kl_coef=2"], "--grid must name a setting once, got kl_coef twice"),
    (["grid kl_coef=strong"], "kl_coef must be a number, got 'strong'"),
    (["grid kl_coef=-1"], "kl_coef must be at least 0"),
    (
        ["every training.learning_rate=fast"],
        "run direct,lr=fast: training.learning_rate must be a number, got 'fast'",
    ),
    (["grid out=a,b"], "must not set out"),
    (["every training.seed=1,2"], "must not set training.seed: use seeds"),
    (["also temperature=2"], "temperature acts on the KL term"),
    (["also l2.strength=2"], "unknown setting l2.strength"),
    (["also ewc.coef=10"], "ewc.cache is required"),
    (["also 'lora.r=8 l2.coef=1".replace("'", "")], "l2 needs full fine-tuning"),
    (["also l2.coef='1"], "--also takes KEY=V1,V2"),
    (["merge wise:0.5"], "--merge must be one of"),
    (["merge wise-ft:2"], r"must lie in \[0, 1.5\], got 2"),
    (["merge wise-ft:scale=1"], "unknown setting merges.wise-ft.scale"),
    (["merge ties:trim=row"], "--trim must be one of model, tensor, got 'row'"),
    (["merge task-arithmetic:weights=1"], "are given model by model"),
    (["merge fisher"], "merges.method fisher needs a text per model"),
    (["merge wise-ft:half"], "must be a number, got 'half'"),
    (["overrides out=x"], "base must not set out"),
    (["overrides l2.coef=1"], "base and every must not set l2"),
    (["every sfa.beta=0.1,0.5"], "base and every must not set sfa"),
    (["overrides kl_direction=up"], "kl_direction must be one of"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words[0] for words, _ in BAD])
def test_bad_settings_are_refused(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_runs(typed(*words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": "two"}, "seeds must be a number of seeds"),
        ({"runs": {}}, "runs must be a list"),
        ({"runs": [{}]}, "must set something"),
        ({"runs": [{"kl_coef": []}]}, "kl_coef must have at least one value"),
        ({"runs": [{"l2": {}}]}, "l2 must hold settings"),
        ({"runs": [{"l2": {"coef": 1}, "l2.coef": 2}]}, "sets l2.coef twice"),
        ({"runs": [{"kl_coef": 1, "name": 3}]}, "name of an entry of runs must be a text"),
        ({"keep_gain": 1.5}, "keep_gain must be above 0 and at most 1"),
        ({"source": {}}, "source must name at least one cache or task"),
        ({"every": 3}, "every must map settings to values"),
        ({"merges": [{"of": "all"}]}, "must have a method"),
        ({"bench": {"limt": 3}}, "unknown setting bench.limt; did you mean bench.limit"),
        ({"rums": []}, "unknown setting rums; did you mean runs"),
        ({"target": None}, "a sweep needs target; give --target"),
        ({"runs": [{"cache": ["a/x", "b/x"]}]}, "must have different names, got direct,cache=x twice"),
    ],
)
def test_bad_files_are_refused(plain, message):
    with pytest.raises(ConfigError, match=message):
        plan_runs(sweep_from_dict({"base": BASE, "out": "OUT", **TEXTS, **plain}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [1, 2]", r"base must be a mapping, got \[1, 2\]"),
        ("base: text", "base must be a mapping, got 'text'"),
        ("every: 5", "every must be a mapping, got 5"),
        ("bench: [a]", r"bench must be a mapping, got \['a'\]"),
    ],
)
def test_a_file_whose_settings_are_none_is_refused(text, message, tmp_path):
    """Before options are put over them."""
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        sweep_from_options(str(tmp_path / "sweep.yaml"), out="OUT", **TEXTS)


def test_the_tokens_of_a_run_are_those_of_its_caches(llama_cache, llama_eval_cache):
    from formats.cache import TeacherCache

    rows, tokens = len(TeacherCache(llama_cache)), int(TeacherCache(llama_cache).lengths().sum())
    other = TeacherCache(llama_eval_cache)

    def estimate(**settings) -> int:
        base = {"cache": str(llama_cache), "model": "M", **settings}
        return estimated_tokens(plan_runs(sweep_from_dict({"base": base, "out": "OUT", **TEXTS}))[0])

    assert estimate(training={"num_train_epochs": 2}) == 2 * tokens
    steps = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert estimate(training=steps) == round(24 * tokens / rows)
    mixed = estimate(
        caches=[{"path": str(llama_eval_cache), "weight": 0.5}], training={"num_train_epochs": 1}
    )
    assert mixed == round(tokens + 0.5 * rows * int(other.lengths().sum()) / len(other))
    assert estimate(packing=True, pack_length=64, training=steps) == 24 * 64


def test_settings_of_a_config_file_stay_under_those_of_the_sweeps_own(tmp_path):
    """Name by name: `training:` of one file does not take the whole of the other's away."""
    train, sweep = tmp_path / "train.yaml", tmp_path / "sweep.yaml"
    train.write_text("kl_on: target\ntraining: {learning_rate: 1.0e-3, max_steps: 5}\nlora: {r: 4}\n")
    sweep.write_text("base: {cache: c, model: m, training: {max_steps: 7}, lora: {alpha: 8}}\n")
    config = sweep_from_options(str(sweep), base_file=train, out="OUT", **TEXTS)
    assert config.base["training"] == {"learning_rate": 1e-3, "max_steps": 7}
    assert config.base["lora"] == {"r": 4, "alpha": 8} and config.base["kl_on"] == "target"


def test_settings_of_the_kl_term_in_the_base_are_left_out_of_direct_fine_tuning():
    config = sweep_from_options(
        "C", model="M", out="OUT", **TEXTS, overrides=["loss=ce"], retain=["X:1"], search=True
    )
    (direct,) = plan_runs(config)
    assert direct.settings["caches"] == [] and direct.direct
    with_budget = {"base": {**BASE, "kl_budget": 0.02}, "out": "OUT", **TEXTS}
    runs = plan_runs(sweep_from_dict({**with_budget, "runs": [{"kl_coef": [1]}]}))
    assert [run.settings.get("kl_budget") for run in runs] == [None, 0.02]
    with pytest.raises(ConfigError, match="kl_budget must be above 0"):
        plan_runs(sweep_from_dict({**with_budget, "base": {**BASE, "kl_budget": -1}}))
    with pytest.raises(ConfigError, match=r"a search is .*, got kl_budget"):
        plan_runs(sweep_from_dict({**with_budget, "search": True}))
