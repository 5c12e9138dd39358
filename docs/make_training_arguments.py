"""Write docs/training-arguments.md from the table in trainer/preflight/arguments.py.

python docs/make_training_arguments.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Every name of TrainingArguments

`--set training.NAME=VALUE`, or `training:` in a `--config` file, takes the names of `transformers.TrainingArguments`
unchanged. Nothing is ignored: a name is passed on, set by us (another value is refused), or refused, each in one line
before anything is written. A value that would have no effect beside the others is refused too: `eval_steps` without an
`eval_strategy`, `adam_beta1` with `optim: sgd`.

**run** marks what decides what the steps compute. An interrupted run continues only with the same values; the others
may change between a run and its continuation.

| name | here | run | |
|---|---|---|---|
"""


def page() -> str:
    """The page as text."""
    sys.path.insert(0, str(ROOT))
    from trainer.preflight.arguments import ARGUMENTS
    from trainer.preflight.continuation import COUNTED

    lines = []
    for name, argument in ARGUMENTS.items():
        run = "yes" if argument.decides else "by number" if name in COUNTED else ""
        note = argument.note.replace("|", "\\|")
        lines.append(f"| `{name}` | {argument.handling} | {run} | {note} |\n")
    return HEAD + "".join(lines)


def main() -> None:
    (ROOT / "docs" / "training-arguments.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
