"""``vitrail convert``."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vitrail.cli.console import print_out
from vitrail.cli.parsing import parse
from vitrail.config.settings import PREPARATION, Preparation
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from vitrail.weights.pretrained import Source


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ConvertOptions:
    """Convert weights from and to other libraries.

    SOURCE is any model: a run or checkpoint folder, a .safetensors file of Vitrail; a .pt of the
    reference implementation; a .safetensors, .pth or folder of timm; a Hugging Face folder; a .npz
    of Google; hf:OWNER/NAME.

    For example:
      vitrail convert hf:google/vit-base-patch16-224 vit.safetensors
      vitrail convert vit.safetensors folder --layout huggingface
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The weights to read."""
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """Where to write: a file (vitrail: .safetensors, reference: .pt, google: .npz) or a folder."""
    layout: Literal["vitrail", "timm", "huggingface", "google", "reference"] = "vitrail"
    """Format of DEST."""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not record it."""
    image_size: int | tuple[int, int] | None = None
    """New image size in pixels; learned positions are resized. Default: unchanged."""
    n_classes: int | None = None
    """New number of classes, with --new_head. Default: unchanged."""
    new_head: bool = False
    """Replace the head with a new, random one."""
    preparation: Preparation = field(default_factory=Preparation)


def command(args: Sequence[str]) -> int:
    """Run ``vitrail convert``."""
    options = parse(ConvertOptions, args, prog="vitrail convert")
    if options.n_classes is not None and not options.new_head:
        raise ConfigError("--n_classes needs a new head: give --new_head too")
    from vitrail.weights.pretrained import read, remodel, save

    heads, given = options.n_attention_heads, options.preparation
    found = read(
        options.source, n_attention_heads=heads, image_size=options.image_size, preparation=given
    )
    if options.new_head:
        n_classes = options.n_classes or found.info.config.model.n_classes
        if not n_classes:
            raise ConfigError(f"{options.source} has no head: give --n_classes N too")
        model = dataclasses.replace(found.info.config.model, n_classes=n_classes)
        found = remodel(found, model, new_head=True)
    save(found, options.dest, options.layout)
    _report(found, options)
    return 0


def _report(found: "Source", options: ConvertOptions) -> None:
    """Print what was read, what was assumed, and what was written."""
    model, data = found.info.config.model, found.info.config.data
    size = " x ".join(map(str, dict.fromkeys(model.image_hw)))
    names = ("patch_size", "embed_dim", "n_layers", "n_attention_heads", "n_classes")
    notes = list(found.notes)
    if options.layout in ("google", "reference"):
        settings = (f"{n} {getattr(data, n)}" for n in PREPARATION if getattr(data, n) is not None)
        notes.append(f"the file does not say how pictures are prepared: {', '.join(settings)}")
    fitted = found.info.calibration
    if options.layout != "vitrail" and fitted.temperature != 1:
        undo = f"undo the label smoothing {fitted.smoothing:g} and " if fitted.smoothing else ""
        notes.append(
            f"{options.layout} cannot store the temperature {fitted.temperature:.2f} of the "
            f"probabilities: to calibrate them, {undo}divide the logits by it"
        )
    lines = [
        f"{options.source} ({found.layout}, {found.tensors or len(found.weights)} tensors) -> "
        f"{options.dest} ({options.layout})",
        f"image_size {size}, " + ", ".join(f"{name} {getattr(model, name)}" for name in names),
        *notes,
        "all other tensors read unchanged" if found.notes else "all tensors read unchanged",
    ]
    print_out("\n  ".join(lines))
