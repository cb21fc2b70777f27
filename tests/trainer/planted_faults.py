"""Faults that tests of the doctor plant in its ranks: each function spoils one thing in the process that calls it."""

import torch
import torch.distributed as dist

from longreach.kernels.gated_linear import GatedLinearRecurrence
from longreach.kernels.recurrence import Summary
from longreach.parallel import collectives, ring, state_passing
from longreach.parallel.sequence import Sequence
from longreach.trainer.engine import Engine


def local_positions() -> None:
    """Each rank counts positions from its own first token."""

    def positions(self, device="cpu"):
        return torch.arange(self.layout.local_length, dtype=torch.int32).expand(self.documents.batch, -1).to(device)

    Sequence.positions = positions


def dropped_state() -> None:
    """No state enters from the ranks before."""
    original = state_passing._gather

    def gather(mine, seq):
        summaries, transitions = original(mine, seq)
        return [Summary(s.transition, torch.zeros_like(s.state)) for s in summaries], transitions

    state_passing._gather = gather


def transition_through_documents() -> None:
    """A span's transition is not zero though a document starts inside it."""
    original = GatedLinearRecurrence.summarize

    def summarize(self, inputs, final_state, documents, *, backend="auto"):
        summary = original(self, inputs, final_state, documents, backend=backend)
        return Summary(torch.where(summary.transition == 0, 0.5, summary.transition), summary.state)

    GatedLinearRecurrence.summarize = summarize


def loss_averaged_per_rank() -> None:
    """The loss of a rank is divided by its own targets, and the mean of that is taken over the ranks."""
    forward, backward = Engine.__call__, Engine.backward

    def call(self, tokens, seq, targets):
        self.counted = max(1, int((targets != -100).sum()))
        return forward(self, tokens, seq, targets)

    def average(self, loss_sum, normaliser):
        backward(self, loss_sum / self.counted, self.mesh.world_size)

    Engine.__call__, Engine.backward = call, average


def missing_halo() -> None:
    """A convolution sees zeros before each span."""
    original = collectives._halo_forward
    collectives._halo_forward = lambda x, seq, width: torch.zeros_like(original(x, seq, width))


def bfloat16_partials() -> None:
    """Partial results of a ring are rounded before they are merged."""
    original = ring.attend

    def attend(q, *rest, **settings):
        out, lse = original(q, *rest, **settings)
        return out.to(q.dtype).to(out.dtype), lse.to(q.dtype).to(lse.dtype)

    ring.attend = attend


def a_rank_raises() -> None:
    """The last rank fails in the middle of a forward."""

    def forward(x, seq, width):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("out of luck")
        return original(x, seq, width)

    original, collectives._halo_forward = collectives._halo_forward, forward
