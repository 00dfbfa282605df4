"""One picture and everything that a model attended to in it, as one page that needs no server.

``page.html`` beside this file is the whole page: structure, style and script. This module encodes
the numbers compactly and inserts them. The page computes the maps of any patch itself, from the
attention of every layer and head, or of the layers that fit (see large_page); maps that need
gradients or more forward passes are stored.
"""

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.data.pictures import seen_box
from vitrail.errors import ConfigError, printable
from vitrail.evaluation.calibration import UNCALIBRATED
from vitrail.explain.explanation import Explanation, maps_of
from vitrail.explain.large_page import (
    LayerDetail,
    choose_layers,
    encode_bytes,
    encode_detail,
    is_large,
    read_layers,
)
from vitrail.explain.map_settings import (
    CLASSLESS,
    METHODS,
    REMOVAL,
    VIEWS,
    MapSettings,
    settings_of_all,
)
from vitrail.explain.methods import Maps, early_logits
from vitrail.explain.stored_scores import Badge
from vitrail.explain.token_views import CHANNELS, similarities

SHOWN_CLASSES = 5
"""Number of classes with a bar."""
LARGEST_SIDE = 1200
"""Longer side of a picture in pixels; a larger picture is reduced."""
LARGEST_PNG = 400_000
"""A PNG with more bytes is replaced by a JPEG."""


@dataclass(frozen=True)
class PageData:
    """What the page shows: one picture, and what one model computed for it.

    The maps are those of the whole picture, as the classifier reads it, averaged over the attention
    heads. Attention and rollout are optional, since the page computes them for every patch and head
    from the attention. ``features`` has a color per patch. ``box`` is what the model saw, (left,
    top, right, bottom) in the picture's pixels; with padding it is larger than the picture.
    ``explained`` is the class that the maps explain, or None for the predicted one. There may be no
    classes.

    Shapes:
        attention_LATT, rows are queries and sum to 1; each of maps (L, G, J), or (1, G, J) where
        the method has no layers, and (L, G, J, 3) for features; similarity_LNN, the cosine of
        every patch (column) to every patch. For a large network, instead of those two: rows_LAT,
        the rows that the classifier reads, and details of some layers.

    Raises:
        ConfigError: the shapes do not match.
    """

    picture: Image.Image
    box: tuple[float, float, float, float]
    grid_GJ: tuple[int, int]
    class_token: bool
    classes: tuple[str, ...]
    logits_Y: np.ndarray
    early_logits_LY: np.ndarray
    attention_LATT: np.ndarray | None
    maps: Mapping[str, np.ndarray]
    title: str
    explained: int | None = None
    label: str = ""
    """The true class, if known."""
    mean_pool: bool = False
    """Whether the classifier reads the mean of the patches although there is a class token."""
    n_registers: int = 0
    """Tokens between the class token and the patches."""
    similarity_LNN: np.ndarray | None = None
    rows_LAT: np.ndarray | None = None
    details: tuple[LayerDetail, ...] = ()
    unlike: str = ""
    """A note, if the picture is unlike the training images."""
    badges: tuple[Badge, ...] = ()
    """What the stored scores say about the methods on this model."""
    errors: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Standard errors (G, J) of the maps that are estimates."""

    def __post_init__(self) -> None:
        (n_layers, n_heads), n_classes = self.layers_heads, len(self.classes)
        n_tokens = self.grid_GJ[0] * self.grid_GJ[1] + self.class_token + self.n_registers
        _check("logits_Y", self.logits_Y, (n_classes,))
        _check("early_logits_LY", self.early_logits_LY, (n_layers, n_classes))
        if self.attention_LATT is not None:
            one_LTT = self.attention_LATT[:, 0]
            _check("each head's attention", one_LTT, (n_layers, n_tokens, n_tokens))
        if self.rows_LAT is not None:
            _check("rows_LAT", self.rows_LAT, (n_layers, n_heads, n_tokens))
        for name, map_LGJ in self.maps.items():
            layers = 1 if len(map_LGJ) == 1 else n_layers
            channels = (CHANNELS,) if name == "features" else ()
            _check(f"the map {name}", map_LGJ, (layers, *self.grid_GJ, *channels))
        for name, errors_GJ in self.errors.items():
            _check(f"the errors of {name}", errors_GJ, self.grid_GJ)
        if self.similarity_LNN is not None:
            n_patches = self.grid_GJ[0] * self.grid_GJ[1]
            _check("similarity_LNN", self.similarity_LNN, (n_layers, n_patches, n_patches))

    @property
    def layers_heads(self) -> tuple[int, int]:
        """Number of layers and of heads."""
        found = self.rows_LAT if self.attention_LATT is None else self.attention_LATT
        assert found is not None
        return found.shape[0], found.shape[1]


def _check(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape, or with values that are not finite."""
    if array.shape != shape:
        raise ConfigError(f"{name} has shape {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise ConfigError(
            f"{name} holds values that are not finite: the model's weights contain NaN or inf"
        )


def page_data(explanation: Explanation) -> PageData:
    """Compute everything that the page shows, whatever the explanation's method.

    For a large network, single patches can be selected in the layers that the explanation's
    settings name or, if they name none, in as many as fit.
    """
    subject, index = explanation.subject, explanation.class_index
    model, config = subject.model, subject.model.config
    large, image_1CHW = is_large(config), subject.image_1CHW
    maps = _compute_maps(explanation, large=large)
    logits_Y, n_layers = maps["attention"].logits_BY[0], config.n_layers
    early_LY = early_logits(model, image_1CHW)[0] if subject.classes else torch.zeros(n_layers, 0)
    height, width = subject.picture_HWC.shape[:2]
    picture = Image.fromarray(subject.picture_HWC)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    left, top, right, bottom = seen_box((height, width), config.image_hw, subject.fit)
    x_scale, y_scale = picture.width / width, picture.height / height
    return PageData(
        picture=picture,
        box=(left * x_scale, top * y_scale, right * x_scale, bottom * y_scale),
        grid_GJ=config.grid_GJ,
        class_token=config.has_class_token,
        mean_pool=config.pool == "mean",
        n_registers=config.n_registers,
        classes=subject.classes,
        logits_Y=subject.calibration.scale(logits_Y).numpy(),
        early_logits_LY=subject.calibration.scale(early_LY).numpy(),
        maps={name: each.values_BLGJ[0].numpy() for name, each in maps.items()},
        title=subject.name,
        label=subject.label,
        unlike=subject.unlike,
        badges=subject.verdict.badges if subject.verdict else (),
        errors={
            name: each.errors_BLGJ[0, 0].numpy()
            for name, each in maps.items()
            if each.errors_BLGJ is not None and each.errors_BLGJ.isfinite().all()
        },
        explained=None if not subject.classes or index == int(logits_Y.argmax()) else index,
        **(_large_attention if large else _whole_attention)(explanation),
    )


def _compute_maps(explanation: Explanation, *, large: bool) -> dict[str, Maps]:
    """Return the maps of the methods that the page shows, by method."""
    subject = explanation.subject
    methods = METHODS if subject.classes else [m for m in METHODS if m in CLASSLESS]
    methods = [method for method in methods if not (large and method in REMOVAL)]
    views = [view for view in VIEWS if large or view != "similarity"]
    shown = [*settings_of_all(methods), *(MapSettings(method=view) for view in views)]
    index = explanation.class_index if subject.classes else None
    return {each.method: maps_of(subject, subject.model, each, index) for each in shown}


def _whole_attention(explanation: Explanation) -> dict[str, Any]:
    """Return the attention of every layer and head, and the cosines of all patches."""
    model, image_1CHW = explanation.subject.model, explanation.subject.image_1CHW
    with torch.inference_mode():
        _, attentions = model.forward_with_attention(image_1CHW)
    return {
        "attention_LATT": torch.cat(attentions).cpu().numpy(),
        "similarity_LNN": similarities(model, image_1CHW)[0].numpy(),
    }


def _large_attention(explanation: Explanation) -> dict[str, Any]:
    """Return the rows that the classifier reads, and details of the given layers or what fits."""
    model, asked = explanation.subject.model, explanation.settings.layers
    layers = asked or choose_layers(model.config)
    rows_LAT, details = read_layers(model, explanation.subject.image_1CHW, layers)
    return {"attention_LATT": None, "rows_LAT": rows_LAT, "details": details}


def make_page(data: PageData) -> bytes:
    """Return the page as UTF-8."""
    template = (resources.files("vitrail.explain") / "page.html").read_text("utf-8")
    filled = {
        "POLICY": _content_policy(template),
        "TITLE": html.escape(printable(data.title)),
        "PICTURE": _encode_picture(data.picture),
        "DATA": _embeddable(describe(data)),
    }
    # In one pass: a title that looks like a placeholder stays a title.
    page = re.sub(r"\{\{([A-Z]+)\}\}", lambda placeholder: filled[placeholder[1]], template)
    return page.encode()


def _content_policy(template: str) -> str:
    """Return the policy that allows the page's own style and script only, and no requests."""
    allowed = {"style": "", "script": ""}
    for kind, text in re.findall(r"<(style|script)>(.*?)</\1>", template, flags=re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind] += f" 'sha256-{digest}'"
    return (
        f"default-src 'none'; img-src data:; style-src{allowed['style']}; "
        f"script-src{allowed['script']}; base-uri 'none'; form-action 'none'"
    )


def describe(data: PageData) -> dict[str, Any]:
    """Return everything that the script needs, as JSON values."""
    n_layers, n_heads = data.layers_heads
    predicted = int(data.logits_Y.argmax()) if data.classes else -1
    explained = predicted if data.explained is None else data.explained
    logits_SY = np.concatenate([data.early_logits_LY, data.logits_Y[None]])
    return {
        "grid": list(data.grid_GJ),
        "size": list(data.picture.size),
        "box": list(data.box),
        "classToken": data.class_token,
        "firstPatch": data.class_token + data.n_registers,
        "meanPool": data.mean_pool or not data.class_token,
        "layers": n_layers,
        "heads": n_heads,
        "attention": None if data.attention_LATT is None else encode_attention(data.attention_LATT),
        "rows": None if data.rows_LAT is None else encode_attention(data.rows_LAT),
        "details": [encode_detail(detail) for detail in data.details],
        "maps": {
            name: {"layers": len(map_LGJ), "values": encode_bytes(map_LGJ.astype("<f4"))}
            for name, map_LGJ in data.maps.items()
        },
        "errors": {name: e_GJ.ravel().tolist() for name, e_GJ in data.errors.items()},
        "similarity": None if data.similarity_LNN is None else _encode_cosines(data.similarity_LNN),
        "badges": {
            badge.method: {"srg": badge.srg, "failures": badge.failures} for badge in data.badges
        },
        "explained": printable(data.classes[explained]) if data.classes else "",
        "label": printable(data.label),
        "unlike": data.unlike,
        "right": bool(data.classes) and data.classes[predicted] == data.label,
        "predictions": [
            _top_classes(logits_Y, data.classes) if data.classes else [] for logits_Y in logits_SY
        ],
    }


def _top_classes(logits_Y: np.ndarray, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the most probable classes, in descending order."""
    probabilities_Y = UNCALIBRATED.probabilities(logits_Y.astype(np.float64))  # calibrated already
    best = np.argsort(-probabilities_Y, kind="stable")[:SHOWN_CLASSES]
    return [
        {"index": int(i), "name": printable(classes[i]), "probability": float(probabilities_Y[i])}
        for i in best
    ]


def encode_attention(attention_xT: np.ndarray) -> str:
    """Return the attention in bytes: the square root of each entry's ratio to its row's maximum.

    The root keeps small entries distinct. Row sums need not be stored: they are 1, so that a row is
    its squared bytes divided by their sum.
    """
    largest_x1 = attention_xT.max(axis=-1, keepdims=True)
    roots_xT = np.sqrt(attention_xT / largest_x1)
    return encode_bytes(np.rint(255 * roots_xT).astype(np.uint8))


def _encode_cosines(cosines_LNN: np.ndarray) -> str:
    """Return numbers from -1 to 1 in two bytes each."""
    return encode_bytes(np.rint(32767 * cosines_LNN.clip(-1, 1)).astype("<i2"))


def _encode_picture(picture: Image.Image) -> str:
    """Return the picture as a data URL."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG")
    if png.tell() <= LARGEST_PNG:
        return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    picture.save(jpeg, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def _embeddable(value: Any) -> str:
    """Return JSON in which no text can turn into markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
