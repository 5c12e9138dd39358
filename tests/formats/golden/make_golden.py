"""Writes the golden caches that are not there yet. Each is written once; the files are committed and must
stay readable for ever.

python tests/formats/golden/make_golden.py        never writes to one that is there
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]

CASES = {
    "compact": {
        "lengths": [9, 0, 1, 2, 44, 5, 21, 3, 8, 6],
        "vocab_size": 300,
        "positions": "loss",
        "min_prob": 0.02,
        "draw_rate": 52,
    },
    "lossless": {
        "lengths": [4, 1, 6, 13],
        "vocab_size": 12,
        "positions": "all",
        "min_prob": 0.02,
        "draw_rate": 40,
    },
    "without_draws": {"lengths": [9, 0, 1, 2, 24, 5], "vocab_size": 300, "positions": "all"},
}
STEPS = {"sqrt_steps": 240, "linear_steps": 2000, "tail_steps": 64, "draw_steps": 90}
CODECS = {
    "compact": STEPS,
    "lossless": STEPS | {"probabilities": "float32"},
    "without_draws": STEPS,
}
"""Written out, because defaults move and these caches do not. None is a default: a reader that takes the
default number of steps shows."""


def main() -> None:
    import numpy as np
    from make_teachers import by_id, write_cache

    from formats import CodecConfig
    from formats.codec.rank_table import LEAST_OCCURRENCES

    assert LEAST_OCCURRENCES == 16
    for name, case in CASES.items():
        if (HERE / name).exists():
            continue
        codec = CodecConfig(**CODECS[name])
        written = write_cache(HERE / name, codec=codec, seed=1, **case)
        expected: list[dict] = [
            {
                "input_ids": row.input_ids.tolist(),
                "loss_mask": row.loss_mask.tolist(),
                "key": row.key.hex(),
                "counts": teacher.counts.tolist(),
                "token_ids": by_id(teacher)[1].tolist(),
                "logprobs": [float(f"{x:.9g}") for x in by_id(teacher)[2]],
                "log_tail_nodes": [
                    [str(float(f"{x:.9g}")) for x in nodes] for nodes in teacher.log_tail_nodes
                ],
            }
            for row, teacher in written
        ]
        for row, (_, teacher) in zip(expected, written, strict=True):
            row["label_logprobs"] = [float(f"{x:.9g}") for x in teacher.label_logprobs]
            offsets, ids, logprobs = by_id(teacher.draws)
            row["draw_counts"] = np.diff(offsets).tolist()
            row["draw_ids"] = ids.tolist()
            row["draw_logprobs"] = [float(f"{x:.9g}") for x in logprobs]
        (HERE / f"{name}.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
