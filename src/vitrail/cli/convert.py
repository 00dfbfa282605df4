"""``vitrail convert``."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vitrail.cli.console import out
from vitrail.cli.options import Preparation
from vitrail.cli.parsing import parse
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from vitrail.weights.pretrained import Source

PROG = "vitrail convert"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ConvertOptions:
    """Bring weights in from other systems, and out to them.

    SOURCE is anything that a model can be named by: a run or checkpoint folder, a .safetensors
    file of Vitrail; the reference system's .pt; timm's .safetensors, .pth or folder; a Hugging
    Face folder; Google's .npz; hf:OWNER/NAME. DEST is a .safetensors file unless --layout says
    otherwise.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The weights to read."""
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """A file (vitrail: .safetensors, reference: .pt, google: .npz) or a folder (the others)."""
    layout: Literal["vitrail", "timm", "huggingface", "google", "reference"] = "vitrail"
    """How the weights are written."""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not say it."""
    image_size: int | tuple[int, int] | None = None
    """Another image size in pixels: learned positions are resized."""
    n_classes: int | None = None
    """Another number of classes, with --new_head."""
    new_head: bool = False
    """Begin a new, random head."""
    preparation: Preparation = field(default_factory=Preparation)


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail convert``."""
    options = parse(ConvertOptions, words, prog=prog)
    if options.n_classes is not None and not options.new_head:
        raise ConfigError("--n_classes asks for another head: give --new_head too")
    from vitrail.weights.pretrained import read, remodel, save

    heads, given = options.n_attention_heads, options.preparation.given()
    found = read(options.source, n_attention_heads=heads, preparation=given)
    changes: dict[str, Any] = {
        name: value
        for name in ("image_size", "n_classes")
        if (value := getattr(options, name)) is not None
    }
    if changes or options.new_head:
        model = dataclasses.replace(found.info.config.model, **changes)
        found = remodel(found, model, new_head=options.new_head)
    save(found, options.dest, options.layout)
    report(found, options)
    return 0


def silent(found: "Source", layout: str) -> list[str]:
    """Return a line of what a layout of the weights alone does not say of the pictures."""
    from vitrail.config.settings import PREPARATION

    if layout not in ("google", "reference"):
        return []
    data = found.info.config.data
    told = [f"{n} {getattr(data, n)}" for n in PREPARATION if getattr(data, n) is not None]
    return [f"  the file does not say how pictures are prepared: {', '.join(told)}"]


def report(found: "Source", options: ConvertOptions) -> None:
    """Say what was read, what was assumed, and what was written."""
    model = found.info.config.model
    size = " x ".join(map(str, dict.fromkeys(model.image_hw)))
    count = found.tensors or len(found.weights)
    lines = [
        f"{options.source} ({found.layout}, {count} tensors) -> {options.dest} ({options.layout})",
        f"  image_size {size}, patch_size {model.patch_size}, embed_dim {model.embed_dim}, "
        f"n_layers {model.n_layers}, n_attention_heads {model.n_attention_heads}, "
        f"n_classes {model.n_classes}",
        *(f"  {note}" for note in found.notes),
        *silent(found, options.layout),
        "  every other tensor is read as it is",
    ]
    out.print("\n".join(lines), markup=False, soft_wrap=True)
