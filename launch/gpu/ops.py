"""Every op: forward and backward at a production shape in bfloat16, and in float32, against float64 on this device."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from ...kernels import compilation
from ...kernels.documents import Documents
from ...kernels.select_blocks import Rule, select_blocks
from ...kernels.windows import WindowLayout
from ...parallel.sequence import Sequence
from .cases import Trial, trials
from .step import Here, Step

TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # those of the tests: errors relative to the norm
WORSE = 2.0  # in float32, or as many times the errors of the form in torch
TUNING_SECONDS = 70.0  # for a trial of a library, which tunes its kernels
QUICK_SECONDS = 40.0  # for a trial in float32: exact products of large tiles compile for minutes
RULES = {
    "NSA": Rule(64, 16, window=32, stride=16, initial=1, local=2),
    "InfLLM-v2": Rule(64, 64, window=32, stride=16, aggregate="max", initial=1, local=32),
    "MoBA": Rule(512, 3, score="dot", pooled=False),
}
SMALL_RULE = Rule(4, 3, window=4, stride=2, initial=1)  # on a CPU


def steps(here: Here) -> list[Step]:
    tried = trials()
    found = [Step("open questions", questions)]
    for trial in tried:
        step = partial(_try, trial, torch.bfloat16)
        found.append(Step(f"{trial.name}, bfloat16", step, TUNING_SECONDS if trial.backend == "library" else None))
    found += [Step(f"select_blocks by the rule of {name}", partial(_select, name)) for name in RULES]
    for trial in tried:
        if trial.backend == "library":
            continue
        step = partial(_try, trial, torch.float32)
        found.append(Step(f"{trial.name}, float32", step, QUICK_SECONDS if here.on_gpu else None))
    if here.on_gpu:
        here.send("expected", value=sorted(_kernels()))
    else:
        here.note("No kernel of Triton runs on a CPU; what ran are the forms in torch, at small sizes.")
    return found


def packed(here: Here, dtype: torch.dtype) -> Documents:
    """A row of documents of one token, of many, and padding."""
    if not here.on_gpu:
        return Documents.from_lengths([[1, 20, 13]], 40)
    if dtype == torch.float32:
        return Documents.from_lengths([[1, 600, 390]], 1024)
    return Documents.from_lengths([[1, 2500, 1, 1500]], 4096)


def _try(trial: Trial, dtype: torch.dtype, here: Here) -> None:
    if trial.backend != "auto" and not here.on_gpu:
        here.skip(here.step, "its kernels need a GPU")
        return
    documents = packed(here, dtype)
    inputs, dout = trial.draw(documents, dtype, here.device)
    started = time.perf_counter()
    try:
        found = run(trial, inputs, dout, Sequence.single(documents, backend=trial.backend))
    except ValueError as refused:
        if trial.backend != "library":
            raise
        here.skip(here.step, str(refused))
        return
    if here.on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    expected = run(trial, [x.double() for x in inputs], dout, Sequence.single(documents))
    shapes = [f"input {n}: {list(x.shape)} in {x.dtype}" for n, x in enumerate(inputs)]
    names = ["out", *(f"gradient {n}" for n in range(len(inputs)))]
    errors = {name: error(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    worst = max(list(errors)[1:], key=lambda name: errors[name])
    allowed = dict.fromkeys(errors, TOLERANCES[dtype])
    if here.on_gpu and dtype == torch.float32 and any(value > TOLERANCES[dtype] for value in errors.values()):
        allowed = dict(zip(names, allowances(trial, inputs, dout, documents, expected), strict=True))
    right = all(value <= allowed[name] for name, value in errors.items())
    here.row(
        "Errors relative to the norm, at most "
        + " and ".join(f"{most:g} in {str(kind).removeprefix('torch.')}" for kind, most in TOLERANCES.items())
        + f" (or {WORSE:g} times those of the form in torch on the CPU); seconds of the first call, with compilation",
        op=trial.name,
        type=str(dtype).removeprefix("torch."),
        out=errors["out"],
        **{"worst gradient": errors[worst], "of input": int(worst.split()[1]), "seconds": seconds, "right": right},
    )
    if not right:
        each = (f"{name}: error {value:.3g}, allowed {allowed[name]:.3g}" for name, value in errors.items())
        here.fail("off by more than rounding", [*shapes, *each])
    _met(here)


def allowances(
    trial: Trial, inputs: list[Tensor], dout: Tensor, documents: Documents, expected: list[Tensor]
) -> list[float]:
    """What errors in float32 may be where numbers are too large for it: by those of the form in torch, on the CPU.

    There no kernel of a GPU runs, whatever the op.
    """
    on_cpu = run(trial, [x.cpu() for x in inputs], dout.cpu(), Sequence.single(documents, backend="chunked"))
    least = TOLERANCES[torch.float32]
    return [max(least, WORSE * error(a, b.cpu())) for a, b in zip(on_cpu, expected, strict=True)]


def run(trial: Trial, inputs: list[Tensor], dout: Tensor, seq: Sequence) -> list[Tensor]:
    """The output, and the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = trial.case.call(*leaves, seq=seq)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype).view(out.shape))]


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected; infinite where a number is not finite.

    What is expected counts as at least 1e-6 an entry: some gradients are 0.
    """
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - expected).norm()) / max(float(expected.norm()), 1e-6 * expected.numel() ** 0.5)


def _select(name: str, here: Here) -> None:
    """Lists by the kernel and by torch from the same scores in bfloat16: rounding may swap what is all but equal."""
    rule = RULES[name] if here.on_gpu else SMALL_RULE
    heads, groups, dim, length = (32, 2, 128, 8192) if here.on_gpu else (4, 2, 8, 60)
    documents = Documents.from_lengths([[length - 1, 1]])
    count = WindowLayout(documents, rule.span, rule.step).count
    generator = torch.Generator(here.device).manual_seed(0)
    q, summaries = (
        torch.randn(1, n, h, dim, generator=generator, device=here.device).bfloat16()
        for n, h in ((length, heads), (count, groups))
    )
    lists = [select_blocks(q, summaries, rule=rule, documents=documents, backend=x) for x in ("auto", "chunked")]
    same = float((lists[0] == lists[1]).all(-1).float().mean())
    here.row("Selected blocks: lists that are the same as those of the form in torch", rule=name, share=same)
    if same < 0.98:
        here.fail(f"only {same:.2%} of the lists are the same", [f"q {list(q.shape)}, {list(summaries.shape)}, {rule}"])
    _met(here)


def questions(here: Here) -> None:
    """What torch and its libraries do on a GPU, where the code depends on it."""
    table = "Open questions"
    generator = torch.Generator(here.device).manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        parts = [torch.randn(n, generator=generator, device=here.device).to(dtype) for n in (1000, 1 << 20)]
        try:
            norms = torch._foreach_norm(parts, 2, dtype=torch.float64)
            off = max(abs(float(a / b.double().norm()) - 1) for a, b in zip(norms, parts, strict=True))
            answer = f"{norms[0].dtype}, off by {off:.2g}"
        except (RuntimeError, TypeError) as refused:
            answer = f"refused: {refused}"
            here.fail(refused, step=f"_foreach_norm of {dtype} in float64")
        here.row(table, question=f"torch._foreach_norm(dtype=float64) of {dtype}", answer=answer)
    if not here.on_gpu:
        here.skip("cuDNN's log-sum-exp", "it needs a GPU")
        return
    q, k, v = (torch.randn(2, 8, 256, 128, device=here.device, dtype=torch.bfloat16) for _ in range(3))
    for name, arguments in (
        ("_scaled_dot_product_cudnn_attention", (q, k, v, None, True, 0.0, True, False)),
        ("_scaled_dot_product_flash_attention", (q, k, v, 0.0, True, False)),
    ):
        try:
            _, lse, *_ = getattr(torch.ops.aten, name)(*arguments, scale=0.1)
            answer = f"{list(lse.shape)} in {lse.dtype}"
        except (RuntimeError, TypeError) as refused:
            answer = f"refused: {str(refused).splitlines()[0]}"
        here.row(table, question=f"log-sum-exp of {name} for [2, 8, 256, 128]", answer=answer)
    _libraries(here)


def _libraries(here: Here) -> None:
    """Which libraries serve softmax attention here, by their own test at start-up."""
    from ...kernels.masks import Mask
    from ...kernels.softmax import library

    table = "Libraries that serve softmax attention, after their test against the reference"
    documents = Documents.whole(1, 1024)
    q, k, v = (torch.randn(1, 1024, h, 128, device=here.device, dtype=torch.bfloat16) for h in (16, 4, 4))
    for kind, mask in (("causal", Mask()), ("full", Mask(causal=False)), ("window", Mask(window=300))):
        tile = mask.tile(documents, documents)
        assert tile is not None
        refusal = library.refusal(q, k, v, tile)
        here.row(table, attention=kind, served=refusal is None, why=refusal)


def _kernels() -> dict[str, object]:
    """Every kernel that is compiled ahead of time, by its op's folder and its name."""
    found = {}
    for op in compilation.OPS:
        for each in compilation.compilations(op):
            found[f"{op}/{each.kernel.fn.__name__}"] = each.kernel
    return found


def _met(here: Here) -> None:
    """Reports the kernels that this process has launched so far."""
    if here.on_gpu:
        launched = [name for name, kernel in _kernels().items() if was_launched(kernel)]
        here.send("met", value=launched)


def was_launched(kernel: object) -> bool:
    """Whether Triton holds the kernel in compiled form; by a private table of Triton 3.6 and 3.7."""
    return any(entry[0] for entry in getattr(kernel, "device_caches", {}).values())
