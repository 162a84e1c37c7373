"""float64 disagreements from other people's code: torch's kl_div, scipy's jensenshannon, numpy."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from torch import Tensor

METRICS = ["l1", "tv", "kl", "js", "argmax"]


def outputs64(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> np.ndarray:
    f = rows.double().numpy()
    f = f if weight is None else f @ weight.double().numpy().T
    return f if bias is None else f + bias.double().numpy()


def token_values(f: np.ndarray, g: np.ndarray, metric: str) -> np.ndarray:
    """[N, V] twice -> [N]: the distance of each token."""
    if metric == "l1":
        return np.abs(f - g).mean(-1)
    if metric == "argmax":
        return (f.argmax(-1) != g.argmax(-1)).astype(float)
    p, q = softmax(f, -1), softmax(g, -1)
    if metric == "tv":
        return np.maximum(p - q, 0).sum(-1)  # what p has more than q
    if metric == "js":
        return jensenshannon(p, q, axis=-1) ** 2
    log_p, log_q = (torch.from_numpy(x).log_softmax(-1) for x in (f, g))
    return (
        torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).numpy()
    )


def exact(
    hidden: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    metric: str = "l1",
    reference: Tensor | None = None,
) -> Tensor:
    """[K, K], or [K] with a reference; float64."""
    f = outputs64(hidden, weight, bias)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return token_values(a, b, metric).mean()

    if reference is not None:
        g = outputs64(reference, weight, bias)
        return torch.tensor([mean(a, g) for a in f], dtype=torch.float64)
    return torch.tensor([[mean(a, b) for b in f] for a in f], dtype=torch.float64)


def variants(
    K: int, N: int, D: int, spread: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """K versions of one hidden state, `spread` apart, each rounded to `dtype`."""
    generator = torch.Generator().manual_seed(1000 * K + 10 * N + D + seed)
    base = torch.randn(N, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(K, N, D, generator=generator, dtype=torch.float64)
    return (base + spread * noise).to(dtype)


def head(V: int, D: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(V + D)
    return (torch.randn(V, D, generator=generator, dtype=torch.float64) * scale * D**-0.5).to(dtype)
