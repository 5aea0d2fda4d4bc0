"""Low-rank updates of a model's matrices (LoRA, Hu et al. 2021), which can be folded into them."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def add(model: nn.Module, names: list[str], rank: int, alpha: float) -> list[str]:
    """Lets low-rank updates learn on every attention, MLP and projection matrix among `names`; what the new
    parameters are called. Convolutions count as matrices over their fan-in."""
    chosen = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, leaf)
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        wanted = (
            leaf in ("weight", "in_proj_weight", "proj", "text_projection")
            and not isinstance(module, nn.Embedding)
            and not grouped
        )
        if wanted and weight.ndim >= 2:
            parametrize.register_parametrization(module, leaf, _LowRank(weight, rank, alpha))
            chosen += [f"{path + '.' if path else ''}parametrizations.{leaf}.0.{p}" for p in ("a", "b")]
    for name, p in model.named_parameters():
        if name in chosen:
            p.requires_grad_(True)
    return chosen


def merge(model: nn.Module) -> None:
    """Folds the updates into the weights: afterwards the model is a plain one again."""
    for module in list(model.modules()):
        for leaf in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The plain state dict as it stands, updates merged; copies, on the CPU."""
    out = {}
    for key, value in model.state_dict().items():
        # X.parametrizations.weight.original (and .0.a, .0.b) -> the merged X.weight
        if "parametrizations." in key:
            path, _, rest = key.rpartition("parametrizations.")
            leaf, _, part = rest.partition(".")
            if part != "original":
                continue
            key, value = path + leaf, getattr(model.get_submodule(path.rstrip(".")), leaf)
        out[key] = value.detach().cpu().clone()
    return out


class _LowRank(nn.Module):
    """W -> W + (alpha / r) B A; B starts at zero, so nothing changes before the first step."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        r = min(rank, rows, columns)
        self.a = nn.Parameter(torch.randn(r, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, r))
        self.scale = alpha / r

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a).view_as(weight)
