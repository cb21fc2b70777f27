"""Feature maps: what makes the weight of a query and a key in kernel attention a product, phi(q) . phi(k)."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...parallel.sequence import Sequence
from .lrpe import LRPE


class Features(NamedTuple):
    """Of queries `[B, T, H, F]` and of keys `[B, T, G, F]`, in their type or in float32.

    log_scale `[B, T, G]`, in float32 (float64 for float64): those of a key are to be multiplied by its exponential,
    which may be of any size.
    """

    q: Tensor
    k: Tensor
    log_scale: Tensor | None = None


class FeatureMap(nn.Module):
    """Queries `[B, T, H, K]` and keys `[B, T, G, K]` of `seq`'s tokens to `Features` of `size` for each head.

    A subclass defines `features`, which maps both alike, or `forward`. What is computed in float32 is rounded once.
    products: how many multiplications by matrices take per token.
    """

    size: int
    products: int = 0

    def flops(self, seq: Sequence) -> int:
        """Forward FLOPs of matrices on the tokens of `seq`'s rank."""
        return 2 * seq.places * self.products

    def forward(self, q: Tensor, k: Tensor, seq: Sequence) -> Features:
        return Features(self.features(q, seq), self.features(k, seq))

    def features(self, x: Tensor, seq: Sequence) -> Tensor:
        """`[B, T, H or G, K]` to `[B, T, H or G, size]` in the same type."""
        raise NotImplementedError


class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al., 2020, arXiv 2006.16236)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.size = dim

    def features(self, x: Tensor, seq: Sequence) -> Tensor:
        return (F.elu(widened(x)) + 1).to(x.dtype)


class Relu(FeatureMap):
    """phi(x) = max(x, 0)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.size = dim

    def features(self, x: Tensor, seq: Sequence) -> Tensor:
        return F.relu(x)


class Silu(FeatureMap):
    """phi(x) = silu(x); with `groups` of heads, encoded by position: see `LRPE`, which doubles its size.

    What is encoded by position is in float32: theta's gradient is a sum over tokens times their positions.
    """

    def __init__(self, dim: int, groups: int | None = None) -> None:
        super().__init__()
        self.size = dim if groups is None else 2 * dim
        self.lrpe = None if groups is None else LRPE(groups, dim)

    def forward(self, q: Tensor, k: Tensor, seq: Sequence) -> Features:
        if self.lrpe is None:
            return Features(F.silu(q), F.silu(k))
        return Features(*self.lrpe((F.silu(widened(q)), F.silu(widened(k))), seq))


class CosineReweighting(FeatureMap):
    """phi(x) at position i = [max(x, 0) cos(a i), max(x, 0) sin(a i)], a = pi / (2 max_length) (cosFormer, Qin et al.,
    2022, arXiv 2202.08791), so that phi(q_i) . phi(k_j) = max(q_i, 0) . max(k_j, 0) cos(a (i - j)).

    Raises ValueError, when it is called, for a document of more than `max_length` tokens: weights would be negative.
    """

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {max_length}. Give the longest document's length")
        self.size, self.max_length = 2 * dim, max_length

    def forward(self, q: Tensor, k: Tensor, seq: Sequence) -> Features:
        position = seq.positions_within(self.max_length, q.device)
        angle = (position.double() * (math.pi / 2 / self.max_length))[..., None, None]
        wide = torch.promote_types(q.dtype, torch.float32)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        of_q, of_k = (torch.cat([x.relu() * cos, x.relu() * sin], dim=-1).to(x.dtype) for x in (q, k))
        return Features(of_q, of_k)


class HedgehogMap(FeatureMap):
    """phi(x) = softmax([2 y, -2 y]), y = W x + b with a W and b of its own for each head, one of queries and one of
    keys; a new W is the identity (Hedgehog, Zhang et al., 2024, arXiv 2402.04347).

    The paper's plain form is [exp(y), exp(-y)]; the softmax is its variant for stability, and the factor 2 that of
    flash-linear-attention.
    """

    no_weight_decay = ("query_bias", "key_bias")

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size, self.products = 2 * dim, (heads + kv_heads) * dim**2
        self.query_weight = nn.Parameter(torch.empty(heads, dim, dim))
        self.query_bias = nn.Parameter(torch.empty(heads, dim))
        self.key_weight = nn.Parameter(torch.empty(kv_heads, dim, dim))
        self.key_bias = nn.Parameter(torch.empty(kv_heads, dim))

    def forward(self, q: Tensor, k: Tensor, seq: Sequence) -> Features:
        return Features(
            self.mapped(q, self.query_weight, self.query_bias), self.mapped(k, self.key_weight, self.key_bias)
        )

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = 2 * (torch.einsum("bthi,hoi->btho", x, weight) + bias)
        return torch.cat([y, -y], dim=-1).softmax(dim=-1)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.zero_()
        if name.endswith("weight"):
            tensor.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return True


class PolarityAware(FeatureMap):
    """[x+, x-] of keys, [q+, q-] and [q-, q+] of queries, for which each query head becomes two, of one sign and of the
    opposite one (PolaFormer, Meng et al., 2025, arXiv 2501.15061).

        x+ = max(x / s, 0)^p        x- = max(-x / s, 0)^p        p = 1 + alpha sigmoid(power)        s = softplus(scale)

    power, scale `[kv_heads, dim]`, for queries and keys alike, start at 0. Raises ValueError for a negative alpha.
    """

    no_weight_decay = ("power", "scale")

    def __init__(self, dim: int, heads: int, kv_heads: int, alpha: float) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha must not be negative; got {alpha}. The paper's code has 4")
        self.size, self.alpha, self.groups = 2 * dim, alpha, (kv_heads, heads // kv_heads)
        self.power = nn.Parameter(torch.empty(kv_heads, dim))
        self.scale = nn.Parameter(torch.empty(kv_heads, dim))

    def forward(self, q: Tensor, k: Tensor, seq: Sequence) -> Features:
        plus, minus = self.signs(q.unflatten(2, self.groups), 1)
        queries = torch.stack([torch.cat([plus, minus], dim=-1), torch.cat([minus, plus], dim=-1)], dim=4)
        return Features(queries.flatten(2, 4), torch.cat(self.signs(k, 0), dim=-1))

    def signs(self, x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
        """x+ and x- of `[B, T, kv_heads, …, dim]` with so many dims between."""
        shape = (len(self.power), *[1] * dims, x.shape[-1])
        wide = widened(x)
        power = 1 + self.alpha * torch.sigmoid(self.power.to(wide.dtype).view(shape))
        scaled = wide / F.softplus(self.scale.to(wide.dtype).view(shape))
        return (F.relu(scaled) ** power).to(x.dtype), (F.relu(-scaled) ** power).to(x.dtype)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.zero_()
        return True


class DeterministicProjection(FeatureMap):
    """DPFP-nu: with r = max([x, -x], 0), the products r_i r_(i - j) for j = 1 … nu, indices modulo 2 K: 2 K nu features
    (Schlag et al., 2021, arXiv 2102.11174). Raises ValueError unless 1 <= nu < 2 K.
    """

    def __init__(self, dim: int, nu: int) -> None:
        super().__init__()
        if not 1 <= nu < 2 * dim:
            raise ValueError(
                f"nu must be at least 1 and below twice the key_dim={dim}; got {nu}. The paper takes 1 to 3"
            )
        self.size, self.nu = 2 * dim * nu, nu

    def features(self, x: Tensor, seq: Sequence) -> Tensor:
        r = F.relu(torch.cat([x, -x], dim=-1))
        return torch.cat([r * r.roll(shift, dims=-1) for shift in range(1, self.nu + 1)], dim=-1)


class PositiveRandomFeatures(FeatureMap):
    """FAVOR+: phi(x) = exp(w_m . x' - |x'|^2 / 2) / sqrt(F), m = 1 … F, with x' = x / K^(1/4), whose products are
    exp(q . k / sqrt(K)) in the mean (Performer, Choromanski et al., 2021, arXiv 2009.14794).

    w `[F, K]` are Gaussian, orthogonal within blocks of K, the same for all heads: drawn from (seed, layer), kept in
    checkpoints. For stability the largest exponent of each token is taken out. That of a query cancels in the division;
    that of a key is its `log_scale`, so that the causal sum is exact, and one key's size takes nothing from another's.
    The published code subtracts the largest exponent of all keys, which lie in the future too and on other ranks, and
    adds 1e-6 to every feature.
    """

    projection: Tensor

    def __init__(self, dim: int, heads: int, kv_heads: int, size: int, seed: int, layer: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"features must be at least 1; got {size}. key_dim * log(key_dim) is usual")
        self.size, self.products = size, (heads + kv_heads) * dim * size
        self.register_buffer("projection", orthogonal_gaussian(size, dim, seed, layer))

    def forward(self, q: Tensor, k: Tensor, seq: Sequence) -> Features:
        (of_q, _), (of_k, log_scale) = self.scaled(q), self.scaled(k)
        return Features(of_q, of_k, log_scale)

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of which the largest is 1 / sqrt(F), and the logarithm of what is taken out."""
        wide = widened(x) * x.shape[-1] ** -0.25
        exponent = wide @ self.projection.to(wide.dtype).T - wide.square().sum(-1, keepdim=True) / 2
        most = exponent.detach().amax(-1, keepdim=True)
        return ((exponent - most).exp() * self.size**-0.5).to(x.dtype), most.squeeze(-1)


class TrigonometricFeatures(FeatureMap):
    """phi(x) = [sin(w_m . u), cos(w_m . u)] / sqrt(D), m = 1 … D, with u = x / |x|, whose products are
    exp(-|u_q - u_k|^2 / 2) in the mean for sigma = 1 (Peng et al., 2021, arXiv 2103.02143).

    w = sigma * a Gaussian matrix `[G, D, K]`, one for each key head and its queries, that is drawn from (seed, layer)
    and kept in checkpoints; the learned sigma `[G, K]` starts at 1. The weights can be negative.
    """

    projection: Tensor
    no_weight_decay = ("sigma",)

    def __init__(self, dim: int, heads: int, kv_heads: int, size: int, seed: int, layer: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"features must be at least 1; got {size}. The key_dim is usual")
        self.size, self.products = 2 * size, (heads + kv_heads) * dim * size
        rows = gaussian(kv_heads * size, dim, generator_of(seed, layer))
        self.register_buffer("projection", placed(rows).unflatten(0, (kv_heads, size)))
        self.sigma = nn.Parameter(torch.empty(kv_heads, dim))

    def features(self, x: Tensor, seq: Sequence) -> Tensor:
        wide = widened(x)
        unit = wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        grouped = unit.unflatten(2, (len(self.sigma), -1)) * self.sigma.to(wide.dtype)[:, None]
        angle = torch.einsum("btghk,gdk->btghd", grouped, self.projection.to(wide.dtype)).flatten(2, 3)
        return (torch.cat([angle.sin(), angle.cos()], dim=-1) * (2 / self.size) ** 0.5).to(x.dtype)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0)
        return True


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generator_of(seed: int, layer: int) -> torch.Generator:
    """Of random structure that a layer keeps: the same on every rank and device."""
    digest = hashlib.blake2b(f"{seed}:{layer}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def gaussian(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Normal numbers `[rows, dim]` in float64 on the host."""
    return torch.normal(0.0, 1.0, (rows, dim), generator=generator, dtype=torch.float64, device="cpu")


def orthogonal_gaussian(rows: int, dim: int, seed: int, layer: int) -> Tensor:
    """Rows `[rows, dim]` that are orthogonal within each block of `dim`, each distributed as a normal vector."""
    generator = generator_of(seed, layer)
    blocks = [torch.linalg.qr(gaussian(dim, dim, generator))[0].T for _ in range(-(-rows // dim))]
    lengths = gaussian(rows, dim, generator).norm(dim=1, keepdim=True)
    return placed(torch.cat(blocks)[:rows] * lengths)


def placed(drawn: Tensor) -> Tensor:
    """A drawn tensor in float32 on the device where modules are made, which is `meta` in a rehearsal."""
    return drawn.to(torch.get_default_device(), torch.float32)
