"""A reader written from docs/format.md alone: slow, plain, and importing nothing of ours.

pyarrow opens the container and zstandard the frames; everything else is struct, loops and the math module.
"""

import base64
import hashlib
import json
import math
import struct
from pathlib import Path

import pyarrow as pa
import zstandard

BETAS = [0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
STORED_ORDER = [1.0, 0.5, 2.0, 0.25, 0.125, 0.75, 1.5]
PREDICTIONS = {
    0.5: (-42, {0.0: 32, 1.0: 32}),
    2.0: (141, {0.5: -128, 1.0: 192}),
    0.25: (0, {0.0: 20, 0.5: 60, 1.0: -18, 2.0: 2}),
    0.125: (0, {0.0: 23, 0.25: 52, 0.5: -12, 1.0: 1}),
    0.75: (0, {0.25: -12, 0.5: 46, 1.0: 32, 2.0: -2}),
    1.5: (0, {0.5: 14, 0.75: -68, 1.0: 96, 2.0: 22}),
}
WHOLE = {
    **{"sqrt_steps": (1, 16384), "linear_steps": (0, 32768), "tail_steps": (1, 256), "zstd_level": (1, 19)},
    **{"draw_rate": (0, 64), "draw_steps": (1, 1024)},
}
MANIFEST = {
    *("format", "version", "identity", "codec", "tail_betas", "positions", "min_prob", "max_k", "vocab_size"),
    *("shards", "files"),
}
SHARED = ("format", "version", "codec", "tail_betas", "positions", "max_k", "vocab_size")


def unseal(data: bytes) -> dict:
    first, rest = data.split(b"\n", 1)
    assert first == b'{"digest": "' + hashlib.sha256(rest).hexdigest().encode() + b'",'
    content = json.loads(data)
    del content["digest"]
    return content


def planes(body: bytes, at: int, count: int, width: int) -> tuple[list[int], int]:
    numbers = [sum(body[at + k * count + i] << (8 * k) for k in range(width)) for i in range(count)]
    return numbers, at + count * width


def width_of(x: int) -> int:
    return max(1, (x.bit_length() + 7) // 8)


def as_float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def signed(z: int) -> int:
    return z // 2 if z % 2 == 0 else -(z + 1) // 2


Position = tuple[dict[int, float], dict[float, float], float, list[tuple[int, float]]]


def read_payload(payload: bytes, labels: list[int], shard: dict) -> list[Position]:
    """Per position: ({token id: logprob}, {beta: A(beta)}, logprob of the label, draws (id, logprob))."""
    num_positions = len(labels)
    if num_positions == 0:
        assert payload == b""
        return []
    body = zstandard.ZstdDecompressor().decompress(payload)
    codec, vocab = shard["codec"], shard["vocab_size"]
    exact = codec["probabilities"] == "float32"
    a, b, steps = codec["sqrt_steps"], codec["linear_steps"], codec["tail_steps"]
    table = base64.b64decode(shard["ranked_ids"])
    ranked = [int.from_bytes(table[i : i + 3], "little") for i in range(0, len(table), 3)]
    id_of_rank = ranked + sorted(set(range(vocab)) - set(ranked))
    sizes, at = planes(body, 0, num_positions, width_of(shard["max_k"] - 1))
    sizes = [n + 1 for n in sizes]
    gaps, at = planes(body, at, sum(sizes), width_of(vocab - 1))
    codes, at = planes(body, at, sum(sizes), 4 if exact else 2)
    tails, at = planes(body, at, len(BETAS) * num_positions, 4 if exact else 2)
    kept, entry = [], 0
    for n in sizes:
        rank, ids = -1, []
        for gap in gaps[entry : entry + n]:
            rank += 1 + gap
            ids.append(id_of_rank[rank])
        kept.append(ids)
        entry += n
    num_unkept = sum(label not in ids for label, ids in zip(labels, kept, strict=True))
    unkept, at = planes(body, at, num_unkept, 4 if exact else 1)
    draws: list[list[tuple[int, float]]] = [[] for _ in range(num_positions)]
    if codec["draw_rate"]:
        draws, at = read_draws(body, at, num_positions, shard, id_of_rank)
    assert at == len(body)

    def prob(c: int) -> float:
        s = (math.sqrt(a * a + 4.0 * b * c) - a) / (2.0 * b) if b else c / a
        return s * s

    found, entry = [], 0
    for p, n in enumerate(sizes):
        mass, head = 0, {}
        for token in kept[p]:
            if exact:
                head[token] = as_float32(codes[entry])
            else:
                value = prob(codes[entry])
                mass += math.floor(value * 2**40 + 0.5)
                head[token] = math.log(value) if value else -math.inf
            entry += 1
        if labels[p] in head:
            label = head[labels[p]]
        else:
            number = unkept.pop(0)
            label = as_float32(number) if exact else -number / 16
        assert all(logprob <= 0.001 for logprob in (*head.values(), label))
        if exact:
            tail = {beta: as_float32(tails[k * num_positions + p]) for k, beta in enumerate(BETAS)}
            found.append((head, tail, label, draws[p]))
            continue
        left = min(max(2**40 - mass, 2**26), 2**40)
        t = {0.0: math.floor(steps * math.log(max(vocab - n, 1)) + 0.5)}
        for k, beta in enumerate(STORED_ORDER):
            difference = signed(tails[k * num_positions + p])
            if beta == 1.0:
                prediction = math.floor(steps * math.log(left / 2**40) + 0.5)
            else:
                bias, weights = PREDICTIONS[beta]
                prediction = (sum(w * t[known] for known, w in weights.items()) + bias * steps + 32) >> 6
            t[beta] = (prediction + difference + 32768) % 65536 - 32768
        empty = {beta for beta in BETAS if t[beta] == -32768 or n == vocab}
        tail = {beta: -math.inf if beta in empty else t[beta] / steps for beta in BETAS}
        found.append((head, tail, label, draws[p]))
    return found


def read_draws(
    body: bytes, at: int, num_positions: int, shard: dict, id_of_rank: list[int]
) -> tuple[list[list[tuple[int, float]]], int]:
    """The draws of every position, and where their sections end."""
    codec, vocab = shard["codec"], shard["vocab_size"]
    exact = codec["probabilities"] == "float32"
    root = next(r for r in range(1, vocab + 1) if r**4 >= vocab)
    most = codec["draw_rate"] * root + 1
    sizes, at = planes(body, at, num_positions, width_of(most))
    gaps, at = planes(body, at, sum(sizes), width_of(vocab - 1))
    stored, at = planes(body, at, sum(sizes), 4 if exact else 2)
    found, next_draw = [], 0
    for size in sizes:
        assert size <= most
        rank, drawn = 0, []
        for _ in range(size):
            rank += gaps[next_draw]
            number = stored[next_draw]
            logprob = as_float32(number) if exact else -number / codec["draw_steps"]
            assert rank < vocab and math.isfinite(logprob) and logprob <= 0.001
            drawn.append((id_of_rank[rank], logprob))
            next_draw += 1
        found.append(drawn)
    return found, at


def read_manifest(directory: Path) -> dict:
    manifest = unseal((directory / "manifest.json").read_bytes())
    version, codec = manifest["version"], manifest["codec"]
    assert manifest["format"] == "anneal-teacher-cache" and type(version) is int and version == 1
    assert set(manifest) == MANIFEST and manifest["tail_betas"] == BETAS
    assert set(codec) == {"probabilities", "rank_ids", *WHOLE}
    for key, (low, high) in WHOLE.items():
        assert type(codec[key]) is int and low <= codec[key] <= high
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
    return manifest


def read_cache(directory: Path) -> list[dict]:
    """Every row: key, input_ids, loss_mask, positions, teacher."""
    manifest = read_manifest(directory)
    rows = []
    for listed in manifest["shards"]:
        data = (directory / listed["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == listed["sha256"] and len(data) == listed["num_bytes"]
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        shard = unseal(table.schema.metadata[b"anneal"])
        assert set(shard) == {*SHARED, "rows_per_batch", "ranked_ids"}
        assert all(shard[key] == manifest[key] for key in SHARED)
        for key, ids, mask, payload in zip(*(table.column(k).to_pylist() for k in range(4)), strict=True):
            digest = hashlib.blake2b(digest_size=16, person=b"anneal-row-v1")
            digest.update(struct.pack("<Q", len(ids)) + struct.pack(f"<{len(ids)}I", *ids) + bytes(mask))
            assert digest.digest() == key
            loss = [i for i in range(len(ids) - 1) if mask[i + 1]]
            positions = list(range(len(ids) - 1)) if shard["positions"] == "all" else loss
            teacher = read_payload(payload, [ids[i + 1] for i in positions], shard)
            rows.append(
                {"key": key, "input_ids": ids, "loss_mask": mask, "positions": positions, "teacher": teacher}
            )
    return rows
