"""`compare`: several models on the same texts and tasks, what each learnt beside what it kept.

1. What can be wrong is looked for in all models before the first of them is evaluated.
2. Texts are evaluated here (`text_readings`), tasks are read from each model's bench.json (`task_readings`).
3. Models that differ in nothing but their seed become one line.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache import TeacherCache
from formats.disk.output_file import is_in_a_file
from formats.errors import ConfigError
from formats.identity.config_file import ADAPTER_FILE, is_adapter
from formats.identity.fingerprint import resolve_model
from formats.named_path import short_name
from formats.progress import Progress
from trainer.bench.model_identity import model_identity
from trainer.comparison.comparison import Comparison
from trainer.comparison.evaluation_file import EvaluationFile
from trainer.comparison.flips import count_flips, mean_flips
from trainer.comparison.intervals import paired_difference
from trainer.comparison.lines import Cell, ComparedModel
from trainer.comparison.metric import Metric, is_task
from trainer.comparison.reading import Reading
from trainer.comparison.records import groups_of, is_direct
from trainer.comparison.standing import NO_DIRECT, NO_DISTANCE, finite
from trainer.comparison.task_readings import load_results, read_task
from trainer.comparison.text_readings import open_texts, read_texts, require_readable
from trainer.evaluation.recorded_method import method_of
from trainer.loading import given_as, quiet_transformers
from trainer.result.measured import add_measured, measured_text

Words = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
Readings = dict[Metric, dict[str, Reading]]
"""Metric -> label -> reading."""


def compare(
    models: Mapping[str, str | Path],
    *,
    source: Words,
    target: Words,
    initial: Mapping[str, str | Path] | None = None,
    direct: str | None = None,
    direct_for: str = "",
    distance_for: str = "",
    group: bool = True,
    work: str | Path | None = None,
    bench: str | Path | None = None,
    bench_entries: Collection[str] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    limit: int | None = None,
    cards: bool | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Read every model's numbers on all texts and tasks, evaluating what is not known yet.

    Args:
        models: label -> model directory or hub name.
        source: what the initial model knew: a cache of held-out text, or a task of bench.json (`TASK`,
            `TASK:METRIC`, `TASK:SHOTS`); one word, several, or name -> word. A word that is no directory is a task.
        target: what the models learn, in the same way.
        initial: label -> the initial model, one entry; its line comes first and differences are to it.
        direct: label of direct fine-tuning, which shares are of; found by itself where exactly one line's record
            says so.
        direct_for: what cannot do without it, which is then refused before anything is evaluated.
        distance_for: what cannot do without a source text, in the same way.
        group: models whose records differ only in seeds are one line, mean and spread.
        work: a folder for remembered evaluations; by default each model's own directory.
        bench: the folder given as `anneal bench --out`; by default each model's own directory.
        bench_entries: keys of the results of tasks that count (`BenchEntry.key`); by default all that are there.
        dtype, device, limit: as for `evaluate`; they do not concern tasks.
        cards: tell in the cards of the models that this program made what was found on whole texts; by default where
            no `work` is given.
        progress: a phase `label: name` for each model and text; silent by default.

    Raises:
        ConfigError: no models, two equal labels, not a finished model, an unknown task, metric or `direct`, none
            for `direct_for`, a task under several settings, no source text for `distance_for`, a cache without
            tokens that carry loss.
        FormatError: a cache or bench.json is missing or broken.
        IdentityMismatchError: caches, or a model and a cache, come from different initial models; results are of
            other weights than those on disk, or under unequal settings.
    """
    progress = progress or Progress()
    if not models:
        raise ConfigError("a comparison needs at least one model, got none; name its directory")
    if work is not None and is_in_a_file(Path(work)):
        raise ConfigError(f"--work must be a folder to remember evaluations in, got {work}: Not a directory")
    known = dict(initial or {})
    for label in known:
        if label in models:
            raise ConfigError(
                f"models must have different labels, got {label!r} for --initial and MODEL; write LABEL=DIR"
            )
    given = {**known, **models}
    words = {
        (side, name): word
        for side, asked in (("source", source), ("target", target))
        for name, word in name_words(side, asked).items()
    }
    caches = open_texts({key: word for key, word in words.items() if not is_task(word)})
    if caches:
        quiet_transformers()
    directories: dict[str, Path] = {}
    for label, name in given.items():
        what = "--initial" if label in known else "MODEL"
        with given_as(what):
            directories[label] = directory = resolve_model(name)
            if not any((directory / file).is_file() for file in ("config.json", ADAPTER_FILE)):
                raise ConfigError(f"{what} must be a finished model, got no config.json in {directory}")
            if caches:
                require_readable(caches, directory, is_initial=label in known)
    identities = {label: model_identity(directory) for label, directory in directories.items()}
    weights = {label: identity["weights"] for label, identity in identities.items()}
    alone = next(iter(known), None)
    groups = (
        groups_of(directories, weights, alone=alone) if group else {label: [label] for label in directories}
    )
    named = direct is not None
    direct, notes = find_direct(direct, groups, directories, alone)
    if direct_for and direct is None:
        raise ConfigError(f"{direct_for} {NO_DIRECT}")
    if distance_for and not any(metric.side == "source" for metric in caches):
        raise ConfigError(f"{distance_for} {NO_DISTANCE}")
    readings: Readings = {}
    tasks = {key: word for key, word in words.items() if is_task(word)}
    if tasks:
        results = load_results(directories, identities, bench, bench_entries)
        for (side, name), word in tasks.items():
            metric, found = read_task(results, str(word), side=side, name=name)
            readings[metric] = found
    tells = work is None if cards is None else cards
    before: dict[Metric, float | None] = {}
    for label, directory in directories.items() if caches else ():
        with given_as("--initial" if label in known else "MODEL"):
            found_here = read_texts(
                label,
                directory,
                caches,
                EvaluationFile(directory, identities[label], label, work),
                dtype=dtype,
                device=device,
                limit=limit,
                progress=progress,
                forget=progress.note,
            )
        for metric, reading in found_here.items():
            readings.setdefault(metric, {})[label] = reading
        if label in known:
            before = {metric: reading.value for metric, reading in found_here.items()}
        elif tells and Path(given[label]).is_dir():
            _tell_in_card(directory, weights[label], found_here, caches, before)
    order = list(words)
    metrics = tuple(sorted(readings, key=lambda metric: order.index((metric.side, metric.name))))
    lines = tuple(
        _line(line, members, given, directories, metrics, readings, alone) for line, members in groups.items()
    )
    if not named:
        direct, notes = without_diverged(direct, lines, metrics, notes)
    return Comparison(metrics=metrics, models=lines, initial=alone, direct=direct, notes=tuple(notes))


def name_words(side: str, asked: Words) -> dict[str, str]:
    """Name -> word; a word without a name is called by its last part.

    Raises:
        ConfigError: none, an empty one, or two of one name.
    """
    if isinstance(asked, Mapping):
        found = {str(name): str(word) for name, word in asked.items()}
    else:
        found = {}
        for word in [asked] if isinstance(asked, str | Path) else asked:
            name = short_name(word)
            if name in found:
                raise ConfigError(f"--{side} must have different names, got {name!r} twice; write NAME=CACHE")
            found[name] = str(word)
    if not found or not all(found.values()):
        raise ConfigError(f"--{side} needs at least one cache or task, got none")
    return found


def find_direct(
    direct: str | None,
    groups: Mapping[str, Sequence[str]],
    directories: Mapping[str, Path],
    alone: str | None,
) -> tuple[str | None, list[str]]:
    """The line of direct fine-tuning, named or found, and what to say where there is none."""
    if direct is not None:
        for line, members in groups.items():
            if direct == line or direct in members:
                return line, []
        raise ConfigError(f"--direct must be one of the models, got {direct!r}; they are {', '.join(groups)}")
    methods = {line: method_of(directories[members[0]]) for line, members in groups.items() if line != alone}
    found = [line for line, method in methods.items() if is_direct(method)]
    notes = []
    if not found:
        of_some = {
            line: method for line, method in methods.items() if method and is_direct(method, of_some=True)
        }
        found = list(of_some)
        notes = [f"shares relate to {line}: {method.text()}" for line, method in of_some.items()]
    if len(found) == 1:
        return found[0], notes
    which = f"{', '.join(found)} all say so" if found else "no model's record says so"
    return None, [f"shares need direct fine-tuning to relate to ({which}); name it with --direct LABEL"]


def without_diverged(
    direct: str | None, lines: Sequence[ComparedModel], metrics: tuple[Metric, ...], notes: list[str]
) -> tuple[str | None, list[str]]:
    """The line of direct fine-tuning that was found, and the notes; none where it has diverged."""
    found = next((line for line in lines if line.label == direct), None)
    if found is None or finite(found.point(metrics), metrics):
        return direct, notes
    return None, [
        f"shares need direct fine-tuning to relate to, but {direct} has diverged; name another one with --direct LABEL"
    ]


def _line(
    label: str,
    members: Sequence[str],
    given: Mapping[str, str | Path],
    directories: Mapping[str, Path],
    metrics: Sequence[Metric],
    readings: Readings,
    initial: str | None,
) -> ComparedModel:
    cells = {}
    for metric in metrics:
        own = [readings[metric][member] for member in members]
        first = readings[metric][initial] if initial is not None and label != initial else None
        cells[metric.key] = cell_of(metric, own, first)
    return ComparedModel(
        label=label,
        members=tuple(members),
        paths=tuple(str(given[member]) for member in members),
        method=method_of(directories[members[0]]),
        cells=cells,
    )


def _tell_in_card(
    directory: Path,
    weights: str,
    found: Mapping[Metric, Reading],
    caches: Mapping[Metric, TeacherCache],
    before: dict[Metric, float | None],
) -> None:
    """Also keeps in `before` what the model before says of each text, for the models that follow."""
    texts = []
    for metric, reading in found.items():
        text = measured_text(
            metric.name,
            caches[metric],
            reading.details,
            role=metric.side,
            before=before.get(metric),
        )
        if text is not None:
            texts.append(text)
            before[metric] = text.before
    # Adapters alone have a fingerprint of their own here, and none in a record.
    add_measured(directory, texts, None if is_adapter(directory) else weights)


def cell_of(metric: Metric, own: Sequence[Reading], first: Reading | None) -> Cell:
    """The numbers of one line on one metric.

    Args:
        own: a reading per seed.
        first: the initial model's, on the same items; None without one.
    """
    scores = np.array([metric.score(reading.value) for reading in own])
    value = metric.value(float(scores.mean()))
    spread = None
    if len(own) > 1 and np.isfinite(scores).all():  # where a seed has diverged, the value says so
        spread = float(scores.std(ddof=1)) * (value if metric.logarithmic else 1.0)
    errors = [reading.stderr for reading in own if reading.stderr is not None]
    difference = flips = None
    items = [reading.items for reading in own if reading.items is not None]
    if first is not None and first.items is not None and len(items) == len(own):
        one = first.items
        average_N = np.mean([part.scores_N for part in items], axis=0)
        difference = paired_difference(one.scores_N, average_N, one.weights_N)
        if metric.kind == "task" and metric.higher_is_better:
            flips = mean_flips([count_flips(one.scores_N, p.scores_N, one.num_choices_N) for p in items])
    return Cell(
        value=value,
        spread=spread,
        stderr=sum(errors) / len(errors) if len(errors) == len(own) else None,
        difference=difference,
        flips=flips,
        details=_mean_details([reading.details for reading in own]),
    )


def _mean_details(details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers as means, whole ones as they are where all agree; what differs otherwise is left out."""
    if len(details) == 1:
        return dict(details[0])
    found: dict[str, Any] = {}
    for key, first in details[0].items():
        values = [part.get(key) for part in details]
        if all(value == first for value in values):
            found[key] = first
        elif len(numbers := [value for value in values if isinstance(value, int | float)]) == len(values):
            found[key] = sum(numbers) / len(numbers)
    return found
