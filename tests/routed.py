"""A feed-forward layer with everything that a part can report: auxiliary losses, and a buffer updated from sums."""

import torch
from torch import nn
from torch.nn import functional as F

from longreach.models.part import FeedForward


class Routed(FeedForward):
    """Experts mixed by a softmax router; padding counts for nothing in what it reports.

    z: the mean of logsumexp(router)^2. balance: the mean probability of the experts, weighed by how loaded they were.
    load: how many tokens have each expert as their likeliest, by which `bias` follows.
    """

    small = {"experts": 3, "hidden": 8}
    sums = ("load", "mean")

    def __init__(self, *, width, experts=3, hidden=8, z=0.05, balance=0.3, rate=0.1):
        super().__init__()
        self.losses = {"z": z, "balance": balance}
        self.experts, self.rate = experts, rate
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Linear(width, experts * hidden, bias=False)
        self.down = nn.Linear(experts * hidden, width, bias=False)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("average", torch.zeros(width))

    def forward(self, x, seq):
        wide = torch.promote_types(x.dtype, torch.float32)
        real = (seq.reach(x.device) >= 0).to(wide)
        logits = self.router(x).to(wide)
        shares = F.softmax(logits + self.bias, dim=-1)
        z = (logits.logsumexp(-1).square() * real).sum()
        balance = ((shares * (1 - self.bias)).square().sum(-1) * real).sum()
        with torch.no_grad():
            chosen = F.one_hot(shares.argmax(-1), self.experts).to(wide)
            load = (chosen * real.unsqueeze(-1)).flatten(0, 1).sum(0)
            mean = (x.to(wide) * real.unsqueeze(-1)).flatten(0, 1).sum(0)
        experts = F.silu(self.up(x)).unflatten(-1, (self.experts, -1))
        out = self.down((experts * shares.to(x.dtype).unsqueeze(-1)).flatten(-2))
        return out, z, balance, load, mean

    def update(self, sums):
        load = sums["load"]
        self.bias += self.rate * torch.sign(load.mean() - load)
        self.average.lerp_((sums["mean"] / load.sum()).float(), 0.5)
