"""Checks that the map methods share: layers, heads, classes, and finite output."""

from torch import Tensor

from vitrail.config.settings import require
from vitrail.errors import CheckpointError
from vitrail.explain.map_settings import CLASSLESS, Method
from vitrail.model.vit import VisionTransformer


def pick(name: str, numbers: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Return the selected layers or heads, sorted, without duplicates; None selects all of them."""
    if numbers is None:
        return tuple(range(1, count + 1))
    require(len(numbers) > 0, f"{name}s is empty: give at least one from 1 to {count}")
    for number in numbers:
        require(
            1 <= number <= count,
            f"{name} {number} is not in the model: give one from 1 to {count}",
        )
    return tuple(sorted(set(numbers)))


def require_finite(*outputs: Tensor) -> None:
    """Refuse the output of corrupt or malicious weights.

    Raises:
        CheckpointError: a value is not finite.
    """
    if not all(output.isfinite().all() for output in outputs):
        raise CheckpointError(
            "the model's output is not finite (nan, inf): its weights are corrupt; use other "
            "weights"
        )


def check_call(
    model: VisionTransformer, *, chunk: int, query: tuple[int, int] | None = None
) -> None:
    """Refuse a model in training mode and a query outside the grid."""
    require(not model.training, "the model is in training mode: call model.eval() first")
    require(chunk >= 1, f"chunk is {chunk}: give at least 1")
    rows, columns = model.config.grid_GJ
    require(
        query is None or (0 <= query[0] < rows and 0 <= query[1] < columns),
        f"query {query} is outside the picture's {rows} x {columns} patches: "
        f"give a row from 0 to {rows - 1} and a column from 0 to {columns - 1}",
    )


def check_has_classes(model: VisionTransformer, method: Method) -> None:
    """Refuse a method that explains a class if the model has none."""
    require(
        model.config.n_classes > 0 or method in CLASSLESS,
        f"method {method} explains a class, but the model has none: choose one of "
        f"{', '.join(CLASSLESS)}",
    )


def check_classes(classes_B: Tensor, n_images: int, n_classes: int) -> None:
    """Refuse anything but one class of the model for each image."""
    integer = not (classes_B.is_floating_point() or classes_B.is_complex())
    require(
        integer and classes_B.shape == (n_images,),
        f"classes_B is {classes_B.dtype} of shape {tuple(classes_B.shape)}: "
        f"give integers of shape ({n_images},)",
    )
    for index in classes_B.tolist():
        require(
            0 <= index < n_classes,
            f"class {index} is not in the model: give one from 0 to {n_classes - 1}",
        )
