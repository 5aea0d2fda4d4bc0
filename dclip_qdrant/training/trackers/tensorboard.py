"""TensorBoard: event files in the run's folder, for `tensorboard --logdir OUT/stages`."""

from typing import Any

from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard
from upath import UPath


class Tensorboard:
    def __init__(self, run: str, folder: UPath, settings: dict[str, Any]) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
