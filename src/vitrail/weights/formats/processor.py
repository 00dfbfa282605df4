"""Hugging Face's preprocessor_config.json: how pictures are prepared, read and written.

Source: https://github.com/huggingface/transformers, models/vit/image_processing_vit.py and
models/clip/image_processing_clip.py: resize, center crop, rescale, normalize, in this order.
"""

from typing import Any

from vitrail.config.settings import DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.weights.formats.rules import WAY_OUT, three

FILE = "preprocessor_config.json"
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Filters in the order of Pillow's numbers."""
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
HARMLESS = ("do_convert_rgb", "do_reduce_labels")
"""Steps that Vitrail always does, or that do not concern the picture."""
FOREIGN = ("crop_pct", "rescale_offset", "offset")
"""Settings of processors that work in another way."""
SQUARE = ("ViT", "DeiT", "Beit")
"""Processors whose size, if one number, is both sides; others mean the shorter one."""
COMPLETE = ("do_resize", "do_center_crop", "do_normalize", "size", "resample", "image_mean",
            "image_std")  # fmt: skip
"""What a processor must specify if its defaults are not those of ViTImageProcessor."""


def read_processor(
    about: dict[str, Any], image_hw: tuple[int, int], notes: list[str]
) -> dict[str, Any]:
    """Return the fields of DataConfig that the file specifies.

    Raises:
        CheckpointError: it asks for something that Vitrail does not do.
    """
    kind = str(about.get("image_processor_type") or about.get("feature_extractor_type") or "ViT")
    steps = {name for name in about if name.startswith("do_")} - {*STEPS, *HARMLESS}
    if strange := sorted(name for name in (*steps, *FOREIGN) if about.get(name)):
        raise CheckpointError(
            f"{FILE}: {strange[0]} {about[strange[0]]!r:.40}: Vitrail does not do that: {WAY_OUT}"
        )
    if not kind.startswith("ViT") and (gaps := [name for name in COMPLETE if name not in about]):
        raise CheckpointError(f"{FILE} of a {kind:.60} does not specify {gaps[0]}: {WAY_OUT}")
    data = colors(about)
    if (filter_number := about.get("resample")) is not None:
        if filter_number not in range(len(FILTERS)):
            raise CheckpointError(f"{FILE}: resample {filter_number!r:.40}: a number from 0 to 5")
        data["interpolation"] = FILTERS[filter_number]
    return data | geometry(about, kind, image_hw, notes)


def colors(about: dict[str, Any]) -> dict[str, Any]:
    """Return mean and std for pixels of 0..1, where the file specifies them or another scale."""
    factor = float(about.get("rescale_factor", 1 / 255)) if about.get("do_rescale", True) else 1.0
    scale = 255 * factor
    if not about.get("do_normalize", True):
        return {"mean": (0.0,) * 3, "std": (1 / scale,) * 3}
    found = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if about.get(theirs) is not None or scale != 1:
            values = three(about.get(theirs, 0.5), f"{FILE}: {theirs}")
            found[ours] = tuple(value / scale for value in values)
    return found


def geometry(
    about: dict[str, Any], kind: str, image_hw: tuple[int, int], notes: list[str]
) -> dict[str, Any]:
    """Return fit and crop_pct.

    Raises:
        CheckpointError: the pictures that the file makes are none that the model reads.
    """
    crops = bool(about.get("do_center_crop"))
    crop_hw = sides(about.get("crop_size", image_hw)) if crops else None
    if not about.get("do_resize", True):
        if crops:
            raise CheckpointError(f"{FILE}: do_center_crop without do_resize: {WAY_OUT}")
        notes.append("do_resize is false: pictures of another size are stretched all the same")
        return {"fit": "squash", "crop_pct": 1.0}
    size = about.get("size")
    if size is None and not crops:
        return {}
    edge = shortest_edge(size, kind)
    resized_hw = (edge, edge) if edge else sides(size or image_hw)
    if (made_hw := crop_hw or resized_hw) != image_hw:
        raise CheckpointError(
            f"{FILE} makes pictures of {made_hw[0]} x {made_hw[1]} pixels, but the model reads "
            f"{image_hw[0]} x {image_hw[1]}"
        )
    shares = {image / side for image, side in zip(image_hw, resized_hw, strict=True)}
    if len(shares) > 1 or max(shares) > 1:
        raise CheckpointError(f"{FILE}: size {size} with crop_size {crop_hw}: {WAY_OUT}")
    if edge and not crops:
        notes.append("pictures that are not square are cropped")
    return {"fit": "crop" if edge else "squash", "crop_pct": shares.pop()}


def shortest_edge(size: Any, kind: str) -> int | None:
    """Return the length of the shorter side after resizing, if the file specifies that alone."""
    if isinstance(size, int) and not kind.startswith(SQUARE):
        return size
    if isinstance(size, dict) and size.get("shortest_edge") and not size.get("longest_edge"):
        return int(size["shortest_edge"])
    return None


def sides(size: Any) -> tuple[int, int]:
    """Return height and width of one number, a pair, or a table."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        if {"height", "width"} - set(size):
            raise CheckpointError(f"{FILE}: size {size!s:.60}: {WAY_OUT}")
        return int(size["height"]), int(size["width"])
    return int(size[0]), int(size[1])


def write_processor(model: ModelConfig, data: DataConfig, about: dict[str, Any]) -> dict[str, Any]:
    """Return the file that prepares pictures as the model wants them.

    Raises:
        ConfigError: no processor fits pictures as this model wants it.
    """
    height, width = model.image_hw
    if data.fit == "pad" or (data.fit == "crop" and height != width):
        raise ConfigError(
            f"Hugging Face's image processors have no fit {data.fit} to {height} x {width} pixels: "
            "choose what comes nearest, --fit squash for example"
        )
    cut = data.fit == "crop" or data.crop_pct < 1
    kind = "CLIP" if data.fit == "crop" else "DeiT" if cut else "ViT"
    rows, columns = round(height / data.crop_pct), round(width / data.crop_pct)
    size = {"shortest_edge": rows} if data.fit == "crop" else {"height": rows, "width": columns}
    crop = {"do_center_crop": cut, "crop_size": {"height": height, "width": width}}
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": model.n_channels == 3,
        "do_resize": True,
        "size": size,
        "resample": FILTERS.index(data.interpolation),
        **(crop if cut else {"do_center_crop": False}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(about["mean"]),
        "image_std": list(about["std"]),
    }
