"""What a capture costs beside the plain prefill, and beside the other ways to get teacher logprobs out of a
model.

    python benchmarks/capture.py                              # 2 cores: 61M parameters, vocabulary 32,000
    python benchmarks/capture.py --preset smoke --tokens 2000 # does it run at all
    python benchmarks/capture.py --preset 8b --dtype bfloat16 --tokens 400000 --max-length 2048 \
        --only plain capture build plain-again                # a GPU

Every position of every row is captured (the worst case: with a loss mask only selected positions are
projected). All vLLM systems run the same random model with the same engine settings on the same rows,
queued at once:

- plain: a pooling engine that returns one hidden state per row: prefill, no logits
- capture: ours, engine to TopKLogprobs in this process
- build: ours, `build_cache` to the disk: corpus, claims, encoding, fsync, manifest; without engine start
- plp: generate one token with prompt_logprobs=K, the result dropped
- plp-flat: the same with flat_logprobs=True
- transformers: forward, log_softmax and torch.topk, one row at a time

A system is timed `--repeats` times after a warm-up, and the best counts; `plain` is timed again at the end,
in a new engine, so that a change of the machine's speed shows. Rates are tokens per second on the clock.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from cache_builder import BuildConfig, TeacherConfig, VLLMTeacher, build_cache
from cache_builder.teachers.vllm_settings import platform_arguments
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow
from formats.engine.environment import child_environment, quiet_environment

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"vocab_size": 4003, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    "60m": {"vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 9},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
HEAD_DIM = {"smoke": 32, "60m": 64, "1b": 64, "8b": 128}
SYSTEMS = ("plain", "capture", "build", "plp", "plp-flat", "transformers", "plain-again")
DROWNING = 200.0
LOGIT_SPREAD = 5.0
"""Standard deviation of the logits: heads of about 40 entries at min_prob 1e-3, as a language model has on
text."""


def save_model(directory: Path, preset: str, dtype: str, seed: int) -> int:
    """A random Llama with tied embeddings and a tokenizer of one word per token; returns its parameters."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = PRESETS[preset]
    heads = sizes["hidden_size"] // HEAD_DIM[preset]
    config = LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4) if heads % 4 == 0 else heads // 2,
        head_dim=HEAD_DIM[preset],
        max_position_embeddings=4096,
        tie_word_embeddings=preset != "8b",
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(
        "cuda" if torch.cuda.is_available() else "cpu"
    ):  # eight billion numbers take a CPU minutes
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, LOGIT_SPREAD / sizes["hidden_size"] ** 0.5)
        for layer in model.model.layers:
            # With tied embeddings the input token would predict itself with certainty, were it not drowned.
            layer.mlp.down_proj.weight.mul_(DROWNING)
    model.save_pretrained(directory)
    vocabulary = {f"t{i}": i for i in range(sizes["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1").save_pretrained(directory)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    torch.cuda.empty_cache()
    return parameters


def make_rows(num_tokens: int, max_length: int, vocab_size: int, seed: int) -> list[TokenRow]:
    """Random rows of 64 to `max_length` tokens."""
    rng = np.random.default_rng(seed)
    rows: list[TokenRow] = []
    while num_tokens > 0:
        length = int(rng.integers(64, max_length + 1))
        rows.append(TokenRow(rng.integers(2, vocab_size, length), np.arange(length) > 0))
        num_tokens -= length
    return rows


def cpu_seconds() -> float:
    """Processor time that this process and its living descendants have used, spinning included."""
    import psutil

    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


class Bench:
    """The model, the rows, and the settings that all engines share."""

    def __init__(self, args: argparse.Namespace, model: Path, rows: list[TokenRow]) -> None:
        self.args, self.model, self.rows = args, str(model), rows
        self.num_tokens = sum(len(row) for row in rows)
        self.vocab_size = int(PRESETS[args.preset]["vocab_size"])
        self.engine_args: dict[str, Any] = {"max_num_seqs": 256}
        if args.batch_tokens is not None:
            self.engine_args["max_num_batched_tokens"] = args.batch_tokens
        self.notes: dict[str, Any] = {}
        self.cpu_seconds: float | None = None

    def timed(self, run: Callable[[], None]) -> float:
        """Best seconds of the repeats, after one warm-up."""
        run()
        best = self.cpu_seconds = float("inf")
        for _ in range(self.args.repeats):
            busy, began = cpu_seconds(), time.perf_counter()
            run()
            best = min(best, time.perf_counter() - began)
            self.cpu_seconds = min(self.cpu_seconds, cpu_seconds() - busy)
        return best

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[Any]:
        """A vLLM engine with the shared settings, closed afterwards."""
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        kind = settings["runner"] == "pooling"
        shared = platform_arguments(on_cpu=current_platform.is_cpu(), pooling=kind, user={})
        settings = {**shared, **settings}
        arguments = EngineArgs(
            self.model,
            dtype=self.args.dtype,
            max_model_len=self.args.max_length + 1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
            **self.engine_args,
            **settings,
        )
        with child_environment(debug=False):
            engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        try:
            yield engine
        finally:
            engine.engine_core.shutdown(timeout=2)

    def drain(self, engine: Any, params: Any) -> Any:
        """Queue all rows on the paused scheduler, release them, drop the results; returns the last one."""
        from vllm.inputs.engine import tokens_input

        engine.sleep(level=0)
        for number, row in enumerate(self.rows):
            engine.add_request(
                f"{time.monotonic_ns()}-{number}", tokens_input(row.input_ids.tolist()), params
            )
        engine.wake_up(tags=["scheduling"])
        last = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                last = output
        return last

    def plain(self) -> float:
        """Prefill without logits."""
        from vllm import PoolingParams

        with self.engine(runner="pooling", convert="embed") as engine:
            return self.timed(lambda: self.drain(engine, PoolingParams(task="embed")) and None)

    def capture(self) -> float:
        """Ours, to packed arrays in this process, with the default tail draws."""
        config = TeacherConfig(
            model=self.model,
            dtype=self.args.dtype,
            capture=CaptureSettings(positions="all", max_k=self.args.k),
            max_length=self.args.max_length + 1,
            engine_args=self.engine_args,
        )
        entries = positions = 0

        def run() -> None:
            nonlocal entries, positions
            entries = positions = 0
            for topk in teacher.prefill(self.rows):
                entries, positions = entries + topk.num_entries, positions + len(topk)

        with VLLMTeacher(config) as teacher:
            seconds = self.timed(run)
        self.notes["entries_per_position"] = round(entries / positions, 1)
        return seconds

    def build(self) -> float:
        """Ours, end to end to the disk.  One run: it counts without the start of the engine, warm-up
        included."""
        with tempfile.TemporaryDirectory() as directory:
            corpus = Path(directory) / "corpus.jsonl"
            # Twice the rows: the first pass through a fresh engine is its warm-up, which cannot be left out
            # here.
            with corpus.open("w") as file:
                for row in self.rows * 2:
                    file.write(json.dumps({"input_ids": row.input_ids.tolist()}) + "\n")
            report = build_cache(
                BuildConfig(
                    corpus=str(corpus),
                    model=self.model,
                    out=f"{directory}/cache",
                    dtype=self.args.dtype,
                    positions="all",
                    max_k=self.args.k,
                    max_length=self.args.max_length + 1,
                    engine_args=self.engine_args,
                )
            )
        self.notes["bytes_per_token"] = round(report.bytes_per_token, 1)
        return self.num_tokens / report.tokens_per_second

    def prompt_logprobs(self, flat: bool) -> float:
        """The road through `prompt_logprobs`."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self.args.k,
            flat_logprobs=flat,
            detokenize=False,
            ignore_eos=True,
        )
        with self.engine(runner="generate", max_logprobs=self.args.k) as engine:
            return self.timed(lambda: self.drain(engine, params) and None)

    def transformers(self) -> float:
        """Forward, log-softmax and top-k; no tail."""
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, self.args.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        model = model.to(device).eval()

        @torch.inference_mode()
        def run() -> None:
            for row in self.rows:
                ids = torch.from_numpy(row.input_ids.astype(np.int64)).to(device)[None]
                logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1].float(), -1)
                values, chosen = logprobs.topk(self.args.k, -1)
                values.cpu(), chosen.cpu()

        return self.timed(run)

    def run(self, system: str) -> float:
        """Seconds that a system takes for all rows."""
        if system.startswith("plp"):
            return self.prompt_logprobs(system == "plp-flat")
        return getattr(self, system.removesuffix("-again"))()


def ratio(rates: dict[str, float], top: str, bottom: str) -> float | None:
    """Rate over rate, None where one was not measured."""
    return round(rates[top] / rates[bottom], 3) if top in rates and bottom in rates else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="60m")
    parser.add_argument("--tokens", type=int, default=6000, help="tokens of all rows together")
    parser.add_argument("--max-length", type=int, default=512, help="longest row")
    parser.add_argument("--k", type=int, default=64, help="prompt_logprobs and max_k")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--batch-tokens", type=int, help="max_num_batched_tokens; default: 2048 on a CPU, vLLM's own on a GPU"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()

    import torch

    if args.batch_tokens is None and not torch.cuda.is_available():
        args.batch_tokens = 2048
    quiet_environment(debug=False, local=True)  # before the first engine: all must use the same threads
    with tempfile.TemporaryDirectory() as directory:
        num_parameters = save_model(Path(directory), args.preset, args.dtype, seed=0)
        rows = make_rows(args.tokens, args.max_length, PRESETS[args.preset]["vocab_size"], seed=0)
        bench = Bench(args, Path(directory), rows)
        print(
            f"{num_parameters / 1e6:.0f}M parameters, vocabulary {PRESETS[args.preset]['vocab_size']}, "
            f"{len(rows)} rows, {bench.num_tokens} tokens, {args.dtype}, k = {args.k}",
            file=sys.stderr,
        )
        rates: dict[str, float] = {}
        cpu: dict[str, float] = {}
        for system in SYSTEMS:
            if system not in args.only:
                continue
            print(f"  {system} ...", file=sys.stderr, flush=True)
            bench.cpu_seconds = None
            rates[system] = bench.num_tokens / bench.run(system)
            if bench.cpu_seconds is not None:
                cpu[system] = round(1e3 * bench.cpu_seconds / bench.num_tokens, 3)

    plain = max((rates[name] for name in ("plain", "plain-again") if name in rates), default=None)
    print(f"\n{'system':14}{'tokens/s':>12}{'x plain':>10}{'CPU ms/token':>15}")
    for system, rate in rates.items():
        times = rate / plain if plain else float("nan")
        print(f"{system:14}{rate:12,.0f}{times:10.2f}{cpu.get(system, float('nan')):15.2f}")
    best_plp = max((rates[name] for name in ("plp", "plp-flat") if name in rates), default=None)
    result = {
        "parameters": num_parameters,
        "tokens": bench.num_tokens,
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "only")},
        "cpu_ms_per_token": cpu,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "capture_over_plain": round(rates["capture"] / plain, 3) if plain and "capture" in rates else None,
        "build_over_plain": round(rates["build"] / plain, 3) if plain and "build" in rates else None,
        "capture_over_prompt_logprobs": (
            round(rates["capture"] / best_plp, 3) if best_plp and "capture" in rates else None
        ),
        "build_over_prompt_logprobs": (
            round(rates["build"] / best_plp, 3) if best_plp and "build" in rates else None
        ),
        "capture_over_transformers": ratio(rates, "capture", "transformers"),
        **bench.notes,
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
