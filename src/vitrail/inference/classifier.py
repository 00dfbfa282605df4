"""Pictures -> predictions and explanations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.config.settings import Config, require
from vitrail.data.formats import gray_to_rgb
from vitrail.data.images import normalize
from vitrail.data.pictures import (
    Picture,
    Pictures,
    framing,
    only_picture,
    read_picture,
    source_name,
)
from vitrail.evaluation.calibration import UNCALIBRATED, Calibration
from vitrail.explain.checks import require_finite
from vitrail.explain.explanation import Explanation, Subject, choose, compare, explain
from vitrail.explain.map_settings import (
    ALL,
    MapSettings,
    check_names,
    default_view,
    settings_of_all,
)
from vitrail.explain.stored_scores import Verdict
from vitrail.explain.token_views import ColorBasis
from vitrail.inference.predictions import BaseClassifier
from vitrail.inference.traced import LogitsAndFeatures, Outputs, trace
from vitrail.model.vit import VisionTransformer


@dataclass(frozen=True)
class Classifier(BaseClassifier):
    """A trained model with its settings and classes, created by ``vitrail.load``.

    The model is in evaluation mode on its device.
    """

    model: VisionTransformer
    config: Config
    classes: tuple[str, ...]
    source: str = ""
    notes: tuple[str, ...] = ()
    """What was assumed in order to read another library's weights."""
    calibration: Calibration = UNCALIBRATED
    verdict: Verdict | None = None
    """Which maps to trust, if ``vitrail explain --score`` stored it next to the weights."""
    result: Mapping[str, Any] | None = None
    """For a model made by ``vitrail.train``: scores and seconds, as in result.json."""
    outputs: Outputs | None = None
    """The model as a graph, if ``trace`` has been called."""

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{parameters / 1e6:.1f}M" if parameters >= 100_000 else f"{parameters:,}"
        height, width = self.config.model.image_hw
        return (
            f"Classifier({self.source!r}, {len(self.classes)} classes, {size} parameters, "
            f"{height} x {width}, {self.device})"
        )

    def require_classes(self) -> None:
        """Refuse to classify with a network that has no classes.

        Raises:
            ConfigError: it has none.
        """
        require(
            bool(self.classes),
            f"{self.source or 'the network'} has no classes, so it cannot classify: train a head "
            f"with vitrail train --init {self.source or 'WEIGHTS'} --new_head, or look at its "
            "tokens with vitrail explain",
        )

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per-channel mean the model was trained with, for pixels in [0, 1]."""
        return self.config.data.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Per-channel standard deviation the model was trained with."""
        return self.config.data.std

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def trace(self) -> "Classifier":
        """Return a classifier that makes the same predictions with a traced graph.

        On a CPU a graph takes a tenth less time than modules do, and does not wait for Python's
        GIL, which helps programs that predict in several threads.
        """
        return replace(self, outputs=trace(self.model))

    def raw_outputs(self, raw_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the logits (B, Y) of pictures returned by ``read``, and their familiarity (B,)."""
        logits_BY, features_BD = self._run(self.normalize(raw_BHWC), batch_size=500)
        return logits_BY.numpy(), self.calibration.familiarity(features_BD.numpy())

    def explain(
        self,
        picture: Picture,
        *,
        frames: str | None = None,
        class_name: str | None = None,
        name: str = "",
        basis: ColorBasis | None = None,
        **settings: Any,
    ) -> Explanation:
        """Return what the model attends to in one picture; ``.save("x.gif")`` draws it.

        Args:
            picture: any kind of picture.
            frames: what changes from frame to frame: rollout, layers, heads or queries. Default:
                what fits the method; without a method, the evidence after each layer.
            class_name: the class to explain. Default: the predicted one.
            name: the picture's name. Default: its file name.
            basis: for method features, colors shared by several pictures, from
                ``explain.token_views.fit_colors``. Default: fitted to this picture.
            settings: fields of ``explain.map_settings.MapSettings``: method, fusion, query, layers
                and more; ``against`` may be the name of a class. method "all" shows every method,
                one frame each.

        Raises:
            PictureError: the picture cannot be read.
            ConfigError: an unknown setting, class, layer or head.
        """
        check_names(settings)
        method = settings.pop("method", None)
        require(basis is None or method == "features", "only method features uses a basis")
        subject = replace(self.subject(picture, name=name), basis=basis)
        if isinstance(settings.get("against"), str):
            settings["against"] = subject.find_class(settings["against"])
        if method == ALL:
            require(frames is None, f"method {ALL} has a frame for each method: leave out frames")
            return compare(subject, settings_of_all(**settings), class_name=class_name)
        if method is None and frames is None:
            method, frames = default_view(settings, has_classes=bool(self.classes))
        chosen, _ = choose(method, frames)
        asked = MapSettings(method=chosen, **settings)
        return explain(subject, asked, kind=frames, class_name=class_name)

    def subject(self, picture: Picture, *, name: str = "", label: str = "") -> Subject:
        """Return one picture with everything that an explanation needs."""
        named = name or Path(source_name(picture)).name or "picture"
        picture = only_picture(picture)
        picture_HWC = read_picture(picture, pixel_range=self.config.data.pixel_range)
        return self.subject_of(self.read(picture)[0], picture_HWC, name=named, label=label)

    def subject_of(
        self,
        raw_HWC: np.ndarray,
        picture_HWC: np.ndarray,
        *,
        name: str = "picture",
        label: str = "",
    ) -> Subject:
        """Like ``subject``, for a picture as returned by ``read`` and at its own size."""
        return Subject(
            model=self.model,
            image_1CHW=self.normalize(raw_HWC[None]),
            raw_HWC=raw_HWC if raw_HWC.shape[2] == 3 else gray_to_rgb(raw_HWC[:, :, 0]),
            picture_HWC=picture_HWC,
            fit=framing(self.config.data),
            classes=self.classes,
            name=name,
            label=label,
            calibration=self.calibration,
            verdict=self.verdict,
        )

    def features(self, pictures: Pictures, batch_size: int = 500) -> Tensor:
        """Return what the head classifies, a vector for each picture: (B, D), on the CPU."""
        with torch.inference_mode():
            parts = self.prepare(pictures).split(batch_size)
            vectors = [self.model.features(part).float().cpu() for part in parts]
        return torch.cat(vectors)

    def prepare(self, pictures: Pictures) -> Tensor:
        """Convert pictures of any kind and size to the model's input (B, C, H, W)."""
        return self.normalize(self.read(pictures))

    def normalize(self, raw_BHWC: np.ndarray) -> Tensor:
        """Convert uint8 to the model's input (B, C, H, W), float32, on its device."""
        raw_BCHW = torch.from_numpy(raw_BHWC).permute(0, 3, 1, 2).to(self.device)
        return normalize(raw_BCHW, self.mean, self.std)

    def probabilities(self, images_BCHW: Tensor, batch_size: int = 500) -> Tensor:
        """Return class probabilities (B, Y) on the CPU, or raise CheckpointError if not finite."""
        logits_BY = self.logits(images_BCHW, batch_size)
        return self.calibration.scale(logits_BY).softmax(1)

    def logits(self, images_BCHW: Tensor, batch_size: int = 500) -> Tensor:
        """Return the logits (B, Y) on the CPU, or raise CheckpointError if not finite."""
        return self._run(images_BCHW, batch_size)[0]

    def _run(self, images_BCHW: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return logits (B, Y) and features (B, D), float32, on the CPU."""
        self.require_classes()
        self.model.check_images(images_BCHW)  # a graph would not
        outputs = self.outputs or LogitsAndFeatures(self.model)
        logits, features = [], []
        with torch.inference_mode():
            for part_BCHW in images_BCHW.split(batch_size):
                logits_BY, features_BD = outputs(part_BCHW)
                logits.append(logits_BY.float().cpu())
                features.append(features_BD.float().cpu())
        logits_BY = torch.cat(logits)
        require_finite(logits_BY)
        return logits_BY, torch.cat(features)
