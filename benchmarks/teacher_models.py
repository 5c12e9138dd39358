"""Three teachers, and for each the same model 10 and 100 fine-tuning steps later.

    tiny    examples/tiny-base: V = 4,096, 3.4 million parameters, trained on prose; fine-tuned on code
    scratch V = 16,000 (its own tokenizer), 3 million parameters, trained here from nothing for minutes on prose
            and code of the standard library (small_model.py), so it is very uncertain; fine-tuned on code
    real    SmolLM2-135M-Instruct: V = 49,152, a chat model of the field (examples/real/make_model.py);
            fine-tuned on news (examples/real/texts.py)

Fine-tuning is AdamW at a constant rate over steps of 512 tokens: 3e-4 for the small models, 1e-4 for the real
one. The text on which gradients are compared is held out, and of the kind the fine-tuning text is, since that
is where KL is applied. Everything is seeded. Models and students are kept in the work folder and made once.

    python benchmarks/teacher_models.py --work WORK [--teachers tiny scratch real] [--real-model DIR]
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "real")]

STOPS = (10, 100)
ROW_TOKENS = 512
NUM_TRAIN_BATCHES = 20
SCRATCH_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """What makes a teacher and its students."""

    what: str
    """For the head of a table."""
    learning_rate: float
    """Of the fine-tuning that makes the students."""
    batch: tuple[int, int]
    """Rows and tokens per row of a fine-tuning step."""
    texts: Callable[[str], Iterable[str]]
    """Documents of "train" or "heldout"."""


def _code(split: str) -> Iterable[str]:
    from stdlib_text import documents  # type: ignore[import-not-found]

    for document in documents("code", f"target-{split}", max_bytes=4_000_000):
        yield document.text


def _news(split: str) -> Iterable[str]:
    from texts import documents  # type: ignore[import-not-found]

    return documents("news", split)  # type: ignore[no-any-return]


TEACHERS: dict[str, TeacherSpec] = {
    "tiny": TeacherSpec(what="tiny-base, V = 4,096, code", learning_rate=3e-4, batch=(4, 128), texts=_code),
    "scratch": TeacherSpec(
        what="trained for minutes, V = 16,000, code", learning_rate=3e-4, batch=(4, 128), texts=_code
    ),
    "real": TeacherSpec(
        what="SmolLM2-135M-Instruct, V = 49,152, news", learning_rate=1e-4, batch=(2, 256), texts=_news
    ),
}


@dataclass(frozen=True)
class Subject:
    """One teacher, ready to be measured. R rows, S tokens of a row."""

    name: str
    model_dir: Path
    held_out_RS: torch.Tensor
    """Token ids."""
    work: Path

    def teacher(self) -> Any:
        """The initial model, float32, evaluating."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32).eval()

    def student(self, steps: int) -> Any:
        """The same after so many steps of fine-tuning."""
        model = self.teacher()
        model.load_state_dict(torch.load(self._student_file(steps), weights_only=True))
        return model

    def _student_file(self, steps: int) -> Path:
        return self.work / f"{self.name}-{steps}.pt"

    def make_students(self, stops: Iterable[int]) -> None:
        """Fine-tune to every stop that is not there yet."""
        stops = sorted(stops)
        if all(self._student_file(stop).exists() for stop in stops):
            return
        spec = TEACHERS[self.name]
        torch.manual_seed(0)
        model = self.teacher().train()
        rows, length = spec.batch
        batches = token_rows(self.model_dir, spec.texts("train"), length, NUM_TRAIN_BATCHES * rows)
        batches = batches.reshape(NUM_TRAIN_BATCHES, rows, length)
        optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate)
        begin = time.time()
        for step in range(max(stops)):
            ids = batches[step % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            if step % 10 == 9:
                seconds = time.time() - begin
                print(
                    f"{self.name}: {step + 1} steps, loss {loss.item():.3f}, {seconds:.0f} s", file=sys.stderr
                )
            if step + 1 in stops:
                state = {name: value for name, value in model.state_dict().items()}
                torch.save(copy.deepcopy(state), self._student_file(step + 1))


def token_rows(model_dir: Path, texts: Iterable[str], length: int, num_rows: int) -> torch.Tensor:
    """int64 [num_rows, length]: documents end to end, each cut into whole rows where it is long enough, and
    the rest joined over their boundaries.

    Raises:
        ValueError: there is too little text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.no_truncation()
    found: list[list[int]] = []
    left: list[int] = []
    for text in texts:
        left += tokenizer.encode(text[: 40 * length]).ids
        while len(left) >= length:
            found.append(left[:length])
            left = left[length:]
        if len(found) >= num_rows:
            return torch.tensor(found[:num_rows])
    raise ValueError(f"{num_rows} rows of {length} tokens need more text, got {len(found)} rows")


def prepare(
    name: str, work: Path, num_rows: int, stops: Iterable[int] = STOPS, real_model: Path | None = None
) -> Subject:
    """A teacher with its students and so many held-out rows of `ROW_TOKENS` tokens; makes what is missing."""
    work.mkdir(parents=True, exist_ok=True)
    if name == "tiny":
        model_dir = ROOT / "examples" / "tiny-base"
    elif name == "real":
        model_dir = real_model or work / "smollm2"
        if real_model is None:
            from make_model import make_model  # type: ignore[import-not-found]

            make_model(model_dir)
    else:
        model_dir = work / "scratch"
        if not (model_dir / "config.json").is_file():
            from small_model import train_teacher

            train_teacher(model_dir, SCRATCH_STEPS)
    held_out = token_rows(model_dir, TEACHERS[name].texts("heldout"), ROW_TOKENS, num_rows)
    subject = Subject(name, model_dir, held_out, work)
    subject.make_students(stops)
    return subject


def main() -> None:
    """Make them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and students")
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--real-model", type=Path, help="a directory that make_model.py made")
    args = parser.parse_args()
    for name in args.teachers:
        subject = prepare(name, args.work, 1, real_model=args.real_model)
        print(f"{name}: {subject.model_dir}, students in {args.work}")


if __name__ == "__main__":
    main()
