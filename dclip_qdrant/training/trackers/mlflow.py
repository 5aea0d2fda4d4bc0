"""MLflow: a run of the experiment that MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME name."""

import importlib
import json
from typing import Any

from upath import UPath

mlflow: Any = importlib.import_module("mlflow")  # not this file


class Mlflow:
    def __init__(self, run: str, folder: UPath, settings: dict[str, Any]) -> None:
        self._client = mlflow.MlflowClient()
        # what MLFLOW_EXPERIMENT_NAME or the default means is resolved by the fluent interface alone
        with mlflow.start_run(run_name=run) as started:
            self._run = started.info.run_id
            mlflow.set_tag("dclip.folder", str(folder))
            mlflow.log_text(json.dumps(settings, indent=1), "recipe.json")

    def __call__(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name.replace("@", "_at_"), value, step=epoch)

    def close(self) -> None:
        self._client.set_terminated(self._run)
