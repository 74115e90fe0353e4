"""The heads of objectives that compare two crops: linear layers with batch normalisation over all ranks."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.distributed import gather_rows, world_size


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of all ranks' rows, in float32. Keeps no running ones: nothing but the
    backbone is used after training.
    """

    def __init__(self, dim: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:  # [n, d] → [n, d]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if world_size() == 1:
                return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
            centred = x - gather_rows(x.mean(dim=0, keepdim=True)).mean(dim=0)
            variance = gather_rows(centred.square().mean(dim=0, keepdim=True)).mean(dim=0)
            x = centred * (variance + self.eps).rsqrt()
            return x if self.weight is None else x * self.weight + self.bias


class Projector(nn.Sequential):
    """dim → hidden → … → out, normalised and rectified between. Names: linear<i>, norm<i>.

    last_norm: the output is normalised too, without scale and shift.
    """

    def __init__(self, dim: int, layers: int, hidden: int, out: int, last_norm: bool):
        widths = [dim] + [hidden] * (layers - 1) + [out]
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, layers + 1):
            last = i == layers
            modules[f"linear{i}"] = nn.Linear(widths[i - 1], widths[i], bias=last and not last_norm)
            if not last or last_norm:
                modules[f"norm{i}"] = BatchNorm(widths[i], affine=not last)
            if not last:
                modules[f"relu{i}"] = nn.ReLU()
        super().__init__(modules)
