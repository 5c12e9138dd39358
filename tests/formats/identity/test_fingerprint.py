"""Fingerprints change with anything that matters and with nothing else."""

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from formats.errors import ConfigError, FormatError
from formats.identity import hash_memo
from formats.identity.fingerprint import (
    ModelFingerprint,
    TokenizerFingerprint,
    resolve_model,
    tokenizer_files_fingerprint,
)
from formats.identity.tensor_hash import hash_tensors

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 4, "rope": {"theta": 1e4}}


def save_model(directory: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or CONFIG))
    return directory


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "embed": generator.normal(size=(11, 4)).astype(np.float32),
        "norm": np.ones(4, np.float32),
        "head": generator.normal(size=(11, 4)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_every_bit_of_every_tensor_counts(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    seen = {ModelFingerprint.of(save_model(tmp_path / "a", tensors)).weights}
    for name in ("embed", "norm", "head"):
        for index in (0, -1):
            changed = {k: v.copy() for k, v in tensors.items()}
            flat = changed[name].view(np.uint8).reshape(-1)
            flat[index] ^= 1
            seen.add(ModelFingerprint.of(save_model(tmp_path / "a", changed)).weights)
    assert len(seen) == 7


def test_names_shapes_and_types_count(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    base = ModelFingerprint.of(save_model(tmp_path / "a", tensors)).weights
    variants = [
        {**tensors, "embed": tensors["embed"].reshape(4, 11)},
        {**tensors, "embed": tensors["embed"].view(np.int32)},
        {("renamed" if k == "norm" else k): v for k, v in tensors.items()},
        {k: v for k, v in tensors.items() if k != "empty"},
        {**tensors, "embed": tensors["norm"], "norm": tensors["embed"]},
    ]
    found = [ModelFingerprint.of(save_model(tmp_path / "a", v)).weights for v in variants]
    assert len({base, *found}) == 6


def test_sharding_order_and_place_do_not_count(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    whole = ModelFingerprint.of(save_model(tmp_path / "whole", tensors))
    shutil.copytree(tmp_path / "whole", tmp_path / "deep" / "copy")
    assert ModelFingerprint.of(tmp_path / "deep" / "copy") == whole

    split = tmp_path / "split"
    split.mkdir()
    (split / "config.json").write_text(json.dumps(CONFIG))
    names = list(reversed(tensors))
    files = {"b.safetensors": names[:1], "a.safetensors": names[1:]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, split / file, metadata={"format": "pt"})
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ModelFingerprint.of(split) == whole


def test_tensor_digest_is_what_the_docstring_says(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """An independent reading: dtype, shape, then the digest of the one piece."""
    import hashlib

    path = save_model(tmp_path / "a", tensors) / "model.safetensors"
    piece = hashlib.sha256(load_file(path)["norm"].tobytes()).digest()
    assert hash_tensors([path])["norm"] == hashlib.sha256(b"F32 [4]\n" + piece).hexdigest()


def test_pieces_cover_a_tensor_larger_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte counts also where a tensor spans many pieces and a piece many blocks."""
    from formats.identity import tensor_hash

    monkeypatch.setattr(tensor_hash, "PIECE_BYTES", 10)
    monkeypatch.setattr(tensor_hash, "BLOCK_BYTES", 3)
    data = np.arange(64, dtype=np.uint8)
    seen = set()
    for index in range(-1, 64):
        changed = data.copy()
        if index >= 0:
            changed[index] ^= 0x80
        save_file({"x": changed}, tmp_path / "x.safetensors")
        seen.add(hash_tensors([tmp_path / "x.safetensors"])["x"])
    assert len(seen) == 65


def test_config_ignores_what_a_session_writes(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    base = ModelFingerprint.of(save_model(tmp_path / "a", tensors))
    volatile = {"transformers_version": "9", "_name_or_path": "/x", "torch_dtype": "bfloat16", "pad": None}
    again = ModelFingerprint.of(
        save_model(tmp_path / "b", tensors, {**volatile, **CONFIG, "dtype": "float32"})
    )
    assert again == base
    nested = {**CONFIG, "rope": {"theta": 1e4, "dtype": "float16"}}
    assert ModelFingerprint.of(save_model(tmp_path / "c", tensors, nested)) == base
    other = {**CONFIG, "rope": {"theta": 1e6}}
    assert ModelFingerprint.of(save_model(tmp_path / "d", tensors, other)).config != base.config


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_torn_weights_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray], cut: int) -> None:
    directory = save_model(tmp_path / "a", tensors)
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(FormatError):
        ModelFingerprint.of(directory)


def test_bad_model_directories(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ConfigError, match="model directory"):
        resolve_model(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelFingerprint.of(tmp_path)
    directory = save_model(tmp_path / "a", tensors)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="got none"):
        ModelFingerprint.of(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(ConfigError, match=r"gone\.safetensors"):
        ModelFingerprint.of(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="must be readable JSON"):
        ModelFingerprint.of(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        ModelFingerprint.of(directory)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"architectures": {"0": "Llama"}},
            r"architectures in a model's config\.json must be a list, got \{'0'",
        ),
        ({"architectures": "Llama"}, "must be a list, got 'Llama'"),
        ({"text_config": [1]}, r"text_config in a model's config\.json must be an object, got \[1\] in "),
        ({"vocab_size": "many"}, "vocab_size .* must be a whole number, got 'many'"),
        ({"vocab_size": 32.5}, "must be a whole number, got 32.5"),
    ],
)
def test_a_config_whose_keys_hold_something_else(
    tmp_path: Path, tensors: dict[str, np.ndarray], content: dict[str, object], said: str
) -> None:
    directory = save_model(tmp_path / "a", tensors)
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        ModelFingerprint.of(directory)


NAME = "nobody/nothing-of-this-name"


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_model_that_was_not_fetched_before_is_a_line_of_ours_offline(
    monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(switch, "1")
    rule = "--model must be a model directory or a Hugging Face name, got "
    for revision, of in ((None, NAME), ("step9", f"{NAME} at revision step9")):
        with pytest.raises(ConfigError) as caught:
            resolve_model(NAME, revision)
        assert str(caught.value) == (
            f"{rule}{of}: no directory here, not fetched before, while {switch} forbids to fetch; "
            f"correct the name, or unset {switch}"
        )


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (
            404,
            "RepoNotFound",
            "the Hub has none of that name, or only for its members; correct it, or hf auth login",
        ),
        (404, "RevisionNotFound", "the Hub has no such revision of it; correct the revision"),
        (
            403,
            "GatedRepo",
            "the Hub gives it to those only who accepted its terms; do so on its page, then hf auth login",
        ),
        (
            None,
            "",
            "not fetched before, while the Hub cannot be reached; correct the name, or mend the network",
        ),
    ],
)
def test_what_the_hub_says_of_a_model_is_a_line_of_ours(
    monkeypatch: pytest.MonkeyPatch, status: int | None, code: str, said: str
) -> None:
    """A server on the loopback refuses as the Hub does; without a status nobody listens there."""

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status or 0)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if status is None:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        with pytest.raises(ConfigError) as caught:
            resolve_model(NAME)
    finally:
        server.shutdown()
        server.server_close()
    assert str(caught.value).endswith(f"got {NAME}: no directory here, {said}")


def test_a_name_that_the_hub_cannot_have_is_said_to_be_one() -> None:
    with pytest.raises(ConfigError, match="no name of the Hub, which has the form OWNER/MODEL; correct it"):
        resolve_model("two--dashes")


def test_pytorch_files_are_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    (tmp_path / "training_args.bin").write_bytes(b"never part of the weights")
    one = ModelFingerprint.of(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"changed")
    assert ModelFingerprint.of(tmp_path) == one
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert ModelFingerprint.of(tmp_path).weights != one.weights


# --- the memo ----------------------------------------------------------------------------------------------


@pytest.fixture
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "anneal" / "fingerprints"


def settle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the file from ten seconds later: a change time cannot be set back."""
    now = time.time()
    monkeypatch.setattr(hash_memo.time, "time", lambda: now + 10)


def test_memo_answers_only_for_unchanged_files(memo: Path, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    settle(file, monkeypatch)
    calls: list[int] = []

    def compute() -> dict[str, str]:
        calls.append(1)
        return {"x": file.read_bytes().hex()}

    first = hash_memo.remembered([file], compute, min_bytes=0)
    assert hash_memo.remembered([file], compute, min_bytes=0) == first and len(calls) == 1
    # Same size and the old modification time put back: the change time still tells.
    stat = file.stat()
    time.sleep(0.02)
    file.write_bytes(b"other")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hash_memo.remembered([file], compute, min_bytes=0) == {"x": b"other".hex()}


def test_memo_does_not_trust_a_file_that_was_just_written(memo: Path, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    monkeypatch.setattr(hash_memo.time, "time", lambda: file.stat().st_ctime)
    hash_memo.remembered([file], lambda: {"x": "1"}, min_bytes=0)
    assert not memo.exists()


def test_memo_does_not_record_a_file_that_changed_meanwhile(memo: Path, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    settle(file, monkeypatch)

    def compute() -> dict[str, str]:
        file.write_bytes(b"longer")
        return {"x": "1"}

    hash_memo.remembered([file], compute, min_bytes=0)
    assert not memo.exists()


@pytest.mark.parametrize("junk", [b"", b"[]", b'{"state": 1}', b'{"state": [], "digests": {"x": 3}}'])
def test_a_damaged_memo_is_ignored(memo: Path, tmp_path: Path, monkeypatch, junk: bytes) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    settle(file, monkeypatch)
    hash_memo.remembered([file], lambda: {"x": "1"}, min_bytes=0)
    (entry,) = memo.iterdir()
    entry.write_bytes(junk)
    assert hash_memo.remembered([file], lambda: {"x": "2"}, min_bytes=0) == {"x": "2"}


# --- tokenizers --------------------------------------------------------------------------------------------


def test_tokenizer_survives_saving_loading_and_use(tiny_tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first = TokenizerFingerprint.of(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path / "a")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    reloaded("some text", truncation=True, max_length=3, padding="max_length")  # leaves state in the backend
    assert TokenizerFingerprint.of(reloaded) == first
    reloaded.save_pretrained(tmp_path / "b")
    assert TokenizerFingerprint.of(AutoTokenizer.from_pretrained(tmp_path / "b")) == first


def test_each_part_of_a_tokenizer_counts(tiny_tokenizer_dir: Path) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    def load():
        return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)

    base = TokenizerFingerprint.of(load())

    def parts_changed(tokenizer) -> set[str]:
        other = TokenizerFingerprint.of(tokenizer)
        return {name for name in vars(base) if getattr(base, name) != getattr(other, name)}

    template = load()
    template.chat_template += " "
    assert parts_changed(template) == {"chat_template"}
    special = load()
    special.eos_token = "<pad>"
    assert parts_changed(special) == {"special_tokens"}
    pipeline = load()
    pipeline.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert parts_changed(pipeline) == {"pipeline"}
    vocabulary = load()
    vocabulary.add_tokens(["<new>"])
    assert parts_changed(vocabulary) == {"vocabulary", "pipeline", "vocab_size"}


def test_files_tell_the_vocabulary_and_the_template(tiny_tokenizer, tiny_tokenizer_dir: Path) -> None:
    loaded = vars(TokenizerFingerprint.of(tiny_tokenizer))
    assert tokenizer_files_fingerprint(tiny_tokenizer_dir) == {
        key: loaded[key] for key in ("vocabulary", "chat_template")
    }


def test_a_tokenizer_without_a_serialisable_pipeline() -> None:
    class Characters:
        shift = 0

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(128)}

        def encode(self, text: str) -> list[int]:
            return [(ord(c) + self.shift) % 128 for c in text]

    base = TokenizerFingerprint.of(Characters())
    other = Characters()
    other.shift = 1
    assert TokenizerFingerprint.of(Characters()) == base
    assert TokenizerFingerprint.of(other).pipeline != base.pipeline
