"""``vitrail push``."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.console import out, say
from vitrail.cli.options import Preparation
from vitrail.cli.parsing import parse
from vitrail.errors import CheckpointError, ConfigError

PROG = "vitrail push"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class PushOptions:
    """Put a model on the Hugging Face hub: weights, settings, and a generated model card.

    The hub must know you first: hf auth login, or the variable HF_TOKEN.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder (its best checkpoint and its result), or any other model."""
    hub_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Where to put it on the hub."""
    license: str | None = None
    """The hub's name of a licence; mit for weights that Vitrail trained, unless given."""
    private: bool = False
    """Make a new model private."""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not say it."""
    preparation: Preparation = field(default_factory=Preparation)


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail push``."""
    options = parse(PushOptions, words, prog=prog)
    from vitrail.weights import hub
    from vitrail.weights.model_card import write_hub_folder
    from vitrail.weights.pretrained import OWN, read

    hub.hub_api()
    heads, given = options.n_attention_heads, options.preparation.given()
    found = read(options.model, n_attention_heads=heads, preparation=given)
    for note in found.notes:
        say(f"{options.model}: {note}")
    licence = options.license or ("mit" if found.layout == OWN else None)
    if licence is None:
        raise ConfigError(
            f"{options.model}: weights of another system come with a licence of their own: "
            "give --license"
        )
    if not found.info.config.model.n_classes:
        raise CheckpointError(f"{options.model}: weights without a head cannot classify")
    result = read_result(Path(options.model))
    if result is None:
        say(f"{options.model}: not a finished run: its card will have no results")
    with tempfile.TemporaryDirectory() as folder:
        write_hub_folder(Path(folder), found, options.hub_id, licence=licence, result=result)
        address = hub.upload(Path(folder), options.hub_id, private=options.private)
    name = options.hub_id.removeprefix(hub.PREFIX)
    out.print(f"{address}  (licence {licence})", markup=False, soft_wrap=True)
    out.print(f"Try next: vitrail info {hub.PREFIX}{name}", markup=False, soft_wrap=True)
    return 0


def read_result(path: Path) -> dict[str, Any] | None:
    """Return result.json of a finished run, or None."""
    from vitrail.weights.formats.foreign import read_json_object

    return read_json_object(path / "result.json") if (path / "result.json").is_file() else None
