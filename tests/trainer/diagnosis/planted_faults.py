"""Faults that tests of the doctor plant in its ranks: each function spoils one thing in the process that calls it."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from longreach.kernels.gated_linear import GatedLinearRecurrence
from longreach.kernels.pointwise import rope
from longreach.kernels.recurrence import Summary
from longreach.kernels.select_blocks import chunked
from longreach.kernels.softmax import SoftmaxAttend
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.layers.rotary import Rotary
from longreach.parallel import mesh
from longreach.parallel.collectives import Packed
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategies import halo, ring, state_passing, windows
from longreach.trainer import engine
from longreach.trainer.data.packing import TokenStream
from longreach.trainer.data.reading import Reader
from longreach.trainer.engine import Engine
from longreach.trainer.optimizers import groups
from longreach.trainer.zero.experts import ExpertWeights

_spoiled: list[tuple[Any, str, Any]] = []
_INHERITED = object()  # what stands for an attribute that its owner has from elsewhere


def plant(fault: str) -> None:
    """The fault of this name, until `heal`."""
    globals()[fault]()


def heal() -> None:
    """Everything as it was."""
    while _spoiled:
        owner, name, original = _spoiled.pop()
        if original is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def spoil(owner: Any, name: str, value: Any) -> Any:
    """Sets an attribute; returns what it was."""
    original = getattr(owner, name)
    _spoiled.append((owner, name, vars(owner).get(name, _INHERITED)))
    setattr(owner, name, value)
    return original


def local_positions() -> None:
    """Each rank counts positions from its own first token."""

    def positions(self, device="cpu"):
        return torch.arange(self.layout.local_length, dtype=torch.int32).expand(self.documents.batch, -1).to(device)

    spoil(Sequence, "positions", positions)


def dropped_state() -> None:
    """No state enters from the ranks before."""

    def before(problem, mine, seq):
        return original(problem, Summary(mine.transition, torch.zeros_like(mine.state)), seq)

    original = spoil(state_passing, "_before", before)


def transition_through_documents() -> None:
    """A span's transition is not zero though a document starts inside it."""

    def transition(self, problem):
        factors = original(self, problem)
        return torch.where(factors == 0, 0.5, factors)

    original = spoil(GatedLinearRecurrence, "transition", transition)


def state_of_long_spans() -> None:
    """What a span of more than a chunk does to the state loses a tenth."""

    def begin(self, problem):
        begun = original(self, problem)
        if problem.documents.length <= 64:
            return begun
        return begun._replace(summary=Summary(begun.summary.transition, 0.9 * begun.summary.state))

    original = spoil(GatedLinearRecurrence, "begin", begin)


def lost_at_the_last_hop() -> None:
    """The gradient of the keys that came from farthest is nothing."""

    def start(self, part, step):
        if part is not None and step == self.ranks - 1:
            part = Packed.of(tuple(torch.zeros_like(x) for x in part.tensors))
        original(self, part, step)

    original = spoil(ring._Returns, "start", start)


def expansion_of_own_rows() -> None:
    """The gradient of an expansion's weights is that of the rank's own rows, without those that came round the ring."""

    def add_up(total, part):
        original(total, {name: x for name, x in part.items() if name != "expansion" or name not in total})

    original = spoil(ring.RingAttention, "add_up", staticmethod(add_up))


def missing_halo() -> None:
    """A convolution sees zeros before each span."""
    original = spoil(halo, "_halo_forward", lambda x, seq, width: torch.zeros_like(original(x, seq, width)))


def halo_of_one_span() -> None:
    """A convolution sees no further than the span before its own."""
    original = spoil(halo, "_halo_parts", lambda span, width, tail: original(span, width, tail)[:1])


def first_of(kept: list[tuple[Any, Any]], seq: Sequence, make: Any) -> Any:
    """What was made first for the rows of a sequence."""
    for rows, plan in kept:
        if rows is seq.derived:
            return plan
    kept.append((seq.derived, make()))
    return kept[-1][1]


def one_ring_for_all_masks() -> None:
    """The plan of a ring is kept whatever the mask."""
    kept: list[tuple[Any, Any]] = []

    def of(cls, op, seq):
        return first_of(kept, seq, lambda: cls._make(seq, op))

    spoil(ring.RingPlan, "of", classmethod(of))


def a_window_as_long_as_a_span() -> None:
    """What windows of one span and two tokens give is a little too small; others are right."""

    def attend(self, inputs, received, tile, backend):
        out, lse = original(self, inputs, received, tile, backend)
        return (0.9 * out if tile.mask.window == inputs.q.shape[1] + 2 else out), lse

    original = spoil(SoftmaxAttend, "attend", attend)


def one_plan_for_all_windows() -> None:
    """What tells which tokens make which window is kept whatever their size."""

    kept: list[tuple[Any, Any]] = []

    def make_plan(self, seq):
        return first_of(kept, seq, lambda: original(self, seq))

    original = spoil(windows.WindowMeans, "make_plan", make_plan)


def rounded_scores() -> None:
    """Scores by which blocks are selected are off by less than rounding: of equal ones the last is the highest."""

    def block_scores(queries, rule, low, high):
        return original(queries, rule, low, high) + 1e-15 * torch.arange(low, high)

    original = spoil(chunked, "_block_scores", block_scores)


def bfloat16_partials() -> None:
    """Partial results of a ring are rounded before they are merged."""

    def attend(self, inputs, received, tile, backend):
        dtype, results = inputs.q.dtype, original(self, inputs, received, tile, backend)
        return tuple(x.to(dtype).to(x.dtype) for x in results)

    original = spoil(SoftmaxAttend, "attend", attend)


def bfloat16_query_gradients() -> None:
    """The gradient of the queries is added up in their type."""

    def attend_backward(self, gradient, inputs, *rest):
        stay, travelled = original(self, gradient, inputs, *rest)
        return {"q": stay["q"].to(inputs.q.dtype).to(stay["q"].dtype)}, travelled

    original = spoil(SoftmaxAttend, "attend_backward", attend_backward)


def bfloat16_states() -> None:
    """States travel in bfloat16."""

    def before(problem, mine, seq):
        rounded = mine.state.bfloat16().to(mine.state.dtype) if mine.state.dtype == torch.float32 else mine.state
        return original(problem, Summary(mine.transition, rounded), seq)

    original = spoil(state_passing, "_before", before)


def bfloat16_window_means() -> None:
    """Windows, and the gradients of their tokens, are added up in the type of the tokens."""
    spoil(windows, "_exact", lambda x: x.dtype)


def bfloat16_positions() -> None:
    """Positions are rounded to the type of what they rotate."""

    def rotate(self, x, seq):
        frequencies, factor = self.rotation.frequencies()
        positions = seq.positions(x.device).to(x.dtype)
        return rope(x, positions, inverse_frequencies=frequencies.to(x.device), attention_factor=factor)

    spoil(Rotary, "__call__", rotate)


def groups_of_strangers() -> None:
    """Ranks that share a row are as far apart as data ranks are."""

    def group(size, stride, world, rank, timeout):
        return original(size, max(1, world // size), world, rank, timeout)

    original = spoil(mesh, "_group", group)


def loss_averaged_per_rank() -> None:
    """The loss of a rank is divided by its own targets, and the mean of that is taken over the ranks."""

    def call(self, tokens, seq, targets, *rest):
        self.counted = max(1, int((targets != -100).sum()))
        return forward(self, tokens, seq, targets, *rest)

    def average(self, loss_sum, normaliser, auxiliary=None):
        backward(self, loss_sum / self.counted, self.mesh.world_size, auxiliary)

    forward, backward = spoil(Engine, "__call__", call), spoil(Engine, "backward", average)


def targets_of_the_token() -> None:
    """The target of a token is the token."""

    def row(self, number):
        made = original(self, number)
        made.targets[made.targets != -100] = made.tokens[made.targets != -100]
        return made

    original = spoil(TokenStream, "row", row)


def every_data_rank_reads_the_same() -> None:
    """The rows of a step are those of the first data rank, on all."""

    def rows(self, row):
        first = replace(self, mesh=replace(self.mesh, rank=self.mesh.sequence_rank))
        return original(first, row)

    original = spoil(Reader, "rows", rows)


def _configured(dtypes: tuple[str, ...], **changes: Any) -> None:
    def configuration(zero_stage, dtype, *rest):
        made = original(zero_stage, dtype, *rest)
        return made | changes if dtype in dtypes else made

    original = spoil(engine, "configuration", configuration)


def nothing_is_clipped() -> None:
    """Gradients are not clipped."""
    _configured(("float32", "bfloat16"), gradient_clipping=0.0)


def bfloat16_accumulation() -> None:
    """Gradients of micro-batches are added up in bfloat16."""
    _configured(("bfloat16",), data_types={"grad_accum_dtype": "bf16"})


def bfloat16_reduction() -> None:
    """Gradients are added up over ranks in bfloat16."""
    _configured(("bfloat16",), communication_data_type="bf16")


def bfloat16_sums_of_experts() -> None:
    """Gradients of experts that ranks share out are rounded to the type of the weights before replicas add them up."""

    def reduce(self):
        for shard in self._shards.values():
            shard.gradient.copy_(shard.gradient.to(shard.parameter.dtype))
        original(self)

    original = spoil(ExpertWeights, "reduce", reduce)


def norms_decay() -> None:
    """Weight decay shrinks norms too."""

    def parameter_groups(model, weight_decay, *rest, **settings):
        made = original(model, weight_decay, *rest, **settings)
        return [group | {"weight_decay": weight_decay} for group in made]

    original = spoil(groups, "parameter_groups", parameter_groups)


def experts_averaged_over_all_ranks() -> None:
    """The gradient of a rank's experts is averaged with those of other ranks' experts."""

    def reduce(self):
        for shard in self._shards.values():
            dist.all_reduce(shard.gradient)
            shard.gradient.div_(dist.get_world_size())
        original(self)

    original = spoil(ExpertWeights, "reduce", reduce)


def padding_in_the_balancing_loss() -> None:
    """Tokens that are padding count in the auxiliary losses of mixtures of experts."""
    original = spoil(
        MixtureOfExperts, "_losses", lambda self, routing, real: original(self, routing, torch.ones_like(real))
    )


def a_rank_raises() -> None:
    """The last rank fails in the middle of a forward."""

    def forward(x, seq, width):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("out of luck")
        return original(x, seq, width)

    original = spoil(halo, "_halo_forward", forward)
