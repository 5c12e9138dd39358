"""Settings: where they come from, which wins, and what is refused."""

from pathlib import Path

import pytest

from formats.errors import ConfigError
from trainer.config import LoraSettings, MixedCache, TrainConfig
from trainer.config_file import config_from_dict, load_config, save_config
from trainer.plain_yaml import parse_yaml
from trainer.recipe import resolve_training

BASE = {"cache": "c", "model": "m", "out": "o"}


def test_yaml_then_flags_then_set(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "cache: from-yaml\nmodel: m\nkl_coef: 3\ntemperature: 2\n"
        "training:\n  learning_rate: 1e-6\n  num_train_epochs: 5\n"
        "lora: {r: 8}\ncaches:\n- path: replay\n  weight: 0.2\n  loss: ce\n"
    )
    config = load_config(
        path,
        flags={"cache": "from-flag", "out": "o", "kl_coef": None, "temperature": 4.0},
        overrides=["training.learning_rate=2e-5", "caches.0.weight=0.5", "lora.alpha=16", "temperature=1"],
    )
    assert config.cache == "from-flag" and config.kl_coef == 3 and config.temperature == 1
    assert config.training == {"learning_rate": 2e-5, "num_train_epochs": 5}
    assert config.lora == LoraSettings(r=8, alpha=16)
    assert config.caches == (MixedCache(path="replay", weight=0.5, loss="ce"),)


def test_text_to_retain_comes_beside_the_caches_of_file_and_set(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("caches: [{path: replay, weight: 0.2, loss: ce}]")
    config = load_config(
        path, flags=BASE, overrides=["caches.0.weight=0.5"], retain=["runs/self", "a:b:0.5", "runs:7/self"]
    )
    assert config.caches == (
        MixedCache(path="replay", weight=0.5, loss="ce"),
        MixedCache(path="runs/self", weight=0.25, loss="kl"),
        MixedCache(path="a:b", weight=0.5, loss="kl"),
        MixedCache(path="runs:7/self", weight=0.25, loss="kl"),
    )
    with pytest.raises(ConfigError, match=r"caches.weight must be at least 0, got -1"):
        load_config(flags=BASE, retain=["self:-1"])
    with pytest.raises(ConfigError, match=r"caches must be a list for --retain to add to, got 'replay'"):
        load_config(flags=BASE, overrides=["caches=replay"], retain=["self"])


def test_the_resolved_settings_make_the_same_run(tmp_path):
    config = load_config(
        flags=BASE, overrides=["lora.target_modules=[q_proj, v_proj]", "eval_caches.prose=p"]
    )
    save_config(config.to_dict(), tmp_path / "anneal.yaml")
    assert load_config(tmp_path / "anneal.yaml") == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("5E-06", 5e-6), ("-1e3", -1000.0), ("3", 3), (".5", 0.5), ("true", True),
     ("'1e-5'", "1e-5"),
     ("[a, 2]", ["a", 2]), ("null", None), ("1e5x", "1e5x"), ("2026", 2026),
     ("no", "no"), ("on", "on"), ("False", False),
     ("010", 10), ("0x1F", 31), ("-3", -3), (".5e-3", 5e-4), ("1:30", "1:30"), ("1_000", "1_000"),
     ("0b1", "0b1"), ("2026-11-28", "2026-11-28"), ("=", "="), ("0o17", 15)],
)  # fmt: skip
def test_values_mean_what_they_look_like(text, value):
    found = parse_yaml(text, "a value")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["1e5", "010", "1:30", "no", "2026-11-28", "0o17", "true", "1_0", "null", ""]
)
def test_a_text_that_looks_like_something_else_comes_back_as_it_was(text, tmp_path):
    save_config({"cache": text, text: 1}, tmp_path / "anneal.yaml")
    assert parse_yaml((tmp_path / "anneal.yaml").read_text(), "a file") == {"cache": text, text: 1}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (
            "training: {seed: 1}\nkl_coef: 2\ntraining: {max_steps: 3}",
            "line 3, column 1: training stands twice",
        ),
        ("{training: {seed: 1, seed: 2}}", "column 22: seed stands twice; keep one of them"),
        ("runs: [{kl_coef: 1, 'kl_coef': 4}]", "kl_coef stands twice"),
        ("{1: a, 01: b}", "01 stands twice"),
    ],
)
def test_no_key_of_two_is_dropped(text, place):
    with pytest.raises(ConfigError, match=place):
        parse_yaml(text, "run.yaml")


def test_a_key_over_a_merged_one_is_no_second():
    text = "a: &base {kl_coef: 1, loss: ce}\nb: {<<: *base, kl_coef: 2}"
    assert parse_yaml(text, "run.yaml")["b"] == {"kl_coef": 2, "loss": "ce"}


@pytest.mark.parametrize("text", ["!!int x", "a: !!float x", "1" * 5000, "[" * 5000])
def test_a_value_that_cannot_be_read_is_one_line(text):
    with pytest.raises(ConfigError, match=r"run.yaml must be valid YAML") as refused:
        parse_yaml(text, "run.yaml")
    assert "\n" not in str(refused.value)


def test_yaml_cannot_construct_objects():
    with pytest.raises(ConfigError, match="valid YAML"):
        parse_yaml("!!python/object/apply:os.system ['true']", "a file")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kl_coeff=2"], "unknown setting kl_coeff; did you mean kl_coef?"),
        (["learning_rate=1e-5"], "unknown setting learning_rate; did you mean training.learning_rate?"),
        (["lora.rank=2"], "unknown setting lora.rank"),
        (["kl_coef=-0.1"], "kl_coef must be at least 0, got -0.1"),
        (["kl_coef=much"], "kl_coef must be a number, got 'much'"),
        (["kl_coef=.nan"], "kl_coef must be a number"),
        (["kl_coef=true"], "kl_coef must be a number, got True"),
        (["temperature=0"], "temperature must be at least 0.5"),
        (["temperature=-1"], "temperature must be at least 0.5"),
        (["kl_direction=sideways"], "kl_direction must be one of forward, reverse, got 'sideways'"),
        (["loss_kernel=cuda"], "loss_kernel must be one of auto, torch, triton, got 'cuda'"),
        (["packing=maybe"], "packing must be true or false, got 'maybe'"),
        (["pack_length=64"], "pack_length needs packing"),
        (["dtype=float8"], "dtype must be one of"),
        (["step0_rows=0"], "step0_rows must be at least 1"),
        (["lora.dropout=1"], "lora.dropout must be below 1"),
        (
            ["lora.merge=false", "save_dtype=bfloat16"],
            "save_dtype is of whole models, got bfloat16 with lora.merge: false",
        ),
        (["caches=[{path: a, weight: -1}]"], "caches.weight must be at least 0"),
        (["caches=[{path: a, loss: mse}]"], "caches.loss must be one of both, ce, kl"),
        (["caches=[{pth: a}]"], "unknown setting caches.pth; did you mean caches.path?"),
        (["training=5"], "training must be a mapping"),
        (["eval_caches.a=5"], "eval_caches.a must name a cache directory"),
        (["kl_coef"], "--set takes KEY=VALUE"),
        (["kl_coef=["], "the value of --set kl_coef must be valid YAML"),
        (["kl_coef.x=1", "kl_coef.x.y=2"], "is a plain value"),
        (["cache="], "cache is required; give the CACHE argument"),
        (["model=null"], "model is required; give --model"),
        (["out=s3://bucket/m"], "--out must be a directory on this machine, got the address s3://bucket/m"),
    ],
)
def test_bad_settings_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(flags=BASE, overrides=overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "valid YAML"),
        ("- 1", "must hold a mapping"),
        ("kl_coef: 1\n  bad: 2", "line 2"),
        ("\x00", "valid YAML"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="readable YAML file"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_alone_are_float32(merge):
    for dtype in ("same", "float32", *(["bfloat16"] if merge else [])):
        overrides = [f"lora.merge={merge}", f"save_dtype={dtype}"]
        assert load_config(flags=BASE, overrides=overrides).save_dtype == dtype


def test_training_names_are_those_of_transformers():
    from trainer.recipe import DEFAULTS, resolve_training, training_arguments

    resolved = resolve_training(config_from_dict(BASE))
    assert resolved.items() >= DEFAULTS.items()
    given = config_from_dict({**BASE, "training": {"num_train_epochs": 1, "lr_scheduler_type": "linear"}})
    arguments = training_arguments(resolve_training(given), Path("o"))
    assert arguments.num_train_epochs == 1 and arguments.lr_scheduler_type == "linear"
    assert arguments.learning_rate == 1e-5 and arguments.remove_unused_columns is False


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rat": 1}, "unknown setting training.learning_rat; did you mean training.learning_rate?"),
        ({"output_dir": "x"}, "training.output_dir is not available here: use --out"),
        ({"label_smoothing_factor": 0.1}, "use label_smoothing, without"),
        ({"train_sampling_strategy": "group_by_length"}, "use group_by_length: true"),
        ({"eval_strategy": "steps"}, "needs eval_caches"),
        ({"lr_scheduler_type": "zigzag"}, "training.lr_scheduler_type must be one of linear, cosine"),
    ],
)
def test_bad_training_arguments_are_refused_in_one_line(training, message):
    from trainer.recipe import resolve_training, training_arguments

    with pytest.raises(ConfigError) as error:
        training_arguments(resolve_training(config_from_dict({**BASE, "training": training})), Path("o"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_cannot_be_changed_afterwards():
    config = TrainConfig(**BASE)
    with pytest.raises(AttributeError):
        config.kl_coef = 2.0  # type: ignore[misc]


def test_the_papers_recipe_is_valid():
    """examples/paper.yaml: batch 128 of 2048 tokens, 5 epochs, cosine, 5 % warm-up, 5e-6."""
    from trainer.recipe import resolve_training

    path = Path(__file__).parents[2] / "examples" / "paper.yaml"
    config = load_config(path, flags=BASE)
    training = resolve_training(config)
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 128
    rows_per_step = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert config.packing and rows_per_step * config.pack_length == 262_144
    assert (training["num_train_epochs"], training["learning_rate"]) == (5, 5e-6)
    assert (training["lr_scheduler_type"], training["warmup_steps"]) == ("cosine", 0.05)


def test_the_example_of_retention_methods_is_valid(tmp_path):
    path = Path(__file__).parents[2] / "examples" / "retention.yaml"
    config = load_config(path, flags=BASE, overrides=["ewc.num_rows=8"])
    assert (config.l2.coef, config.ewc.num_rows, config.ewc.labels, config.sfa.period) == (
        0.1,
        8,
        "sampled",
        0.25,
    )
    save_config(config.to_dict(), tmp_path / "anneal.yaml")
    assert load_config(tmp_path / "anneal.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature=1e308", r"temperature must be a number of at most 1.70141e\+38, got 1e\+308"),
        ("l2.coef=1e300", r"l2.coef must be a number of at most"),
        ("caches=[{path: a, weight: 1e308}]", r"caches.weight must be a number of at most"),
        (
            "lora.r=9223372036854775808",
            "lora.r must be an integer of at most 9223372036854775807, got 9223372036854775808",
        ),
        ("training.max_steps=9223372036854775808", r"training.max_steps must be an integer of at most"),
        ('cache="a\\0b"', r"cache must name a cache directory, .*, got 'a\\x00b'"),
        ('out="a\\0b"', r"out must name the directory for the result \(--out\), got 'a\\x00b'"),
        (
            "eval_caches={2024: a}",
            r"eval_caches must have names that are a line of text, got 2024; quote a number",
        ),
        ("eval_caches={'': a}", r"eval_caches must have names that are a line of text, got ''"),
        ("eval_caches={null: a}", r"eval_caches must have names that are a line of text, got None"),
        ('eval_caches={"a\\nb": a}', r"eval_caches must have names that are a line of text, got 'a\\nb'"),
    ],
)
def test_what_no_computation_or_table_takes_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message) as refused:
        resolve_training(load_config(flags=BASE, overrides=[override]))
    assert "\n" not in str(refused.value)
