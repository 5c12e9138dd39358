"""What an engine's processes inherit."""

import os

from formats.engine.environment import PARENT_VARIABLE, child_environment, quiet_environment


def test_engines_start_in_fresh_processes(monkeypatch):
    """On a GPU vLLM forks, after which `register` would not run and no engine would end with its owner."""
    monkeypatch.setattr("os.environ", {})
    quiet_environment(False, local=False)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    quiet_environment(False, local=False)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork", "what the user has set stays"


def test_an_engine_knows_its_owner_and_nobody_else_does():
    with child_environment(debug=False):
        assert os.environ[PARENT_VARIABLE] == str(os.getpid())
    assert PARENT_VARIABLE not in os.environ


def test_a_users_choice_of_warnings_stays(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with child_environment(debug=False):
        assert os.environ["PYTHONWARNINGS"] == "error"
    assert os.environ["PYTHONWARNINGS"] == "error", "and is not taken away at the end"
