"""Estimate: what a step of a run would take on a cluster, in memory, bytes and time. Nothing here is measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...models.language_model import LanguageModel
from ...models.part import cast_parameters
from ..memory.account import Account, account
from ..memory.states import Share, states_of, stepping
from ..ranks.settings import ulysses_ranks
from ..rehearsal import rehearse
from ..settings import Settings
from .cluster import ClusterSettings
from .layers import Shallow
from .links import ring, travel
from .sending import Call, calls
from .sent import Key, Sent, again, further, with_ranks
from .work import HEAD, Work, work
from .zero import ZeroSend, gathered_at_once, zero_sends

FEW_LOGITS = 256  # tokens of a vocabulary whose logits take little
FEW_RANKS = (4, 8)  # two numbers of them, from which what is kept on any number is told
LONGEST = 2**15  # tokens of a rank on which the account is made
MOST_RANKS = 64  # in a ring whose calls are counted one by one; of more, what grows with the ranks goes on as it did
PASSES = 5  # over what layers keep: written and read in forward; read in backward, whose gradient is written and read
STEP_BYTES = 28  # that AdamW reads and writes for each number: two moments and a master twice, and a gradient
HOST_GBPS = 200.0  # bytes a second of a node's memory, of the optimizer's step on the host; an assumption


@dataclass
class Estimate:
    """Of one setting. Seconds are those of a step; `seconds` names what they are of, in the order of lines."""

    settings: Settings
    cluster: ClusterSettings
    account: Account
    extra: int
    work: Work
    sent: dict[Key, Sent]
    zero: list[ZeroSend]
    seconds: dict[str, float]
    hidden: dict[str, float]
    micro_batches: int
    kernels: dict[str, set[str]]
    parameters: int
    active: int

    @property
    def memory(self) -> int:
        """Bytes of a GPU at the peak, with what is reserved."""
        return self.account.peak() + self.extra

    @property
    def host(self) -> int:
        """Bytes of the host's memory, of all GPUs of a node."""
        return self.account.on_host() * self.cluster.gpus_per_node

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.settings.data.rows_per_step * self.settings.data.sequence_length

    @property
    def mfu(self) -> float:
        per_token = 3 * self.work.flops / self.work.tokens
        return per_token * self.tokens / (self.step * self.cluster.gpus * self.cluster.peak)

    @property
    def tokens_a_day(self) -> float:
        return self.tokens / self.step * 86400

    def refusal(self) -> str | None:
        """Why it does not fit; None where it does."""
        limit = self.cluster.memory_gb * 1e9
        if self.memory > limit:
            return f"needs {self.memory / 1e9:.1f} GB of {limit / 1e9:.0f} GB a GPU"
        if self.host > self.cluster.host_memory_gb * 1e9:
            return f"needs {self.host / 1e9:,.0f} GB of {self.cluster.host_memory_gb:,.0f} GB of the host"
        return None


class Estimator:
    """Estimates of one model under many settings; it keeps what they share."""

    def __init__(self, build: Callable[[dict[str, Any]], LanguageModel], model: Mapping[str, Any]) -> None:
        self.build, self.model = build, dict(model)
        with torch.device("meta"):
            self.whole = build(self.model)
        self._accounts: dict[Any, Account] = {}
        self._sent: dict[Any, tuple[dict[Key, Sent], dict[str, set[str]]]] = {}
        self._states: dict[Any, tuple[tuple[Share, ...], Share]] = {}
        self._work: dict[Any, Work] = {}
        self._traffic: dict[Any, Any] = {}
        self._zero: dict[Any, tuple[list[ZeroSend], int]] = {}
        self._parameters = self.whole.parameter_count(), self.whole.parameter_count(active=True)

    def estimate(self, settings: Settings, cluster: ClusterSettings) -> Estimate:
        """Raises ValueError for what the model or an exchange refuses."""
        of_rows = self.work(settings)
        sent, kernels = self.sent(settings, cluster)
        made = self.account(settings, cluster.gpus)
        data_ranks = cluster.gpus // settings.parallel.sequence
        micro_batches = settings.data.rows_per_step // (data_ranks * settings.data.rows_per_micro_batch)
        zero, at_once = self._of_zero(settings, cluster.gpus, micro_batches)
        extra = round(cluster.reserved_gb * 1e9) + at_once
        estimate = Estimate(
            settings, cluster, made, extra, of_rows, sent, zero, {}, {}, micro_batches, kernels, *self._parameters
        )
        _time(estimate, self.moved(settings))
        return estimate

    def _of_zero(self, settings: Settings, ranks: int, micro_batches: int) -> tuple[list[ZeroSend], int]:
        """What ZeRO sends, and the bytes that it holds gathered at most."""
        trainer = settings.trainer
        key = (
            str(settings.engine), trainer.dtype, settings.parallel.experts, ranks, micro_batches,
            str(trainer.activation_checkpointing), trainer.tile_tokens is None,
        )  # fmt: skip
        if key not in self._zero:
            sends = zero_sends(self.whole, settings, ranks, micro_batches)
            self._zero[key] = sends, gathered_at_once(self.whole, settings)
        return self._zero[key]

    def refuse(self, settings: Settings) -> None:
        """Raises what a rehearsal of training raises: for settings that the model has no use for, and its own."""
        rehearse(self._shallow(settings).base, settings)

    def work(self, settings: Settings) -> Work:
        """FLOPs by kind of layer."""
        trainer, data = settings.trainer, settings.data
        chosen = str(trainer.activation_checkpointing), trainer.tile_tokens
        key = (*chosen, str(settings.parallel), data.sequence_length, data.rows_per_micro_batch)
        if key not in self._work:
            self._work[key] = work(self.whole, settings)
        return self._work[key]

    def _shallow(self, settings: Settings, **changes: Any) -> Shallow:
        trainer = settings.trainer
        modes = {
            "activation_checkpointing": trainer.activation_checkpointing,
            "tile_tokens": trainer.tile_tokens,
            "offload_activations": trainer.offload_activations,
        } | changes
        chosen = {name: value for name, value in modes.items() if value not in (None, "none", False)}
        return Shallow.of(self.build, self.model | chosen, self.whole.names)

    def account(self, settings: Settings, ranks: int) -> Account:
        """The account of a rank: activations once for each way to keep them, states by `states_of`.

        Of a row that ranks share, what is kept is a constant and so much for each further rank, told from two numbers
        of them. How attention is shared makes no difference to it.
        """
        parallel = settings.parallel
        if parallel.sequence == 1:
            made = self._activations(settings, ranks, 1)
        else:
            less = self._activations(settings, ranks, FEW_RANKS[0], backward=False)
            made = self._activations(settings, ranks, FEW_RANKS[1])
            times = (parallel.sequence - FEW_RANKS[1]) / (FEW_RANKS[1] - FEW_RANKS[0])
            before = {share.part: share for share in less.kept}
            kept = tuple(
                replace(x, fixed=max(0.0, x.fixed + times * (x.fixed - before.get(x.part, x).fixed))) for x in made.kept
            )
            made = replace(made, kept=kept)
        tokens = settings.data.rows_per_micro_batch * settings.data.sequence_length // parallel.sequence
        states, step = self._states_of(settings, ranks)
        return replace(made, tokens=tokens, states=states, stepping=step)

    def _of_blocks(self, settings: Settings, cut: Settings, ranks: int) -> tuple[Share, ...]:
        """What backward holds beside what is kept where blocks are at their peak, which a loss of many logits hides in
        the short rows of an account: that of a model of few tokens in its vocabulary.
        """
        few = min(FEW_LOGITS, self.whole.vocabulary)
        shallow, device = self._shallow(settings, vocabulary=few), torch.device("cuda")
        return account(shallow.base, cut, ranks, device).working

    def _states_of(self, settings: Settings, ranks: int) -> tuple[tuple[Share, ...], Share]:
        trainer, key = (
            settings.trainer,
            (str(settings.engine), settings.trainer.dtype, ranks, settings.parallel.experts),
        )
        if key not in self._states:
            cast_parameters(self.whole, getattr(torch, trainer.dtype))
            device = torch.device("cuda")
            states = states_of(self.whole, settings, ranks, device)
            self._states[key] = states, stepping(self.whole, settings, ranks, device, states)
        return self._states[key]

    def _activations(self, settings: Settings, ranks: int, number: int, *, backward: bool = True) -> Account:
        """The account on so many ranks that share a row; without `backward` of what is kept alone."""
        trainer, cut = settings.trainer, deepcopy(settings)
        tokens = settings.data.sequence_length // settings.parallel.sequence
        while tokens > LONGEST and tokens % 2 == 0:  # bytes per token do not depend on the length
            tokens //= 2
        cut.data.sequence_length, cut.parallel.sequence = tokens * number, number
        cut.data.rows_per_step = 2 * ranks * cut.data.rows_per_micro_batch  # so that all gradients count throughout
        if number == 1:
            cut.parallel.layout, cut.parallel.spans = "contiguous", None
        cut.parallel.attention, cut.parallel.ulysses, cut.parallel.mixers = "ring", None, {}
        if cut.parallel.recurrent == "ulysses":
            cut.parallel.ulysses = min(2, number)
        key = (
            str(trainer.activation_checkpointing), trainer.tile_tokens, trainer.offload_activations, str(cut.parallel),
            settings.data.rows_per_micro_batch, trainer.dtype, backward,
        )  # fmt: skip
        if key not in self._accounts:
            shallow, device = self._shallow(settings), torch.device("cuda")
            made = shallow.account(partial(account, settings=cut, world_size=ranks, device=device), backward=backward)
            if backward:
                made = replace(made, working=(*made.working, *self._of_blocks(settings, cut, ranks)))
            self._accounts[key] = made
        return self._accounts[key]

    def moved(self, settings: Settings) -> float:
        """Bytes of a rank's memory that what layers keep moves in a micro-batch, where nothing is recomputed."""
        plain = deepcopy(settings)
        plain.trainer.activation_checkpointing, plain.trainer.tile_tokens = "none", None
        plain.trainer.offload_activations = False
        plain.parallel = type(plain.parallel)(layout=settings.parallel.layout, spans=settings.parallel.spans)
        plain.data.sequence_length = LONGEST
        made = self._activations(plain, 1, 1, backward=False)
        tokens = settings.data.rows_per_micro_batch * settings.data.sequence_length // settings.parallel.sequence
        kept = sum(share.bytes(tokens) for share in made.kept)
        more = 2 * kept if settings.trainer.activation_checkpointing != "none" else 0
        return PASSES * kept + more

    def sent(self, settings: Settings, cluster: ClusterSettings) -> tuple[dict[Key, Sent], dict[str, set[str]]]:
        """What a rank at the border of a node sends for the sequence in a micro-batch, by op; the kernels of mixers."""
        parallel, modes = settings.parallel, settings.trainer.activation_checkpointing
        ulysses = ulysses_ranks(parallel)
        key = (
            str(modes), settings.trainer.tile_tokens, str(parallel), cluster.gpus_per_node, cluster.name,
            settings.data.sequence_length, settings.data.rows_per_micro_batch, settings.trainer.dtype,
        )  # fmt: skip
        if key not in self._sent:
            most = MOST_RANKS * ulysses
            plain = deepcopy(settings)
            plain.trainer.activation_checkpointing, plain.trainer.offload_activations = "none", False
            plain.trainer.tile_tokens = None
            if plain.trainer != settings.trainer and isinstance(modes, str):
                sent, kernels = self.sent(plain, cluster)
                self._sent[key] = again(sent, settings), kernels
            elif parallel.sequence <= most:
                self._sent[key] = self._counted(settings, cluster)
            else:  # of as many tokens a rank
                less, more = (self._counted(with_ranks(settings, most // by), cluster) for by in (2, 1))
                times = (parallel.sequence - most) / (most // 2)
                self._sent[key] = further(less[0], more[0], times), more[1]
        return self._sent[key]

    def _counted(self, settings: Settings, cluster: ClusterSettings) -> tuple[dict[Key, Sent], dict[str, set[str]]]:
        ranks = settings.parallel.sequence
        rank = cluster.gpus_per_node - 1 if ranks > cluster.gpus_per_node else ranks - 1
        total: dict[Call, float] = self._shallow(settings, tile_tokens=None).sum(
            lambda build: calls(build, settings, rank, self._traffic)
        )
        found: dict[Key, Sent] = defaultdict(Sent)
        kernels: dict[str, set[str]] = defaultdict(set)
        for call, number in total.items():
            of = found[call.mixer, call.op, call.phase]
            taken = travel(call.sends, cluster, rank)
            of.seconds += number * taken.seconds
            for link, count in taken.bytes.items():
                of.bytes[link] += round(number * count)
            of.overlaps |= any(each.kind == "exchange" for each in call.sends) and not call.listed
            of.listed |= call.listed
            if call.kernel:
                kernels[call.mixer].add(call.kernel)
        return dict(found), dict(kernels)


def _time(estimate: Estimate, moved: float) -> None:
    """Fills in the seconds of a step, of what is exposed, and of what is hidden beside computation."""
    cluster, settings, times = estimate.cluster, estimate.settings, estimate.micro_batches
    seconds, hidden = estimate.seconds, estimate.hidden
    ranks, matmul = estimate.work.ranks, cluster.peak * cluster.share("matmul")[0]
    forward = backward = 0.0
    for name, kind in estimate.work.kinds.items():
        rate = cluster.peak * kernel_share(estimate, name)[0]
        linear = (3 * kind.linear + kind.again_linear) / ranks / matmul
        once, twice = kind.busiest / rate, (2.5 * kind.busiest + kind.again_mixing) / rate
        forward += kind.linear / ranks / matmul + once
        backward += (2 * kind.linear + kind.again_linear) / ranks / matmul + twice
        seconds[f"{name}: linear layers"] = times * linear
        if kind.busiest:
            seconds[f"{name}: ops"] = times * (once + twice)
        for phase, computing in (("forward", once + kind.again_mixing / rate), ("backward", 2.5 * kind.busiest / rate)):
            of_kind = [(op, of) for (mixer, op, when), of in estimate.sent.items() if (mixer, when) == (name, phase)]
            for op, of in of_kind:
                beside = min(of.seconds, computing) if of.overlaps else 0.0
                label = f"{name}: {op} sends, {phase}"
                seconds[label] = times * (of.seconds - beside)
                hidden[label] = times * beside
    for (mixer, op, phase), of in estimate.sent.items():
        if mixer not in estimate.work.kinds:  # between layers, and tokens of experts: nothing is computed beside
            seconds[f"{mixer}: {op}, {phase}"] = times * of.seconds
            hidden[f"{mixer}: {op}, {phase}"] = 0.0
    seconds["memory traffic of what layers keep"] = (
        times * moved / (cluster.memory_gbps * 1e9 * cluster.efficiency["memory"])
    )
    for each in estimate.zero:
        taken = ring(each.bytes, range(0, cluster.gpus, each.apart), cluster).seconds
        beside = min(taken, times * (forward + backward)) if each.overlapped else 0.0
        seconds[f"ZeRO: {each.what}"], hidden[f"ZeRO: {each.what}"] = taken - beside, beside
    away = sum(s.bytes(estimate.account.tokens) for s in estimate.account.kept if s.host)
    if away:
        taken = away / (cluster.host_gbps * 1e9 * cluster.link_share)
        seconds["offloaded activations"] = times * (max(0.0, taken - forward) + max(0.0, taken - backward))
    numbers = estimate.parameters / (cluster.gpus if settings.engine.zero_stage else 1)
    rate = cluster.memory_gbps * 1e9 * cluster.efficiency["memory"]
    if settings.engine.offload == "none":
        seconds["optimizer"] = numbers * STEP_BYTES / rate
    else:
        over = numbers * 6 / (cluster.host_gbps * 1e9 * cluster.link_share)
        seconds["optimizer, on the host"] = over + numbers * cluster.gpus_per_node * STEP_BYTES / (HOST_GBPS * 1e9)


def kernel_share(estimate: Estimate, kind: str) -> tuple[float, str]:
    """At which share of the peak the ops of a kind run: of several kernels that have FLOPs, the slowest attention."""
    cluster = estimate.cluster
    if kind == "feed-forward":
        return cluster.share("matmul")
    shares = list[tuple[float, str]]()
    for name in sorted(name for name in estimate.kernels.get(kind, ()) if name != "short_conv"):
        (share, known), entry = cluster.share(name), cluster.entry(name)
        shares.append((share, f"{name if entry == 'other' else entry}: {known}"))
    return min(shares) if shares else cluster.share("other")


__all__ = ["HEAD", "Estimate", "Estimator", "kernel_share"]
