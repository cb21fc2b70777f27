"""What benchmarks/ops/kernels.py times: each op at one length, and what a user would take instead of it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longreach.kernels import delta_rule as delta
from longreach.kernels import diagonal_scan as diagonal
from longreach.kernels import gated_linear as gated
from longreach.kernels import selective_scan as selective
from longreach.kernels import short_conv as conv
from longreach.kernels import softmax as attention
from longreach.kernels.grouped_matmul import flops as grouped_flops
from longreach.kernels.grouped_matmul import grouped_matmul
from longreach.kernels.pointwise import cross_entropy, rms_norm, swiglu

HEADS, DIM = (16, 128) if torch.cuda.is_available() else (8, 64)  # what fills the device
STATES, KEY_STATES, GOAL_LENGTH = 16, 128, 8192  # of Mamba, of Mamba-2
VOCABULARY = 32768 if torch.cuda.is_available() else 4096
Pass = Callable[[], None]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Case(NamedTuple):
    """An op at one length: its pass, its FLOPs, and its peers' passes by name."""

    ours: Pass
    flops: int
    peers: dict[str, Pass]


def differentiated(function: Function, inputs: list[Tensor], frozen: tuple[int, ...] = ()) -> Pass:
    """A forward, and a backward to all inputs but the frozen ones, for a fixed gradient of the first output."""
    leaves = [x.detach().clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    wanted = [x for x in leaves if x.requires_grad]
    gradient: list[Tensor] = []

    def run() -> None:
        out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        if not gradient:
            gradient.append(torch.randn_like(out))
        torch.autograd.grad(out, wanted, gradient[0])

    return run


def draw(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def decays(*shape: int, device: str) -> Tensor:
    return -0.1 * torch.rand(*shape, device=device)


def attempt(build: Callable[[], Pass]) -> Pass | None:
    """A peer's pass, or None where it is not installed."""
    try:
        return build()
    except (ImportError, AttributeError):
        return None


def later(package: str, build: Callable[[], Pass]) -> Pass | None:
    """A peer's pass that is built when it first runs, since importing the package takes seconds; None without it."""
    if importlib.util.find_spec(package) is None:
        return None
    built: list[Pass] = []

    def run() -> None:
        if not built:
            built.append(build())
        built[0]()

    return run


def torch_form(function: Function) -> Function:
    """transformers' own torch code, where it would call another package's kernels if that is installed."""
    return inspect.unwrap(function)


def softmax_case(length: int, device: str) -> Case:
    q, k, v = (draw(1, length, HEADS, DIM, device=device) for _ in range(3))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def flash() -> Pass:
        from flash_attn import flash_attn_func

        return differentiated(lambda q, k, v: flash_attn_func(q, k, v, causal=True), [q, k, v])

    def flash_3() -> Pass:
        from flash_attn_interface import flash_attn_func

        return differentiated(lambda q, k, v: flash_attn_func(q, k, v, causal=True), [q, k, v])

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    peers = {"torch SDPA": differentiated(sdpa, [q, k, v])}
    if device == "cuda":
        peers["SDPA by cuDNN"] = differentiated(cudnn, [q, k, v])
        peers["own Triton"] = differentiated(
            lambda q, k, v: attention.softmax_attention(q, k, v, backend="triton"), [q, k, v]
        )
        libraries = {"flash-attn": attempt(flash), "flash-attn 3": attempt(flash_3)}
        peers |= {who: pass_ for who, pass_ in libraries.items() if pass_}
    flops = attention.flops(length * (length + 1) // 2, heads=HEADS, key_dim=DIM, value_dim=DIM)
    return Case(differentiated(attention.softmax_attention, [q, k, v]), flops, peers)


def gated_case(decay: str) -> Callable[[int, str], Case]:
    def case(length: int, device: str) -> Case:
        q, k, v = (draw(1, length, HEADS, DIM, device=device) for _ in range(3))
        shapes = {"constant": (HEADS,), "scalar": (1, length, HEADS), "per channel": (1, length, HEADS, DIM)}
        log_decay = decays(*shapes[decay], device=device)
        peers = {}
        if decay != "per channel" and device == "cpu" and (pass_ := attempt(lambda: minimax(length))):
            peers["transformers"] = pass_
        if device == "cuda" and (pass_ := later("fla", lambda: fla_gated(decay, q, k, v, log_decay))):
            peers["flash-linear-attention"] = pass_
        flops = gated.flops(length, heads=HEADS, key_dim=DIM, value_dim=DIM)
        frozen = (3,) if decay == "constant" else ()
        return Case(differentiated(gated.gated_linear_attention, [q, k, v, log_decay], frozen), flops, peers)

    return case


def fla_gated(decay: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Pass:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if decay == "per channel":
        return differentiated(chunk_gla, [q, k, v, log_decay])
    if decay == "scalar":
        return differentiated(chunk_simple_gla, [q, k, v, log_decay])
    return differentiated(lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=log_decay), [q, k, v])


def minimax(length: int) -> Pass:
    """Lightning attention of transformers' MiniMax without its projections, norm and gate."""
    from transformers.models.minimax import modeling_minimax as modeling

    config = modeling.MiniMaxConfig(
        hidden_size=3 * HEADS * DIM, num_attention_heads=HEADS, head_dim=DIM, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    module = modeling.MiniMaxLightningAttention(config, layer_idx=0)
    module.qkv_proj = module.out_proj = module.norm = module.act_fn = torch.nn.Identity()
    module.output_gate = torch.nn.Identity()
    module.output_gate.forward = lambda x: x[..., : HEADS * DIM]
    return differentiated(lambda x: module(x, None, None)[0], [torch.randn(1, length, 3 * HEADS * DIM)])


def delta_case(decay: str) -> Callable[[int, str], Case]:
    def case(length: int, device: str) -> Case:
        q, k, v = (draw(1, length, HEADS, DIM, device=device) for _ in range(3))
        k = F.normalize(k.float(), dim=-1).to(k.dtype)
        beta = torch.rand(1, length, HEADS, device=device).to(q.dtype)
        shapes = {"scalar": (1, length, HEADS), "per channel": (1, length, HEADS, DIM)}
        log_decay = decays(*shapes[decay], device=device)
        peers = {}

        def transformers_rule() -> Pass:
            from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as rule

            return differentiated(
                lambda q, k, v, g, beta: torch_form(rule)(q, k, v, g, beta)[0], [q, k, v, log_decay, beta]
            )

        def fla_rule() -> Pass:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
            from fla.ops.kda import chunk_kda

            rule = chunk_gated_delta_rule if decay == "scalar" else chunk_kda
            return differentiated(rule, [q, k, v, log_decay, beta])

        if decay == "scalar" and device == "cpu" and (pass_ := attempt(transformers_rule)):
            peers["transformers"] = pass_
        if device == "cuda" and (pass_ := later("fla", fla_rule)):
            peers["flash-linear-attention"] = pass_
        flops = delta.flops(length, heads=HEADS, key_dim=DIM, value_dim=DIM)
        return Case(differentiated(delta.delta_rule, [q, k, v, beta, log_decay]), flops, peers)

    return case


def mamba2_case(length: int, device: str) -> Case:
    """Mamba-2's recurrence: q = C and k = B of one group, v = dt x, decay dt A."""
    x = draw(1, length, HEADS, DIM, device=device)
    dt = 0.1 * torch.rand(1, length, HEADS, device=device)
    a = -torch.rand(HEADS, device=device)
    b, c = (draw(1, length, 1, KEY_STATES, device=device) for _ in range(2))

    def ours(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return gated.gated_linear_attention(c, b, dt.unsqueeze(-1).to(x.dtype) * x, dt * a, scale=1.0)[0]

    def transformers_scan() -> Pass:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan as scan

        return differentiated(lambda x, dt, a, b, c: torch_form(scan)(x, dt, a, b, c, 256), [x, dt, a, b, c])

    flops = gated.flops(length, heads=HEADS, key_dim=KEY_STATES, value_dim=DIM)
    pass_ = attempt(transformers_scan) if device == "cpu" else None
    return Case(differentiated(ours, [x, dt, a, b, c]), flops, {"transformers": pass_} if pass_ else {})


def selective_case(length: int, device: str) -> Case:
    channels = HEADS * DIM
    x = draw(1, length, channels, device=device)
    step = 0.1 * torch.rand(1, length, channels, device=device)
    a = -torch.rand(channels, STATES, device=device) - 0.5
    b, c = (draw(1, length, STATES, device=device) for _ in range(2))

    def transformers_scan() -> Pass:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan as scan

        def function(x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            result = torch_form(scan)(*(y.transpose(1, 2) for y in (x, step)), a, *(y.transpose(1, 2) for y in (b, c)))
            return result[0] if isinstance(result, tuple) else result

        return differentiated(function, [x, step, a, b, c])

    flops = selective.flops(length, channels=channels, states=STATES)
    pass_ = attempt(transformers_scan) if device == "cpu" and length <= 1024 else None  # a loop: minutes beyond
    return Case(
        differentiated(selective.selective_scan, [x, step, a, b, c]), flops, {"transformers": pass_} if pass_ else {}
    )


def diagonal_case(length: int, device: str) -> Case:
    channels = HEADS * DIM
    x, log_decay = draw(1, length, channels, device=device), decays(1, length, channels, device=device)
    flops = diagonal.flops(length, channels=channels)
    return Case(differentiated(diagonal.diagonal_scan, [x, log_decay]), flops, {})


def conv_case(length: int, device: str) -> Case:
    channels, taps = HEADS * DIM, 4
    x, weight = draw(1, length, channels, device=device), draw(channels, taps, device=device)

    def torch_conv(x: Tensor, weight: Tensor) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
        return F.conv1d(padded, weight.unsqueeze(1), groups=channels).transpose(1, 2)

    peers = {"torch conv1d": differentiated(torch_conv, [x, weight])}
    return Case(differentiated(conv.short_conv, [x, weight]), 2 * taps * length * channels, peers)


def liger(module: str, name: str, inputs: list[Tensor], *options: object) -> dict[str, Pass]:
    """Liger's function of the inputs and options as its users call it, where it is installed."""

    def build() -> Pass:
        function = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
        return differentiated(lambda *x: function.apply(*x, *options), inputs)

    pass_ = later("liger_kernel", build) if inputs[0].is_cuda else None
    return {"Liger-Kernel": pass_} if pass_ else {}


def norm_case(length: int, device: str) -> Case:
    x, weight = draw(1, length, HEADS * DIM, device=device), draw(HEADS * DIM, device=device)
    peers = {"torch rms_norm": differentiated(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, weight])}
    peers |= liger("rms_norm", "LigerRMSNormFunction", [x, weight], 1e-6)
    return Case(differentiated(rms_norm, [x, weight]), 4 * length * HEADS * DIM, peers)


def swiglu_case(length: int, device: str) -> Case:
    gate, up = (draw(1, length, 4 * HEADS * DIM, device=device) for _ in range(2))
    peers = {"torch": differentiated(lambda gate, up: F.silu(gate) * up, [gate, up])}
    # Its backward writes over the inputs: what it computes is of other numbers in each round, its time is not.
    peers |= liger("swiglu", "LigerSiLUMulFunction", [gate, up])
    return Case(differentiated(swiglu, [gate, up]), 4 * gate.numel(), peers)


def loss_case(length: int, device: str) -> Case:
    hidden, weight = draw(1, length, HEADS * DIM, device=device), draw(VOCABULARY, HEADS * DIM, device=device) / 64
    targets = torch.randint(VOCABULARY, (1, length), device=device)

    def torch_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).flatten(0, 1).float(), targets.flatten(), reduction="sum")

    peers = {"torch": differentiated(torch_loss, [hidden, weight])}
    flat = [hidden.flatten(0, 1), weight]
    peers |= liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", flat, targets.flatten())
    flops = 2 * length * HEADS * DIM * VOCABULARY
    return Case(differentiated(lambda x, w: cross_entropy(x, w, targets), [hidden, weight]), flops, peers)


def experts_case(length: int, device: str) -> Case:
    """Eight experts of uneven loads."""
    inputs, outputs, groups = HEADS * DIM, 4 * HEADS * DIM, 8
    x, weight = draw(length, inputs, device=device), draw(groups, outputs, inputs, device=device)
    ends = (torch.linspace(0, 1, groups + 1, device=device)[1:].square() * length).int()

    def torch_product(x: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)

    peers = {"torch grouped_mm": differentiated(torch_product, [x, weight])}
    if device == "cuda":
        own = differentiated(lambda x, weight: grouped_matmul(x, weight, ends, backend="triton"), [x, weight])
        peers["own Triton"] = own
    return Case(
        differentiated(lambda x, weight: grouped_matmul(x, weight, ends), [x, weight]),
        grouped_flops(length, inputs=inputs, outputs=outputs),
        peers,
    )


CASES: dict[str, Callable[[int, str], Case]] = {
    "softmax": softmax_case,
    "gated_linear constant": gated_case("constant"),
    "gated_linear scalar": gated_case("scalar"),
    "gated_linear per channel": gated_case("per channel"),
    "delta_rule scalar": delta_case("scalar"),
    "delta_rule per channel": delta_case("per channel"),
    "mamba2": mamba2_case,
    "selective_scan": selective_case,
    "diagonal_scan": diagonal_case,
    "short_conv": conv_case,
    "rms_norm": norm_case,
    "swiglu": swiglu_case,
    "cross_entropy": loss_case,
    "grouped_matmul": experts_case,
}
LINEAR = [name for name in CASES if name != "softmax"]
