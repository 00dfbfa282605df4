"""Pictures -> predictions with an exported ONNX file. Does not import torch, so it starts fast.

A file's metadata has everything needed to read pictures, as JSON: ``model`` (its settings),
``classes``, the fields of PREPARATION (``fit`` and ``interpolation`` as plain words), and, if
known, ``distances`` (see ``Calibration``).

It has one of two interfaces. Input ``images`` (B, C, H, W), float32, normalized, gives ``logits``
(B, Y), already divided by the temperature; input ``raw`` (B, H, W, C), uint8, gives
``probabilities`` (B, Y). Optional outputs ``attention_1`` ... ``attention_L`` (B, A, T, T) are the
blocks' attention; ``distance`` (B,) is how far the features are from those of validation images.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.config.files import from_json, to_json
from vitrail.config.settings import PREPARATION, Config
from vitrail.data.pictures import channel_scale
from vitrail.errors import CheckpointError, ConfigError, first_line, import_optional
from vitrail.evaluation.calibration import UNCALIBRATED, Calibration
from vitrail.inference.predictions import BaseClassifier, check_classes

OUTPUT_OF_INPUT = {"images": "logits", "raw": "probabilities"}
"""Name of the input -> name of the first output."""
PREPROCESSING = {
    "images": "RGB pictures, fitted to image_size, (value / 255 - mean) / std, float32, "
    "batch x channels x height x width; the output is logits",
    "raw": "RGB pictures, fitted to image_size, uint8, batch x height x width x channels; "
    "normalization is part of the graph; the output is probabilities",
}


def write_metadata(
    config: Config, classes: Sequence[str], *, raw: bool, distances: Sequence[float] = ()
) -> dict[str, str]:
    """Return a file's metadata; nothing in it identifies the machine that wrote it."""
    sections = to_json(config)
    names = ("mean", "std", "crop_pct", "pixel_range")
    data = {name: json.dumps(sections["data"][name]) for name in names}
    return {
        "model": json.dumps(sections["model"]),
        "classes": json.dumps(list(classes), ensure_ascii=False),
        **data,
        "fit": config.data.fit,
        "interpolation": config.data.interpolation,
        "preprocessing": PREPROCESSING["raw" if raw else "images"],
        **({"distances": json.dumps(list(distances))} if distances else {}),
    }


def read_metadata(
    metadata: Mapping[str, str], where: Path
) -> tuple[Config, tuple[str, ...], Calibration]:
    """Parse and check the output of ``write_metadata``."""
    missing = {"model", "classes", *PREPARATION} - set(metadata)
    if missing:
        raise CheckpointError(
            f"{where}: not exported by vitrail: its metadata lacks {', '.join(sorted(missing))}"
        )
    try:
        classes = json.loads(metadata["classes"])
        words = ("fit", "interpolation")
        data = {n: metadata[n] if n in words else json.loads(metadata[n]) for n in PREPARATION}
        config = from_json({"model": json.loads(metadata["model"]), "data": data})
        # Temperature and subspace are part of the graph.
        calibration = Calibration(distances=json.loads(metadata.get("distances", "[]")))
    except (json.JSONDecodeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{where}: its metadata is corrupt: {error}") from error
    return config, check_classes(classes, config, where), calibration


@dataclass(frozen=True)
class OnnxClassifier(BaseClassifier):
    """An exported model with its settings and classes, created by ``load_onnx``."""

    session: Any
    config: Config
    classes: tuple[str, ...]
    source: str = ""
    calibration: Calibration = UNCALIBRATED

    def __repr__(self) -> str:
        height, width = self.config.model.image_hw
        return f"OnnxClassifier({self.source!r}, {len(self.classes)} classes, {height} x {width})"

    def prepared(self, **changes: Any) -> "OnnxClassifier":
        """Return the classifier with changes to how pictures are prepared, e.g. ``fit``."""
        fixed = [name for name in ("mean", "std") if name in changes]
        if fixed and self.session.get_inputs()[0].name == "raw":
            raise ConfigError(
                f"{self.source}: {fixed[0]} is part of the graph (--raw): export the model again"
            )
        data = dataclasses.replace(self.config.data, **changes)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, data=data))

    def raw_outputs(
        self, raw_BHWC: np.ndarray, batch_size: int = 100
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits (B, Y), float32, of pictures at the model's size, and familiarity (B,).

        If the graph returns probabilities, the logits are their logarithms.
        """
        chunks = range(0, len(raw_BHWC), batch_size)
        parts = [self._run(raw_BHWC[start : start + batch_size]) for start in chunks]
        if not parts:
            return np.zeros((0, len(self.classes)), np.float32), None
        logits_BY = np.concatenate([logits for logits, *_ in parts])
        if not self.calibration.distances:
            return logits_BY, None
        return logits_BY, self.calibration.rank(np.concatenate([far for _, far in parts]))

    def _run(self, raw_BHWC: np.ndarray) -> list[np.ndarray]:
        """Return the logits (B, Y) of one batch and, if known, the distance (B,)."""
        input_name = self.session.get_inputs()[0].name
        batch = raw_BHWC if input_name == "raw" else self._normalize(raw_BHWC)
        names = [OUTPUT_OF_INPUT[input_name], *["distance"] * bool(self.calibration.distances)]
        try:
            scores_BY, *distance = self.session.run(names, {input_name: batch})
        except Exception as error:  # its exceptions have no common base class
            raise CheckpointError(f"{self.source}: cannot be run: {_first_line(error)}") from error
        if scores_BY.shape != (len(raw_BHWC), len(self.classes)):
            raise CheckpointError(
                f"{self.source}: output {scores_BY.shape} for {len(raw_BHWC)} pictures and "
                f"{len(self.classes)} classes"
            )
        if input_name == "raw":
            scores_BY = np.log(np.maximum(scores_BY, np.finfo(np.float32).tiny))
        return [scores_BY, *distance]

    def _normalize(self, raw_BHWC: np.ndarray) -> np.ndarray:
        """Convert uint8 to the model's input (B, C, H, W), float32."""
        data = self.config.data
        scale_C, shift_C = channel_scale(data.mean, data.std, raw_BHWC.shape[3])
        images_BHWC: np.ndarray = raw_BHWC * scale_C + shift_C
        return np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2))


def load_onnx(
    path: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    threads: int | None = None,
) -> OnnxClassifier:
    """Load an ONNX file written by ``vitrail export``.

    Args:
        path: the file.
        device: cuda requires onnxruntime-gpu; auto uses it if available.
        threads: number of threads. Default: the number of cores.

    Raises:
        CheckpointError: there is no such file, or it is corrupt or not written by vitrail.
        ConfigError: onnxruntime is not installed, or has no such device.
    """
    runtime, path = import_optional("onnxruntime"), Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised anyway; no warnings
    options.intra_op_num_threads = threads or 0
    providers = _choose_providers(device, runtime.get_available_providers())
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions have no common base class
        raise CheckpointError(f"{path}: not a valid ONNX file: {_first_line(error)}") from error
    config, classes, calibration = read_metadata(session.get_modelmeta().custom_metadata_map, path)
    input_name = session.get_inputs()[0].name
    if OUTPUT_OF_INPUT.get(input_name) != session.get_outputs()[0].name:
        raise CheckpointError(f"{path}: not exported by vitrail: its first input is {input_name!r}")
    return OnnxClassifier(session, config, classes, str(path), calibration)


def _choose_providers(device: str, available: Sequence[str]) -> list[str]:
    """Return onnxruntime's execution providers in order of preference."""
    names = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
    there = {name: provider for name, provider in names.items() if provider in available}
    if device == "auto":
        return list(there.values())
    if device not in there:
        raise ConfigError(
            f"device {device} is not available to onnxruntime, only {', '.join(there)}"
        )
    return [there[device]]


def _first_line(error: Exception) -> str:
    """Return the first line of a message, without onnxruntime's own prefix."""
    return first_line(error).rpartition("[ONNXRuntimeError] : ")[2][:150]
