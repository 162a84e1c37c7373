"""What each form of LoRA's skinny products costs on this CPU, beside the base product.

    python -m bench.lora_products

Microseconds of CPU time on one thread (medians of interleaved rounds), 1,024 tokens: what torch
offers in place of the C++ operators. docs/fusing.md says what was tried.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

TOKENS, ROUNDS, CALLS = 1024, 25, 3
CASES = [(576, 576, 8), (384, 1536, 8), (1536, 384, 12)]  # in, out, rank


def microseconds(forms: dict[str, Callable[[], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    names, shuffle = list(forms), random.Random(0)
    for form in [*forms.values()] * 2:
        form()
    for _ in range(ROUNDS):
        shuffle.shuffle(names)
        for name in names:
            start = time.thread_time()
            for _ in range(CALLS):
                forms[name]()
            seconds[name].append((time.thread_time() - start) / CALLS)
    return {name: statistics.median(values) * 1e6 for name, values in seconds.items()}


def groups(
    width: int, out: int, rank: int, dtype: torch.dtype
) -> dict[str, dict[str, Callable[[], object]]]:
    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size).to(dtype)

    X, dX = randn(TOKENS, width), randn(TOKENS, width)
    Y, dY = randn(TOKENS, out), randn(TOKENS, out)
    W, bias, A, B = randn(out, width), randn(out), randn(rank, width), randn(out, rank)
    S, dS = randn(TOKENS, rank), randn(TOKENS, rank)
    S1, B1 = randn(TOKENS, rank + 1), randn(out, rank + 1)
    A32, tall, flat = randn(32, width), randn(TOKENS, rank), randn(rank, out)
    blocks = (4, TOKENS // 4)

    def linear_expand(alpha: float) -> torch.Tensor:
        return F.linear(X, W, bias).addmm_(S, B.t(), alpha=alpha)

    return {
        "forward, with bias": {
            "bias in the low-rank product": lambda: F.linear(X, W).addmm_(S1, B1.t()),
            "bias in the base product": lambda: linear_expand(1.0),
            "the same, alpha 2": lambda: linear_expand(2.0),
            "base product alone": lambda: F.linear(X, W),
        },
        "Y += S B^T": {
            "addmm_": lambda: Y.addmm_(S, B.t()),
            "alpha 2": lambda: Y.addmm_(S, B.t(), alpha=2.0),
            "product, then addition": lambda: Y.add_(torch.mm(S, B.t())),
            "merge instead: W + B A": lambda: torch.addmm(W, B, A),
        },
        "S = X A^T": {
            "X A^T": lambda: torch.mm(X, A.t()),
            "(A X^T)^T": lambda: torch.mm(A, X.t()),
            "rank padded to 32": lambda: torch.mm(X, A32.t()),
        },
        "dS = dY B": {
            "into its columns": lambda: tall.addmm_(dY, B, beta=0.0),
            "alpha 2": lambda: tall.addmm_(dY, B, beta=0.0, alpha=2.0),
            "(B^T dY^T)^T": lambda: torch.mm(B.t(), dY.t()),
        },
        "dB = dY^T S": {
            "(S^T dY)^T": lambda: torch.mm(S.t(), dY),
            "alpha 2": lambda: flat.addmm_(S.t(), dY, beta=0.0, alpha=2.0),
            "dY^T S": lambda: torch.mm(dY.t(), S),
            "4 blocks of rows, summed": lambda: torch.bmm(
                S.view(*blocks, rank).transpose(1, 2), dY.view(*blocks, out)
            ).sum(0),
        },
        "dA = dS^T X": {
            "dS^T X": lambda: torch.mm(dS.t(), X),
            "(X^T dS)^T": lambda: torch.mm(X.t(), dS),
        },
        "dX += dS A": {
            "addmm_": lambda: dX.addmm_(dS, A),
            "product, then addition": lambda: dX.add_(torch.mm(dS, A)),
        },
    }


def main() -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for width, out, rank in CASES:
            print(f"\n{str(dtype).removeprefix('torch.')}, {width} -> {out}, rank {rank}")
            for title, forms in groups(width, out, rank, dtype).items():
                found = [f"{name} {value:.0f}" for name, value in microseconds(forms).items()]
                print(f"  {title}: " + "; ".join(found), flush=True)


if __name__ == "__main__":
    main()
