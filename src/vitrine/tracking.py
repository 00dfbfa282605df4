"""TensorBoard events, for those who ask for them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vitrine import ranks
from vitrine.errors import ConfigError, OutputError


class EventWriter:
    """Writes an epoch's numbers as TensorBoard events, or, switched off, nothing.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
        OutputError: the events cannot be written.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.writer: Any = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    'tensorboard is not installed: pip install "vitrine[track]"'
                ) from error
            if ranks.is_leader():
                self.writer = SummaryWriter(str(folder))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write every number of an epoch under its name."""
        if self.writer is not None:
            with told():
                for name, value in row.items():
                    if name not in ("epoch", "step"):
                        self.writer.add_scalar(name, value, row["step"])
                self.writer.flush()  # or a full disk is only found at the next epoch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            with told():
                self.writer.close()


@contextmanager
def told() -> Iterator[None]:
    """Turn what the disk says into our own error."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"TensorBoard events cannot be written: {error.strerror}") from error
