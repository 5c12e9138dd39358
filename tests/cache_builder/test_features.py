"""Token features against numpy's eigenvectors, from checkpoints as people publish them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache_builder.reduction import features as features_module
from cache_builder.reduction.features import INPUT_NAMES, OUTPUT_NAMES, find_embedding, token_features
from formats.errors import ConfigError, FormatError
from formats.logprobs.features import FEATURE_UNIT, MAX_CODE, TokenFeatures

VOCAB_SIZE, WIDTH, NUM_FEATURES = 2003, 24, 6


def clear_spectrum(num_rows: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    """float64 [V, D]: every direction has two thirds of the deviation of the one before; the mean is not 0.

    The first row lies far out, as some tokens of real models do.
    """
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    rows = rng.normal(size=(num_rows, WIDTH)) * 1.5 ** -np.arange(WIDTH)
    rows[0] *= 5
    return torch.from_numpy(rows @ directions.T + rng.normal(size=WIDTH))


def save(directory: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    """One file of weights; a tensor that sorts first makes sure that offsets matter."""
    directory.mkdir(exist_ok=True, parents=True)
    content = {"a_norm.weight": torch.full((7,), 9.0, dtype=torch.float64), **tensors}
    save_file({key: value.contiguous() for key, value in content.items()}, directory / name)
    return directory


def features_of(
    directory: Path, vocab_size: int = VOCAB_SIZE, num_features: int = NUM_FEATURES
) -> TokenFeatures:
    embedding = find_embedding(directory, vocab_size)
    assert embedding is not None
    return token_features(embedding, vocab_size, num_features)


def expected_features(rows_VD: np.ndarray, num_features: int = NUM_FEATURES) -> np.ndarray:
    """[V, F]: all eigenvectors of the whole covariance at once, no power iteration, no slices."""
    centred = rows_VD - rows_VD.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    best = np.argsort(-values)[:num_features]
    vectors = vectors[:, best]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(num_features)])
    return centred @ vectors * signs / np.sqrt(values[best])


def correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[F]: of each feature of one with the same feature of the other; the sign counts."""
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(one.T, other.T, strict=True)])


@pytest.mark.parametrize("rows_per_slice", [300, 8192])
def test_equal_the_principal_components(tmp_path: Path, monkeypatch, rows_per_slice: int) -> None:
    monkeypatch.setattr(features_module, "SLICE_ROWS", rows_per_slice)
    rows = clear_spectrum()
    found = features_of(save(tmp_path, {"lm_head.weight": rows}))
    expected = expected_features(rows.numpy())
    assert (found.vocab_size, found.num_features) == (VOCAB_SIZE, NUM_FEATURES)
    # Half a step of rounding and nothing else; what lies beyond the last code is cut off.
    steps = np.clip(expected * FEATURE_UNIT, -MAX_CODE, MAX_CODE)
    assert np.abs(found.codes - steps).max() < 0.5 + 1e-4
    assert (np.abs(expected * FEATURE_UNIT) > MAX_CODE).any(), "nothing was cut off: the case is untested"
    values = found.of(np.arange(VOCAB_SIZE))
    assert correlations(values, steps).min() > 0.9999
    np.testing.assert_allclose(values.var(0), 1.0, atol=0.03)
    np.testing.assert_allclose(values.mean(0), 0.0, atol=0.01)
    mixed = np.abs(np.corrcoef(values.T) - np.eye(NUM_FEATURES))
    assert mixed.max() < 0.03, "different features say different things"


def test_the_largest_weight_of_a_direction_is_positive(tmp_path: Path) -> None:
    """A checkpoint and its mirror image have the same directions, hence opposite features."""
    rows = clear_spectrum()
    plain = features_of(save(tmp_path / "plain", {"lm_head.weight": rows})).codes
    mirrored = features_of(save(tmp_path / "mirrored", {"lm_head.weight": -rows})).codes
    np.testing.assert_array_equal(mirrored, -plain)


def test_padded_rows_are_ignored(tmp_path: Path) -> None:
    rows = clear_spectrum()
    padded = torch.cat([rows, torch.full((61, WIDTH), 1e4, dtype=torch.float64)])
    padded[-1] = torch.nan
    one = features_of(save(tmp_path / "plain", {"lm_head.weight": rows}))
    other = features_of(save(tmp_path / "padded", {"lm_head.weight": padded}))
    assert one.to_bytes() == other.to_bytes()


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.float32, 0.99999), (torch.float16, 0.9999), (torch.bfloat16, 0.999)],
)
def test_the_type_of_the_checkpoint_hardly_matters(tmp_path: Path, dtype: torch.dtype, least: float) -> None:
    rows = clear_spectrum()
    exact = features_of(save(tmp_path / "exact", {"lm_head.weight": rows}))
    narrow = features_of(save(tmp_path / "narrow", {"lm_head.weight": rows.to(dtype)}))
    assert correlations(exact.codes, narrow.codes).min() > least
    # The same numbers in a wider type are the same features to the byte.
    widened = features_of(save(tmp_path / "widened", {"lm_head.weight": rows.to(dtype).double()}))
    assert narrow.to_bytes() == widened.to_bytes()


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    rows, foreign = clear_spectrum(), clear_spectrum(seed=1)
    one = features_of(save(tmp_path / "one", {"lm_head.weight": rows}))
    sharded = tmp_path / "sharded"
    embedding = {"model.embed_tokens.weight": foreign}
    save(sharded, embedding, "model-00001-of-00002.safetensors")
    save(sharded, {"lm_head.weight": rows}, "model-00002-of-00002.safetensors")
    save(sharded, {"lm_head.weight": foreign}, "an-older-one.safetensors")
    weight_map = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert features_of(sharded).to_bytes() == one.to_bytes()


@pytest.mark.parametrize("name", OUTPUT_NAMES)
@pytest.mark.parametrize("prefix", ["", "model.", "language_model."])
def test_the_output_embedding_is_preferred(tmp_path: Path, name: str, prefix: str) -> None:
    tensors = {prefix + ending: clear_spectrum(seed=1) for ending in INPUT_NAMES}
    save(tmp_path, {**tensors, prefix + name: clear_spectrum()})
    found = find_embedding(tmp_path, VOCAB_SIZE)
    assert found is not None and found.name == prefix + name
    assert (found.num_rows, found.hidden_size, found.dtype) == (VOCAB_SIZE, WIDTH, "F64")


@pytest.mark.parametrize("name", INPUT_NAMES)
def test_tied_models_have_the_input_embedding_only(tmp_path: Path, name: str) -> None:
    """Names that merely look alike, narrow tables and vectors are not taken for it."""
    save(
        tmp_path,
        {
            f"model.{name}": clear_spectrum(),
            f"model.positional_{name}": clear_spectrum(seed=1),
            "my_lm_head.weight": clear_spectrum(seed=2),
            "small.lm_head.weight": clear_spectrum(VOCAB_SIZE - 1),
            "flat.lm_head.weight": torch.zeros(VOCAB_SIZE),
        },
    )
    found = find_embedding(tmp_path, VOCAB_SIZE)
    assert found is not None and found.name == f"model.{name}"


def test_real_checkpoints(tiny_llama_dir: Path, tiny_gemma2_dir: Path) -> None:
    from tiny_models import VOCAB_SIZE as TOKENS
    from transformers import AutoModelForCausalLM

    for directory, name in ((tiny_llama_dir, "lm_head.weight"), (tiny_gemma2_dir, "embed_tokens.weight")):
        found = find_embedding(directory, TOKENS)
        assert found is not None and found.name.endswith(name)
        weight = AutoModelForCausalLM.from_pretrained(directory).get_output_embeddings().weight
        rows = np.concatenate(list(found.slices(TOKENS)))
        np.testing.assert_array_equal(rows, weight.detach().double().numpy())


def test_fewer_hidden_units_than_features(tmp_path: Path) -> None:
    rows = clear_spectrum()[:, :5]
    found = features_of(save(tmp_path, {"lm_head.weight": rows}), num_features=16)
    np.testing.assert_allclose(found.of(np.arange(VOCAB_SIZE)).var(0)[:5], 1.0, atol=0.03)
    assert not found.codes[:, 5:].any() and found.num_features == 16


def test_fewer_tokens_than_features(tmp_path: Path) -> None:
    """Four rows span three directions about their mean; the rest is rounding and must not be scaled up."""
    found = features_of(save(tmp_path, {"lm_head.weight": clear_spectrum(4)}), 4, 16)
    assert found.codes[:, :3].any(0).all() and not found.codes[:, 3:].any()
    constant = torch.ones(50, WIDTH)
    assert not features_of(save(tmp_path, {"lm_head.weight": constant}), 50, 4).codes.any()


SCRIPT = """
import sys
from pathlib import Path
from cache_builder.reduction.features import find_embedding, token_features
embedding = find_embedding(Path(sys.argv[1]), int(sys.argv[2]))
sys.stdout.buffer.write(token_features(embedding, int(sys.argv[2]), int(sys.argv[3])).to_bytes())
"""


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    """Elsewhere, with other threads and another kernel of the linear algebra, too."""
    directory = save(tmp_path / "model", {"lm_head.weight": clear_spectrum().float()})
    here = features_of(directory).to_bytes()
    assert features_of(directory).to_bytes() == here
    shutil.copytree(directory, tmp_path / "copy")
    assert features_of(tmp_path / "copy").to_bytes() == here
    root = Path(__file__).resolve().parents[2]
    for changes in ({"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_CORETYPE": "Nehalem"}):
        elsewhere = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(directory), str(VOCAB_SIZE), str(NUM_FEATURES)],
            check=True,
            capture_output=True,
            cwd=root,
            env={**os.environ, **changes},
        )
        assert elsewhere.stdout == here, changes


@pytest.mark.parametrize(
    "quantised",
    [
        {"lm_head.weight": torch.zeros(VOCAB_SIZE, WIDTH, dtype=torch.int8)},
        {"lm_head.weight": torch.zeros(VOCAB_SIZE, WIDTH, dtype=torch.uint8)},
        {"lm_head.weight": torch.zeros(VOCAB_SIZE, WIDTH).to(torch.float8_e4m3fn)},
        {"model.embed_tokens.weight": torch.zeros(VOCAB_SIZE, WIDTH).to(torch.float8_e5m2)},
        {"lm_head.qweight": torch.zeros(VOCAB_SIZE, WIDTH, dtype=torch.int32)},
        {},
    ],
    ids=["int8", "uint8", "float8_e4m3", "float8_e5m2", "packed", "no embedding"],
)
def test_quantised_embeddings_are_not_read(tmp_path: Path, quantised: dict[str, torch.Tensor]) -> None:
    assert find_embedding(save(tmp_path, quantised), VOCAB_SIZE) is None


def test_a_quantised_head_leaves_the_input_embedding(tmp_path: Path) -> None:
    head = torch.zeros(VOCAB_SIZE, WIDTH, dtype=torch.int8)
    save(tmp_path, {"lm_head.weight": head, "model.embed_tokens.weight": clear_spectrum()})
    found = find_embedding(tmp_path, VOCAB_SIZE)
    assert found is not None and found.name == "model.embed_tokens.weight"


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model directory holds"):
        find_embedding(tmp_path, VOCAB_SIZE)
    torch.save({"lm_head.weight": clear_spectrum()}, tmp_path / "pytorch_model.bin")
    assert find_embedding(tmp_path, VOCAB_SIZE) is None


def test_a_stray_file_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    """What an engine does not load is not part of the fingerprint either."""
    save(tmp_path, {"embed_tokens.weight": clear_spectrum()})
    stray = save(tmp_path / "other", {"lm_head.weight": clear_spectrum()})
    (stray / "model.safetensors").rename(tmp_path / "adapter.safetensors")
    found = find_embedding(tmp_path, VOCAB_SIZE)
    assert found is not None and found.name == "embed_tokens.weight"


def with_header(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(64)


def entry(**changes: object) -> bytes:
    fields = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    return json.dumps({"lm_head.weight": {**fields, **changes}}).encode()


def test_torn_headers_are_refused_and_contradictory_ones_no_embedding(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(with_header(entry()))
    assert find_embedding(tmp_path, 4) is not None, "the cases below differ from this one in one thing each"
    for content in (
        b"",
        with_header(entry())[:5],
        with_header(entry())[:40],
        with_header(entry())[:-1],
        with_header(entry(), length=1 << 40),
        with_header(entry()[:-1]),
        with_header(b"[]"),
        with_header(entry(data_offsets=[0, 68])),
        with_header(b'{"lm_head.weight": {"data_offsets": [0, 64]}}'),
        with_header(b'{"lm_head.weight": {"dtype": "F32", "shape": [4, 4]}}'),
        with_header(b'{"lm_head.weight": 5}'),
    ):
        file.write_bytes(content)
        with pytest.raises(FormatError, match="safetensors"):
            find_embedding(tmp_path, 4)
    for content in (
        with_header(entry(data_offsets=[0, 60])),
        with_header(entry(shape=[4, 5])),
        with_header(entry(shape=[4])),
    ):
        file.write_bytes(content)
        assert find_embedding(tmp_path, 4) is None, content


def test_an_index_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"lm_head.weight": clear_spectrum()})
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{torn", "[]", "{}", '{"weight_map": {"lm_head.weight": "gone.safetensors"}}'):
        index.write_text(text)
        with pytest.raises(ConfigError, match=r"index\.json"):
            find_embedding(tmp_path, VOCAB_SIZE)
    index.write_text('{"weight_map": {"lm_head.weight": "model.safetensors"}}')
    assert find_embedding(tmp_path, VOCAB_SIZE) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    rows = clear_spectrum()
    rows[700, 3] = bad
    with pytest.raises(ConfigError, match=r"finite, got NaN or infinity in lm_head\.weight") as caught:
        features_of(save(tmp_path, {"lm_head.weight": rows}))
    assert "\n" not in str(caught.value)
