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
    "compact": {"lengths": [9, 0, 1, 2, 44, 5, 21, 3, 8, 6], "vocab_size": 300, "positions": "loss"},
    "lossless": {"lengths": [4, 1, 6], "vocab_size": 12, "positions": "all"},
    "moments": {
        "lengths": [9, 0, 1, 2, 24, 5, 3, 7, 14, 6],
        "vocab_size": 60,
        "positions": "loss",
        "min_prob": 0.02,
    },
    "moments_lossless": {"lengths": [4, 1, 6], "vocab_size": 12, "positions": "all", "min_prob": 0.02},
    "draws": {
        "lengths": [9, 0, 1, 2, 24, 5, 3, 6, 4],
        "vocab_size": 300,
        "positions": "loss",
        "min_prob": 0.02,
        "draw_rate": 52,
    },
    "draws_lossless": {
        "lengths": [4, 1, 6],
        "vocab_size": 12,
        "positions": "all",
        "min_prob": 0.02,
        "draw_rate": 40,
    },
}
NUM_FEATURES = {"moments": 5, "moments_lossless": 3, "draws": 2}
"""Caches with a `draw_rate` are of version 3, others with features of version 2, the rest of version 1."""
FIRST = {"sqrt_steps": 240, "linear_steps": 2000, "tail_steps": 64}
SECOND = {"sqrt_steps": 560, "linear_steps": 1800, "tail_steps": 256, "moment_steps": 1000}
CODECS = {
    "compact": FIRST,
    "lossless": FIRST | {"probabilities": "float32"},
    "moments": SECOND,
    "moments_lossless": SECOND | {"probabilities": "float32"},
    "draws": SECOND | {"draw_steps": 90},
    "draws_lossless": SECOND | {"draw_steps": 90, "probabilities": "float32"},
}
"""Written out, because defaults move and these caches do not. Moments in thousandths and draws in ninetieths:
a reader that takes the default number of steps shows."""


def main() -> None:
    import numpy as np
    from make_teachers import by_id, plain_features, write_cache

    from formats import CodecConfig
    from formats.codec.rank_table import LEAST_OCCURRENCES

    assert LEAST_OCCURRENCES == 16
    for name, case in CASES.items():
        if (HERE / name).exists():
            continue
        num_features = NUM_FEATURES.get(name, 0)
        features = plain_features(case["vocab_size"], num_features) if num_features else None
        codec = CodecConfig(**CODECS[name])
        written = write_cache(HERE / name, codec=codec, seed=1, features=features, **case)
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
            if num_features:
                row["tail_moments"] = [[float(f"{x:.9g}") for x in one] for one in teacher.tail_moments]
            if "draw_rate" in case:
                offsets, ids, logprobs = by_id(teacher.draws)
                row["draw_counts"] = np.diff(offsets).tolist()
                row["draw_ids"] = ids.tolist()
                row["draw_logprobs"] = [float(f"{x:.9g}") for x in logprobs]
        (HERE / f"{name}.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
