"""Weights & Biases: a run of the project that WANDB_PROJECT names; WANDB_MODE=offline needs no account."""

import importlib
from typing import Any

from upath import UPath

wandb: Any = importlib.import_module("wandb")  # not this file


class Wandb:
    def __init__(self, run: str, folder: UPath, settings: dict[str, Any]) -> None:
        self._run = wandb.init(name=run, dir=str(folder), config=settings, reinit="create_new")

    def __call__(self, epoch: int, values: dict[str, float]) -> None:
        self._run.log(values, step=epoch)

    def close(self) -> None:
        self._run.finish()
