"""Optional libraries, imported only by the commands that need them."""

import importlib
from types import ModuleType

from vitrail.errors import ConfigError

EXTRAS = {
    "huggingface_hub": "hub",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "optuna": "sweep",
    "tensorboard": "track",
}
"""The extra that installs a library. Libraries without an extra are installed by the user."""


def import_optional(module: str) -> ModuleType:
    """Return a module of an optional library.

    Raises:
        ConfigError: the library is not installed (the message says how to) or broken.
    """
    library = module.partition(".")[0]
    wanted = f'-e ".[{EXTRAS[library]}]"' if library in EXTRAS else library
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == library:
            raise ConfigError(f"{library} is not installed: pip install {wanted}") from error
        raise ConfigError(
            f"{library} lacks {error.name}: pip install --force-reinstall {wanted}"
        ) from error
    except ImportError as error:
        raise ConfigError(f"{library} cannot be imported: {error}") from error
