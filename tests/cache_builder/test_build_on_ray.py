"""A real, local Ray: the pool divides the shards, and a killed worker costs one shard."""

import os
import signal
from pathlib import Path

import pytest
from deterministic_build import SeededTeacher, contents, make_config, make_source

from cache_builder import build_on_ray
from cache_builder.build import build_cache
from cache_builder.build_on_ray import PoolSize, WorkerDied, build_cache_with_ray
from formats.errors import ConfigError
from formats.progress import Progress

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")
ROOT = str(Path(__file__).resolve().parents[2])


class DeadlyTeacher(SeededTeacher):
    """Kills its process at the first row of a shard, as often as there are files to delete in `directory`."""

    def __init__(self, directory: str, first_key: str) -> None:
        super().__init__()
        self._directory, self._first_key = directory, first_key

    def prefill(self, rows):
        rows = list(rows)
        if rows[0].key.hex() == self._first_key:
            for life in sorted(Path(self._directory).iterdir()):
                life.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().prefill(rows)


def first_key(shard: int) -> str:
    from deterministic_build import make_rows

    return list(make_rows(60))[shard * 10].key.hex()


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.num_rows = 0

    def note(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, num_rows: int, num_tokens: int = 0) -> None:
        self.num_rows += num_rows


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, whatever the machine has; workers inherit the path to the test helpers."""
    changed = pytest.MonkeyPatch()
    changed.setenv("PYTHONPATH", f"{ROOT}:{HELPERS}")
    changed.setenv("OMP_NUM_THREADS", "1")
    changed.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()
    changed.undo()


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    build_cache(
        make_config(tmp_path / "fresh"), source=make_source(60), make_teacher=lambda c, s: SeededTeacher()
    )
    return contents(tmp_path / "fresh")


def test_a_killed_worker_costs_one_shard(cluster, expected, tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.mkdir()
    (lives / "1").touch()
    directory, key = str(lives), first_key(3)
    teacher = DeadlyTeacher
    notes = Notes()
    report = build_cache_with_ray(
        make_config(tmp_path / "c"),
        source=make_source(60),
        make_teacher=lambda config, source: teacher(directory, key),
        progress=notes,
    )
    assert report.complete and list(lives.iterdir()) == []
    assert report.num_rows_captured == notes.num_rows - 60 == 60  # tokenised once, captured once
    assert sum("a worker died on shard 3" in line for line in notes.lines) == 1
    assert contents(tmp_path / "c") == expected


def test_a_shard_that_kills_every_worker_ends_the_build_and_the_rest_stays(
    cluster, expected, tmp_path: Path, monkeypatch
) -> None:
    lives = tmp_path / "lives"
    lives.mkdir()
    for number in range(9):
        (lives / str(number)).touch()
    directory, key = str(lives), first_key(3)
    teacher = DeadlyTeacher
    monkeypatch.setattr(build_on_ray, "MAX_FAILURES", 2)
    with pytest.raises(WorkerDied, match="2 dead workers on shard 3"):
        build_cache_with_ray(
            make_config(tmp_path / "c"),
            source=make_source(60),
            make_teacher=lambda config, source: teacher(directory, key),
            num_workers=1,
        )
    assert (tmp_path / "c" / "shard-00002.arrow").exists()
    build_cache(
        make_config(tmp_path / "c"), source=make_source(60), make_teacher=lambda c, s: SeededTeacher()
    )
    assert contents(tmp_path / "c") == expected


def test_errors_of_a_worker_arrive_as_they_are(cluster, tmp_path: Path) -> None:
    def broken(config, source):
        raise ConfigError("no such setting")

    with pytest.raises(ValueError, match="no such setting"):
        build_cache_with_ray(
            make_config(tmp_path / "c"), source=make_source(60), make_teacher=broken, num_workers=1
        )


def test_a_worker_that_waits_for_room_gets_it_when_others_have_nothing_to_do(
    cluster, expected, tmp_path: Path, monkeypatch
) -> None:
    """Somebody else may hold what the cluster has: three workers for two CPUs."""
    monkeypatch.setattr(PoolSize, "of_cluster", lambda *_: PoolSize(num_workers=3))
    report = build_cache_with_ray(
        make_config(tmp_path / "c"),
        source=make_source(60),
        make_teacher=lambda config, source: SeededTeacher(),
    )
    assert report.complete and contents(tmp_path / "c") == expected


SPLIT = {"tensor_parallel_size": "2"}


@pytest.mark.parametrize(
    ("machines", "arguments", "wanted", "size"),
    [
        ([{"CPU": 8.0}], {}, None, (8, 0)),
        ([{"CPU": 8.0}], {}, 3, (3, 0)),
        ([{"CPU": 8.0, "GPU": 4.0}], {}, None, (4, 1)),
        ([{"CPU": 8.0, "GPU": 4.0}], SPLIT, None, (2, 2)),
        (
            [{"CPU": 8.0, "GPU": 4.0}],
            {"tensor-parallel-size": "2", "pipeline_parallel_size": 2},
            None,
            (1, 4),
        ),
        ([{"CPU": 8.0, "GPU": 4.0}], {}, 99, (4, 1)),
        ([{"CPU": 8.0, "GPU": 3.0}] * 2, SPLIT, None, (2, 2)),  # the third would wait for ever
        ([{"CPU": 2.0, "GPU": 8.0}, {"CPU": 64.0}], {}, None, (2, 1)),  # each takes a CPU beside its GPU
    ],
)
def test_the_size_of_the_pool(tmp_path: Path, machines, arguments, wanted, size) -> None:
    pool = PoolSize.of_cluster(machines, make_config(tmp_path, engine_args=arguments), wanted)
    assert (pool.num_workers, pool.num_gpus) == size


def test_data_parallel_engines_are_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="must not be split by data, got engine argument data_parallel_size"
    ):
        PoolSize.of_cluster(
            [{"GPU": 8.0, "CPU": 8.0}], make_config(tmp_path, engine_args={"data-parallel-size": "2"}), None
        )


@pytest.mark.parametrize("gpus", [[1.0], [1.0, 1.0], []])
def test_a_cluster_that_is_too_small(tmp_path: Path, gpus) -> None:
    """Two machines of one GPU each have no room for an engine of two."""
    with pytest.raises(ConfigError, match="room for one engine"):
        PoolSize.of_cluster(
            [{"GPU": count, "CPU": 8.0} for count in gpus], make_config(tmp_path, engine_args=SPLIT), None
        )
