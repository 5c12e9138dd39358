"""What a user sees of a run, on stderr: a bar on a terminal, one plain line per log entry elsewhere."""

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback

SHOWN = (
    ("ce", "CE", "{:.4f}"),
    ("kl", "KL", "{:.5f}"),
    ("l2", "L2", "{:.3g}"),
    ("ewc", "EWC", "{:.3g}"),
    ("kept_mass", "kept mass", "{:.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("tokens_per_second", "tok/s", "{:,.0f}"),
    ("memory_gib", "GiB", "{:.2f}"),
)


def describe(logs: dict[str, Any], names: tuple[tuple[str, str, str], ...] = SHOWN) -> list[str]:
    """The shown entries of a log line, such as `CE 2.3456`."""
    # Adding zero turns the -0.00000 of a KL at the noise level into 0.00000.
    return [
        f"{label} {form.format(round(logs[name], 12) + 0.0)}" for name, label, form in names if name in logs
    ]


class AnnealProgress(TrainerCallback):
    """Replaces the Trainer's own bar and printer."""

    def __init__(self, stream: TextIO | None = None, bar: bool | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.use_bar = self.stream.isatty() if bar is None else bar
        self.bar: tqdm | None = None
        self._start = time.perf_counter()
        self._first_step = 0

    def say(self, text: str) -> None:
        """One line, above the bar when there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._first_step = time.perf_counter(), state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.use_bar and state.is_world_process_zero and self.bar is None:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="train", file=self.stream,
                dynamic_ncols=True,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "ce" in logs:
            # exactly 0 is the sum of no token: distillation has no cross-entropy
            parts = describe(logs if logs["ce"] else {key: logs[key] for key in logs if key != "ce"})
            if self.bar is not None:
                self.bar.set_postfix_str(", ".join(parts))
            else:
                self.say(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}{self._left(state)}")
        for key in logs:
            if key.startswith("eval_") and key.endswith("_ce"):
                self._say_evaluation(state, logs, key[: -len("_ce")])

    def _say_evaluation(self, state: Any, logs: dict[str, Any], prefix: str) -> None:
        names = ((f"{prefix}_ce", "CE", "{:.4f}"), (f"{prefix}_perplexity", "ppl", "{:.3f}"))
        parts = describe(logs, (*names, (f"{prefix}_kl", "KL", "{:.5f}")))
        self.say(f"step {state.global_step}: {prefix.replace('eval_', 'eval ', 1)}: {', '.join(parts)}")

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first_step
        if done <= 0:
            return ""
        seconds = (time.perf_counter() - self._start) / done * (state.max_steps - state.global_step)
        return f", {seconds / 60:.1f} min left"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
