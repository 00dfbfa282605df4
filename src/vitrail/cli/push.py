"""``vitrail push``."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vitrail.cli.console import print_err, print_out
from vitrail.cli.parsing import parse
from vitrail.config.settings import Preparation
from vitrail.errors import CheckpointError, ConfigError


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class PushOptions:
    """Upload a model to the Hugging Face hub: weights, settings, and a generated model card.

    Log in first: hf auth login, or set the variable HF_TOKEN.

    For example:
      vitrail push output/quick me/shapes --private
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder (best checkpoint and test result), or any other model."""
    hub_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Id of the model on the hub."""
    license: str | None = None
    """The license, as the hub names it. Default: mit for weights trained by Vitrail."""
    private: bool = False
    """Make the model private, if it is new."""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not record it."""
    preparation: Preparation = field(default_factory=Preparation)


def command(args: Sequence[str]) -> int:
    """Run ``vitrail push``."""
    options = parse(PushOptions, args, prog="vitrail push")
    from vitrail.data.hf import PREFIX
    from vitrail.weights import hub
    from vitrail.weights.checkpoint import read_json_object
    from vitrail.weights.pretrained import OWN, read

    hub.hub_api()
    heads, given = options.n_attention_heads, options.preparation
    found = read(options.model, n_attention_heads=heads, preparation=given)
    for note in found.notes:
        print_err(f"{options.model}: {note}")
    license = options.license or ("mit" if found.layout == OWN else None)
    if license is None:
        raise ConfigError(
            f"{options.model}: weights of another library have their own license: give --license"
        )
    if not found.info.config.model.n_classes:
        raise CheckpointError(f"{options.model}: weights without a head cannot classify")
    path = Path(options.model) / "result.json"
    result = read_json_object(path) if path.is_file() else None
    if result is None:
        print_err(f"{options.model}: not a finished run: its card will have no results")
    with tempfile.TemporaryDirectory() as folder:
        hub.write_hub_folder(
            Path(folder), found.info, found.weights, options.hub_id, license=license, result=result
        )
        address = hub.upload(Path(folder), options.hub_id, private=options.private)
    name = options.hub_id.removeprefix(PREFIX)
    print_out(f"{address}  (license {license})")
    print_out(f"Try next: vitrail info {PREFIX}{name}")
    return 0
