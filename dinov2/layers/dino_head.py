"""The projection head: MLP, L2 normalisation, weight-normalised linear layer to the prototypes, if any."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are weight_g * v / |v|. Public names: weight_g [K, 1], weight_v [K, d]."""

    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(prototypes, dim), a=5**0.5))

    def forward(self, x: Tensor) -> Tensor:  # [..., d] → [..., K]
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """dim → hidden → … → bottleneck → prototypes. Public names: mlp.0, mlp.2, mlp.4, last_layer.weight_{g,v}.

    Without prototypes (0) it ends at the bottleneck, in unit vectors.
    """

    def __init__(self, dim: int, prototypes: int, layers: int = 3, hidden: int = 2048, bottleneck: int = 256):
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1) + [bottleneck]
        modules: list[nn.Module] = []
        for inside, outside in zip(widths[:-1], widths[1:], strict=True):
            linear = nn.Linear(inside, outside)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            modules += [linear, nn.GELU()]
        # A head of one layer is a lone linear layer under the name "mlp", as the public code has it.
        self.mlp = nn.Sequential(*modules[:-1]) if layers > 1 else modules[0]
        self.last_layer = WeightNormLinear(bottleneck, prototypes) if prototypes else nn.Identity()
        self.observing = False  # when set, forward keeps what it normalises in `bottleneck`
        self.bottleneck: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # [..., D] → [..., K] or [..., d]
        x = self.mlp(x)
        if self.observing:
            self.bottleneck = x.detach()
        return self.last_layer(F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12))
