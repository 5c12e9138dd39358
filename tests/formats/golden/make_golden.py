"""Writes the golden caches of format version 1. Run once; the files are committed and must stay readable
for ever.

python tests/formats/golden/make_golden.py        refuses to overwrite
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]

CASES = {
    "compact": {"lengths": [9, 0, 1, 2, 44, 5, 21, 3, 8, 6], "vocab_size": 300, "positions": "loss"},
    "lossless": {"lengths": [4, 1, 6], "vocab_size": 12, "positions": "all"},
}


def main() -> None:
    from make_teachers import by_id, write_cache

    from formats.codec import CodecConfig
    from formats.vocabulary import LEAST_OCCURRENCES

    assert LEAST_OCCURRENCES == 16
    for name, case in CASES.items():
        codec = CodecConfig.lossless() if name == "lossless" else CodecConfig()
        written = write_cache(HERE / name, codec=codec, seed=1, **case)
        expected = [
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
        (HERE / f"{name}.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
