"""Untrusted weights: .pt files that run code, safetensors with invalid headers, checkpoints."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as pack_tensors
from torch import Tensor

from fuzz.engine import FaultError, Target, require
from fuzz.settings import set_values
from vitrail.config.settings import Config, ModelConfig
from vitrail.inference.classifier import Classifier
from vitrail.model.vit import VisionTransformer
from vitrail.training.run_folder import read_rows
from vitrail.training.state import TrainingState, newest_valid
from vitrail.weights.checkpoint import (
    INFO,
    METADATA_KEY,
    MODEL,
    TRAINING,
    CheckpointInfo,
    hash_tensors,
    save_checkpoint,
)
from vitrail.weights.formats.convert import write_foreign
from vitrail.weights.pretrained import load

TINY = ModelConfig(
    image_size=8,
    n_classes=2,
    patch_size=4,
    embed_dim=4,
    n_layers=1,
    n_attention_heads=2,
    forward_mul=1.0,
)
PICKLE, STEP = "x/data.pkl", "step-0000003"


@cache
def parts() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return the info, the weights and the training state of a tiny checkpoint."""
    torch.manual_seed(0)
    config = Config(model=TINY)
    state = TrainingState.start(VisionTransformer(TINY), config.training)
    state.model(torch.zeros(1, 3, 8, 8)).sum().backward()
    for optimizer in state.optimizers:
        optimizer.step()
    numbers = {**state.numbers(), "step": int(STEP.removeprefix("step-"))}
    info = CheckpointInfo(config, ("a", "b"), numbers, {"validation_accuracy": 0.5})
    return info.to_json(), state.weights(), state.tensors()


@cache
def reference_state() -> dict[str, Tensor]:
    """Return a state dict in the reference implementation's layout."""
    D, M = 4, 8
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.pos_embedding": (1, 4, D),
        "embedding.cls_token": (1, 1, D),
        "embedding.conv1.weight": (D, 3, 4, 4),
        "embedding.conv1.bias": (D,),
        "encoder.0.fc1.weight": (M, D),
        "encoder.0.fc1.bias": (M,),
        "encoder.0.fc2.weight": (D, M),
        "encoder.0.fc2.bias": (D,),
        "classifier.fc1.weight": (D, D),
        "classifier.fc1.bias": (D,),
        "classifier.fc2.weight": (2, D),
        "classifier.fc2.bias": (2,),
    }
    for name in ("queries", "keys", "values", "out_projection"):
        shapes |= {
            f"encoder.0.attention.{name}.weight": (D, D),
            f"encoder.0.attention.{name}.bias": (D,),
        }
    for name in ("norm", "encoder.0.norm1", "encoder.0.norm2"):
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    return {name: torch.full(shape, 0.25) for name, shape in shapes.items()}


def check(classifier: Classifier) -> None:
    """Check an accepted model; run it if it is small."""
    model = classifier.model
    require(not model.training, "a model in training mode")
    require(len(classifier.classes) == classifier.config.model.n_classes, "classes do not fit")
    for tensor in model.state_dict().values():
        require(tensor.dtype is torch.float32 and tensor.device.type == "cpu", f"{tensor.dtype}")
    height, width = model.config.image_hw
    if height * width <= 64:
        with torch.inference_mode():
            model(torch.zeros(1, model.config.n_channels, height, width))


def attack_reference(data: bytes, folder: Path) -> None:
    """Load a .pt: the bytes themselves, or a pickle in a zip file as torch writes it."""
    path = folder / "x.pt"
    path.write_bytes(rezip(data[1:]) if data[:1] == b"p" else data)
    check(load(path, device="cpu"))


@cache
def saved() -> tuple[bytes, dict[str, bytes]]:
    """Return the reference's weights as written by torch.save, and the files in its zip archive."""
    file = io.BytesIO()
    torch.save(reference_state(), file)
    with zipfile.ZipFile(file) as opened:
        names = {n.replace(n.split("/")[0], "x", 1): opened.read(n) for n in opened.namelist()}
    return file.getvalue(), names


def rezip(content: bytes, *, packing: int = zipfile.ZIP_STORED) -> bytes:
    """Return the zip archive with a different pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as opened:
        for name, part in {**saved()[1], PICKLE: content}.items():
            opened.writestr(name, part)
    return file.getvalue()


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def reference_seeds() -> list[bytes]:
    """Return a valid file, pickles that run code, and unusual tensors."""
    content = saved()[1][PICKLE]
    evil = [
        Call(os.mkdir, "../ran"),
        {"embedding.conv1.weight": Call(os.system, "touch ../ran")},
        Call(torch.load, "../x"),
        Call(eval, "1"),
        {1: 2},
        [],
        None,
        {"a": 1},
        {"embedding.conv1.weight": Call(bytearray, 1 << 40)},
    ]
    states: list[dict[Any, Any]] = [{}]
    for name, other in (
        ("embedding.conv1.weight", torch.zeros(1).expand(4, 3, 1 << 20, 1 << 20)),
        ("embedding.conv1.weight", torch.zeros(0, 3, 4, 4)),
        ("embedding.pos_embedding", torch.zeros(1, 0, 4)),
        ("encoder.0.fc1.weight", torch.zeros(0, 4)),
        ("classifier.fc2.weight", torch.zeros(0, 4)),
        ("classifier.fc2.weight", torch.zeros(2, 4).to_sparse()),
        ("classifier.fc2.weight", torch.zeros(2, 4, device="meta")),
        ("classifier.fc2.weight", torch.zeros(2, 4, dtype=torch.complex64)),
        ("classifier.fc2.weight", torch.zeros(2, 4, dtype=torch.int8)),
        ("encoder.99999999.norm1.bias", torch.zeros(4)),
        ("encoder.x.norm1.bias", torch.zeros(4)),
    ):
        states.append({**reference_state(), name: other})
    files = [saved()[0]]
    for state in states:
        file = io.BytesIO()
        torch.save(state, file)
        files.append(file.getvalue())
    pickles = [b"p" + content, *(b"p" + pickle.dumps(value, 2) for value in evil)]
    deep = [b"p\x80\x02" + b"]" * 50_000 + b".", b"p\x80\x02]r\xff\xff\xff\x7f."]
    packed = rezip(content + bytes(30_000_000), packing=zipfile.ZIP_DEFLATED)
    return [*files, *pickles, *deep, packed, b"", b"PK\5\6" + bytes(18), pickle.dumps(states[0])]


def attack_safetensors(data: bytes, folder: Path) -> None:
    """Load a .safetensors: the bytes themselves, another header, or other metadata."""
    path = folder / "x.safetensors"
    kind, rest = data[:1], data[1:]
    if kind == b"h":
        payload = pack_tensors(parts()[1])
        start = 8 + int.from_bytes(payload[:8], "little")
        data = len(rest).to_bytes(8, "little") + rest + payload[start:]
    elif kind == b"v":
        data = described(set_values(parts()[0], rest))
    elif kind == b"t":
        data = pack_tensors(parts()[1], {METADATA_KEY: rest.decode(errors="replace")})
    path.write_bytes(data)
    check(load(path, device="cpu"))


def described(info: dict[str, Any]) -> bytes:
    """Return a file of the tiny weights with this info and the right hash."""
    weights = parts()[1]
    text = json.dumps({**info, "sha256": hash_tensors(weights)})
    return bytes(pack_tensors(weights, {METADATA_KEY: text}))


def safetensors_seeds() -> list[bytes]:
    """Return a valid file, and invalid headers and metadata."""
    valid = described(parts()[0])
    size = int.from_bytes(valid[:8], "little")
    header = valid[8 : 8 + size]
    heads = [
        b"{}",
        b"null",
        b"[" * 9_000,
        b'{"__metadata__":null}',
        b'{"__metadata__":{}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[0,0]}}',
        header[:-1],
    ]
    texts = [b"{}", b"null", b"[" * 9_000, b"9" * 9_000]
    halves = pack_tensors({n: t.half() for n, t in parts()[1].items()}, {METADATA_KEY: "{}"})
    chosen = [b"v" + bytes((number * 5 % 256, number)) for number in range(256)]
    return [
        valid,
        *(b"h" + head for head in [header, *heads]),
        *(b"t" + text for text in texts),
        *chosen,
        halves,
        b"",
        b"\xff" * 8 + b"{}",
        (1 << 40).to_bytes(8, "little") + b"{}",
    ]


def attack_checkpoint(data: bytes, folder: Path) -> None:
    """Load a run folder in which one file is replaced and the hashes are updated."""
    run = folder / "run"
    if not run.exists():
        make_run(run)
    name = {b"i": INFO, b"m": MODEL, b"s": TRAINING, b"v": INFO}.get(data[:1])
    step = run / "checkpoints" / STEP
    path = step / name if name else run / {b"b": "checkpoints/BEST"}.get(data[:1], "metrics.jsonl")
    kept = {file: file.read_bytes() for file in (path, step / INFO)}
    try:
        content = data[1:]
        if data[:1] == b"v":
            info = {**set_values(parts()[0], content), "sha256": hashes(step)}
            content = json.dumps(info).encode()
        path.write_bytes(content)
        if name in (MODEL, TRAINING):
            (step / INFO).write_text(json.dumps({**parts()[0], "sha256": hashes(step)}))
        use_run(run)
    finally:
        for file, before in kept.items():
            file.write_bytes(before)
        if {entry.name for entry in folder.iterdir()} != {"run"}:
            raise FaultError(f"made {list(folder.iterdir())}")


def make_run(run: Path) -> None:
    """Write the tiny run folder."""
    content, weights, training = parts()
    step = run / "checkpoints" / STEP
    info = CheckpointInfo.from_json(content, step)
    save_checkpoint(step, info, weights=weights, training=training)
    for name in ("BEST", "LAST"):
        (run / "checkpoints" / name).write_text(f"{STEP}\n")
    (run / "metrics.jsonl").write_text('{"epoch": 1, "step": 3, "train_accuracy": 0.5}\n')


def hashes(step: Path) -> dict[str, str]:
    """Return the sha256 of the files of a checkpoint."""
    return {n: hashlib.sha256((step / n).read_bytes()).hexdigest() for n in (MODEL, TRAINING)}


def use_run(run: Path) -> None:
    """Load the model, read the metrics, and restore the training state."""
    check(load(run, device="cpu"))
    for row in read_rows(run):
        f"{row['step']} {row['epoch']}"
    found = newest_valid(run / "checkpoints")
    if found.info.config.model == TINY and found.info.config.training == Config().training:
        state = TrainingState.start(VisionTransformer(TINY), found.info.config.training)
        state.restore(found.weights, found.training, found.info.numbers)
        state.model(torch.zeros(1, 3, 8, 8)).sum().backward()
        for optimizer in state.optimizers:
            optimizer.step()
        require(isinstance(state.step + state.seconds, float), "a step that is not a number")


def checkpoint_seeds() -> list[bytes]:
    """Return replacement files for a run folder, each with the letter of its place."""
    info, weights, training = parts()
    reshaped = {name: torch.zeros(3, 1) for name in training}
    renamed = {f"{name}.x": tensor for name, tensor in training.items()}
    rows = [
        b'{"epoch": 1, "step": 3}',
        b'{"step": 1e400, "epoch": 1}',
        b"null",
        b'{"step": 3}',
        b"\xff",
        b'{"step": ' + b"9" * 9_000 + b"}",
        b'{"step": 3, "epoch": 1, "x": NaN}',
    ]
    pointers = [
        b"",
        b"..",
        b".",
        b"/",
        b"../..",
        b"\0",
        b"\xff",
        STEP.encode() + b"/../..",
        b"x" * 999,
    ]
    return [
        b"e" + rows[0],
        *(b"e" + row for row in rows),
        *(b"b" + word for word in pointers),
        b"m" + pack_tensors(weights),
        b"m" + pack_tensors({}),
        b"s" + pack_tensors(training),
        b"s" + pack_tensors({}),
        b"s" + pack_tensors(reshaped),
        b"s" + pack_tensors(renamed),
        b"i" + json.dumps(info).encode(),
        b"i{}",
        b"inull",
        *(b"v" + bytes((number * 3 % 256, number)) for number in range(256)),
    ]


def attack_foreign(data: bytes, folder: Path) -> None:
    """Load weights of another library: an .npz, or a folder with a modified config.json."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    kind, rest = data[:1], data[1:]
    if kind == b"n":
        path = folder / "x.npz"
        path.write_bytes(rest)
    else:
        path = folder / "model"
        path.mkdir()
        files = dict(foreign_files()["timm" if kind in (b"t", b"u") else "huggingface"])
        if kind in (b"h", b"t"):
            files["config.json"] = json.dumps(
                set_values(json.loads(files["config.json"]), rest)
            ).encode()
        elif kind in (b"i", b"u"):
            files["config.json"] = rest
        else:
            files["model.safetensors"] = rest
        for name, content in files.items():
            (path / name).write_bytes(content)
    check(load(path, n_attention_heads=2 if kind == b"n" else None, device="cpu"))


@cache
def foreign_files() -> dict[str, dict[str, bytes]]:
    """Return the tiny model's files in the formats of other libraries."""
    model = replace(TINY, head="linear", dropout=0.0)
    torch.manual_seed(0)
    weights = VisionTransformer(model).state_dict()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout, name in (("timm", "t"), ("huggingface", "h"), ("google", "x.npz")):
            path = Path(folder) / name
            as_there = {"hidden_act": "gelu_tanh", "layer_norm_eps": 1e-6}
            config = Config(model=replace(model, **as_there) if layout == "google" else model)
            write_foreign(path, layout, CheckpointInfo(config, ("a", "b"), {}, {}), weights)
            inner = sorted(path.iterdir()) if path.is_dir() else [path]
            found[layout] = {file.name: file.read_bytes() for file in inner}
    return found


def foreign_seeds() -> list[bytes]:
    """Return valid and invalid files of other libraries."""
    files = foreign_files()
    archive = files["google"]["x.npz"]
    arrays = [{"a": np.zeros((0, 3))}, {"a": np.array(["x"])}, {"a": np.array([1 + 2j])}, {}]
    packed = [(np.savez, each) for each in arrays]
    packed += [(np.savez_compressed, {"a": np.zeros(9_000_000, np.int8)})]
    found = [b"n" + archive]
    for save, each in packed:
        file = io.BytesIO()
        save(file, **each)
        found.append(b"n" + file.getvalue())
    found += [
        b"i" + word for word in (b"{}", b"null", b"[" * 9_000, b'{"a": ' + b"9" * 9_000 + b"}")
    ]
    for kind, layout in ((b"i", "huggingface"), (b"u", "timm")):
        found += [kind + files[layout]["config.json"], b"s" + files[layout]["model.safetensors"]]
    numbers = range(0, 256, 2)
    return found + [kind + bytes((n * 5 % 256, n)) for kind in (b"h", b"t") for n in numbers]


REFERENCE = Target("weights, .pt", reference_seeds, attack_reference)
SAFETENSORS = Target("weights, safetensors", safetensors_seeds, attack_safetensors)
CHECKPOINTS = Target("checkpoints", checkpoint_seeds, attack_checkpoint)
FOREIGN = Target("weights, others'", foreign_seeds, attack_foreign)
