"""Pictures -> predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrine.config import Config
from vitrine.data.images import normalise
from vitrine.data.pictures import Picture, fit_picture, read_picture, stack_pictures
from vitrine.explain.explanation import Explanation, Subject, choose, explain
from vitrine.explain.methods import MapSettings
from vitrine.explain.walk import require_finite
from vitrine.model import VisionTransformer
from vitrine.predictions import Prediction, rank

__all__ = ["Classifier", "Picture", "Prediction"]


@dataclass(frozen=True)
class Classifier:
    """A trained model with all it needs to read pictures: its settings and its classes.

    Made by ``vitrine.load``. The model is in evaluation mode on its device.
    """

    model: VisionTransformer
    config: Config
    classes: tuple[str, ...]
    source: str = ""
    notes: tuple[str, ...] = ()
    """What was assumed to read another system's weights."""

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

    def predict(
        self, pictures: Picture | Sequence[Picture], top_k: int = 3
    ) -> list[list[Prediction]]:
        """Return for each picture its ``top_k`` most probable classes, the most probable first.

        Raises:
            PictureError: a picture cannot be read.
            ConfigError: top_k is below 1.
        """
        return rank(self.probabilities(self.prepare(pictures)).numpy(), self.classes, top_k)

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
            frames: what goes on from frame to frame: rollout, layers, heads or queries.
            class_name: the class to explain; the predicted one unless given.
            name: what the picture is called; its file's name unless given.
            settings: fields of ``explain.methods.MapSettings``: method, fusion, discard_ratio,
                query, layers, heads.

        Raises:
            PictureError: the picture cannot be read.
            ConfigError: settings that cannot be, or a class, layer or head that is not there.
        """
        method, _ = choose(settings.pop("method", None), frames)
        asked = MapSettings(method=method, **settings)
        subject = self.subject(picture, name=name)
        return explain(subject, asked, kind=frames, class_name=class_name)

    def subject(self, picture: Picture, *, name: str = "", label: str = "") -> Subject:
        """Return one picture as explanations need it."""
        rgb_HWC = picture if isinstance(picture, np.ndarray) else read_picture(picture)
        named = name or (Path(picture).name if isinstance(picture, str | Path) else "picture")
        return Subject(
            model=self.model,
            image_1CHW=self.prepare(rgb_HWC),
            raw_HWC=fit_picture(rgb_HWC, self.config.model.image_hw, self.config.data.fit),
            picture_HWC=rgb_HWC,
            fit=self.config.data.fit,
            classes=self.classes,
            name=named,
            label=label,
        )

    def prepare(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Turn pictures of any kind and size into what the model reads.

        Shapes:
            images_BCHW, float32, normalised, on the model's device.
        """
        model = self.config.model
        raw_BHWC = stack_pictures(pictures, model.image_hw, model.n_channels, self.config.data.fit)
        raw_BCHW = torch.from_numpy(raw_BHWC).permute(0, 3, 1, 2).to(self.device)
        return normalise(raw_BCHW, self.mean, self.std)

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
