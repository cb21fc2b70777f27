"""Muon against torch's own on one device, and the same on ranks, on every ZeRO stage, with experts and elsewhere."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from small_model import ADAM, SmallModel, batch, full, make_engine, rate, train_step

from longreach.trainer.checkpoint.checkpoint import save
from longreach.trainer.optimizers.muon import COEFFICIENTS, ITERATIONS, orthogonal

MUON = replace(ADAM, kind="muon")
STEPS, CLIP = 4, 0.2
MATRICES = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("up", "down")}


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 5, 12), (2, 12, 5)])
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonal(matrices), u * s.unsqueeze(1) @ v, rtol=1e-9, atol=1e-9)
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def optimizers_of_torch(model):
    """torch's Muon, and AdamW for the rest."""
    muons = [p for name, p in model.named_parameters() if name in MATRICES]
    others = [p for name, p in model.named_parameters() if name not in MATRICES]
    decays = [
        {"params": [p for p in others if p.dim() > 1]},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(muons, adjust_lr_fn="match_rms_adamw", weight_decay=ADAM.weight_decay),
        torch.optim.AdamW(decays, betas=ADAM.betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay),
    ]


def reference(monkeypatch):
    """Norms and parameters after some steps, by torch alone; its Muon computes in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # what torch's Muon casts by
    model = SmallModel()
    model.initialise(0)
    optimizers, norms = optimizers_of_torch(model), []
    for step in range(STEPS):
        tokens, targets = batch(step)
        (model(tokens, targets) / (targets != -100).sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


def train(rank, world, stages, dtype="float32", config=None, folder=None):
    results = []
    for stage in stages:
        engine = make_engine(stage, clip=CLIP, dtype=dtype, config=config, optimizer=MUON)
        norms = [train_step(engine, step, rank, world, 2) for step in range(STEPS)]
        results.append((norms, full(engine)))
        if folder is not None:
            save(engine, folder, {"step": STEPS}, keep=1)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_equals_the_muon_of_torch(monkeypatch, world):
    norms, parameters = reference(monkeypatch)
    assert min(norms) > CLIP
    for of_rank in run_ranks(world, train, (0, 1, 2, 3)):
        for got_norms, masters in of_rank:
            torch.testing.assert_close(got_norms, norms, rtol=1e-4, atol=0)
            for name, value in parameters.items():
                torch.testing.assert_close(masters[name], value, rtol=1e-4, atol=1e-4)
