"""Pictures -> predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.config.settings import Config, require
from vitrail.data.formats import WHITE, Color
from vitrail.data.framing import framing, stack_pictures
from vitrail.data.images import normalize
from vitrail.data.pictures import (
    Picture,
    Pictures,
    gray_to_rgb,
    only_picture,
    read_picture,
    source_name,
)
from vitrail.explain.explanation import Explanation, Subject, choose, compare, explain
from vitrail.explain.methods import (
    ALL,
    MapSettings,
    check_names,
    require_finite,
    settings_of_all,
)
from vitrail.inference.top_k import Prediction, rank
from vitrail.model.vit import VisionTransformer

__all__ = ["Classifier", "Picture", "Prediction"]


@dataclass(frozen=True)
class Classifier:
    """A trained model with all it needs to read pictures: its settings and its classes.

    Made by ``vitrail.load``. The model is in evaluation mode on its device.
    """

    model: VisionTransformer
    config: Config
    classes: tuple[str, ...]
    source: str = ""
    notes: tuple[str, ...] = ()
    """What was assumed to read another system's weights."""

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{parameters / 1e6:.1f}M" if parameters >= 100_000 else f"{parameters:,}"
        height, width = self.config.model.image_hw
        return (
            f"Classifier({self.source!r}, {len(self.classes)} classes, {size} parameters, "
            f"{height} x {width}, {self.device})"
        )

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per-channel mean the model was trained with, pixels counted 0 to 1."""
        return self.config.data.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Per-channel standard deviation the model was trained with."""
        return self.config.data.std

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def predict(self, pictures: Pictures, top_k: int = 3) -> list[list[Prediction]]:
        """Return for each picture its ``top_k`` most probable classes, the most probable first.

        Args:
            pictures: one or several; see ``vitrail.data.pictures`` for all that is taken.
            top_k: number of classes for each picture.

        Raises:
            PictureError: a picture cannot be read.
            ConfigError: top_k is below 1.
        """
        return self.predict_raw(self.read(pictures), top_k)

    def predict_raw(self, raw_BHWC: np.ndarray, top_k: int = 3) -> list[list[Prediction]]:
        """Return what ``predict`` returns, of pictures that ``read`` has read."""
        probabilities_BY = self.probabilities(self.normalize(raw_BHWC))
        return rank(probabilities_BY.numpy(), self.classes, top_k)

    def explain(
        self,
        picture: Picture,
        *,
        frames: str | None = None,
        class_name: str | None = None,
        name: str = "",
        **settings: Any,
    ) -> Explanation:
        """Return what the model looked at in one picture; ``.save("x.gif")`` draws it.

        Args:
            picture: any kind of picture.
            frames: what changes from frame to frame: rollout, layers, heads or queries.
            class_name: the class to explain. Default: the predicted one.
            name: what the picture is called. Default: its file's name.
            settings: fields of ``explain.methods.MapSettings``: method, fusion, discard_ratio,
                query, layers, heads. method "all" shows every method, a frame each.

        Raises:
            PictureError: the picture cannot be read.
            ConfigError: an unknown setting, or a class, layer or head that is not there.
        """
        check_names(settings)
        subject, method = self.subject(picture, name=name), settings.pop("method", None)
        if method == ALL:
            require(frames is None, f"method {ALL} has a frame for each method: leave out frames")
            return compare(subject, settings_of_all(**settings), class_name=class_name)
        chosen, _ = choose(method, frames)
        asked = MapSettings(method=chosen, **settings)
        return explain(subject, asked, kind=frames, class_name=class_name)

    def subject(self, picture: Picture, *, name: str = "", label: str = "") -> Subject:
        """Return one picture as explanations need it."""
        named = name or Path(source_name(picture)).name or "picture"
        picture = only_picture(picture)
        raw_1HWC = self.read(picture)
        raw_HWC = raw_1HWC[0]
        return Subject(
            model=self.model,
            image_1CHW=self.normalize(raw_1HWC),
            raw_HWC=raw_HWC if raw_HWC.shape[2] == 3 else gray_to_rgb(raw_HWC[:, :, 0]),
            picture_HWC=read_picture(picture, pixel_range=self.config.data.pixel_range),
            fit=framing(self.config.data),
            classes=self.classes,
            name=named,
            label=label,
        )

    def prepare(self, pictures: Pictures) -> Tensor:
        """Turn pictures of any kind and size into what the model reads.

        Shapes:
            images_BCHW, float32, normalized, on the model's device.

        Raises:
            PictureError: a picture cannot be read.
        """
        return self.normalize(self.read(pictures))

    def read(self, pictures: Pictures, *, background: Color = WHITE) -> np.ndarray:
        """Return pictures of any kind and size as bytes of the model's size (B, H, W, C).

        Raises:
            PictureError: a picture cannot be read.
        """
        model, data = self.config.model, self.config.data
        return stack_pictures(
            pictures,
            model.image_hw,
            model.n_channels,
            framing(data),
            pixel_range=data.pixel_range,
            background=background,
        )

    def normalize(self, raw_BHWC: np.ndarray) -> Tensor:
        """Turn bytes into what the model reads (B, C, H, W), float32, on the model's device."""
        raw_BCHW = torch.from_numpy(raw_BHWC).permute(0, 3, 1, 2).to(self.device)
        return normalize(raw_BCHW, self.mean, self.std)

    def probabilities(self, images_BCHW: Tensor, batch_size: int = 500) -> Tensor:
        """Return class probabilities (B, Y) on the CPU.

        Raises:
            CheckpointError: they are not finite: the weights are damaged.
        """
        with torch.inference_mode():
            parts = [
                self.model(part).float().softmax(1).cpu() for part in images_BCHW.split(batch_size)
            ]
        probabilities_BY = torch.cat(parts) if parts else torch.zeros(0, len(self.classes))
        require_finite(probabilities_BY)
        return probabilities_BY
