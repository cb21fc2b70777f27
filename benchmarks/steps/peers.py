"""A training step of small Llama, Qwen3-Next, MiniMax-01, Mamba-2 and Kimi Linear, beside transformers' own classes.

    python benchmarks/steps/peers.py [--models llama qwen3_next …] [--rows 2048 8192 packed] [--rounds 5] [--write]

A step is forward, loss, backward, clipping and AdamW, in float32 on a CPU with one thread, on one row of random tokens,
which are one document, or, in the row that is called packed, several.
LongReach's is the trainer's engine, on stage 0 as nothing is split; transformers' is its class with SDPA, no cache,
grouped products of experts and torch's fused AdamW. Both start from the same weights, written by transformers and read
by `longreach.models.hf`, and losses and gradient norms are compared: of the first step, before any weight has moved,
and of those after it. Each side is a process of its own; they take turns, and times are of the processors, while glibc
keeps freed memory: the median of the timed steps, which follow one that is not. A peak is by how much memory grows
within a further step, in which glibc gives back what is freed.
A third process takes turns with both. It computes only what no step can do without, each part in the fastest of several
ways that are tried first, over memory that it reuses: the products of linear layers, routers, experts (of even shares)
and head, of forward and both of backward; causal softmax attention; and AdamW. Linear attention is not in it, nor are
norms, activations, rotations and the loss. `bound` is transformers' time over that: no step that computes all of it in
float32 at the rates of these libraries can be more times as fast, and a goal above it is out of reach.
`--write` keeps the table in benchmarks/results/; with `--models` or `--rows` it replaces those rows alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longreach.benchmarks.machine import RESULTS, keep_memory, machine, peak_bytes, return_memory

PAGE = RESULTS / "peers_cpu.md"
VOCABULARY, WARM_UP_TOKENS, CLIP = 8192, 256, 1.0
# AdamW's first steps have the rate's size in every weight, also where a gradient's sign is a matter of rounding. At
# a rate of 1e-3, a twentieth of the weights, routers of the two sides soon choose other experts for tokens near a tie,
# and from there on they are two models.
RATE = 1e-5
ORDER = ("LongReach", "transformers")
FIRST_APART = 1e-4  # how much losses and norms may differ on the same weights; torch's norm of float32 is 4e-5 off
APART = 1e-3  # … and after some steps
HEAD = """\
| model | row | timed steps | LongReach | transformers | ratio | goal | | unavoidable | bound | \
peak | peak of transformers | share | goal | | losses and norms differ by, first | later |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
LIBRARIES = ("fla", "causal_conv1d", "mamba_ssm", "kernels")  # of GPU kernels, which transformers would import
NOTE = """\
On a CPU the linear layers of transformers run what it calls its reference implementations in torch: chunked forms of
Gated DeltaNet, Kimi delta attention and Mamba-2, and a loop over blocks of 256 tokens for lightning attention. The
kernels that it uses on a GPU run on no CPU, so these rows say nothing about GPUs. Its softmax attention and LongReach's
run the same kernel of torch here.

`bound` leaves out the products within linear attention, of which nobody does without all: for Gated DeltaNet at 8,192
tokens they are some 0.6 s more by their FLOPs, which leaves a step of 2.5 times transformers' speed nothing for the
rest; all products of Mamba-2's step at 8,192, its op's too, took 2.8 s alone, where a whole step of ours takes 3.3.
Softmax attention by products over tiles of 256 to 512 tokens, whose scores stay in the second cache, was tried as well:
its backward took 0.99 to 1.09 of the time of torch's kernel with 64 channels a head, in one process. The products of
such tiles, as they come from memory, ran at 82 to 86 GFLOP/s, those of the linear layers at 91. With torch.compile of
its blocks (inductor) LongReach's steps at 2,048 tokens took 0.95 to 1.03 of the time, beside another job.

Packed rows are of Llama alone: told of documents by positions that begin anew, transformers keeps them apart in
softmax attention, by a mask with which it computes every score of the row, and carries the states of linear layers over
their borders (on such a row its MiniMax has another loss than ours, and than its own on each document alone).

Kimi Linear at 8,192 tokens is not in the table: the system ended transformers' process for want of memory, with 22 GiB
free before it. LongReach's steps there, alone, took 9.0 to 9.4 s, and its memory grew by 1,252 MiB. At 4,096 both fit.

Losses and norms are compared on the same weights first, where torch's norm of millions of float32 numbers is 4e-5 too
small. Later steps are of a low rate. At 1e-3 routers soon choose other experts for tokens near a tie, since AdamW's
first steps depend on signs that rounding decides: with Kimi Linear at 2,048 tokens 76 tokens of a layer in the third
step, and losses and norms differed by 2e-3 after some more. The models are the same: in float64 losses and norms of all
three steps differed by less than 1e-7, and in float32, with one side's choices given to both, losses of five steps by
2e-6 and norms by 3e-5.
"""
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
PEAK = "peak\n"

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 704, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6,
    "use_cache": False, "attention_dropout": 0.0, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}


class Shape(NamedTuple):
    """A small model: its settings as transformers has them, and goals: so many times as fast on 2k and 8k tokens.

    packs: whether transformers keeps the documents of a row apart.
    """

    config: dict[str, Any]
    faster: dict[str, float]
    told: str
    packs: bool = False


HYBRID = {"2048": 1.8, "8192": 2.5}
ROWS = {"2048": [2048], "4096": [4096], "8192": [8192], "packed": [3072, 2048, 1280, 768, 512, 256, 128, 128]}
SHAPES = {
    "llama": Shape({**COMMON}, {"2048": 1.1, "8192": 1.1}, "4 layers of softmax attention", packs=True),
    "qwen3_next": Shape(
        {
            **COMMON, **EXPERTS, "head_dim": 64, "shared_expert_intermediate_size": 256, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        },
        HYBRID, "3 of Gated DeltaNet, 1 of gated softmax attention; 8 experts, 2 per token, 1 for all",
    ),
    "minimax": Shape(
        {
            **COMMON, "num_hidden_layers": 8, "head_dim": 64, "rotary_dim": 32, "num_local_experts": 8,
            "num_experts_per_tok": 2, "intermediate_size": 256, "router_jitter_noise": 0.0,
            "layer_types": ["linear_attention"] * 7 + ["full_attention"],
        },
        HYBRID, "7 of lightning attention, 1 of softmax attention; 8 experts, 2 per token",
    ),
    "mamba2": Shape(
        {
            **{name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "use_cache")},
            "num_heads": 8, "head_dim": 64, "expand": 2, "state_size": 128, "n_groups": 1, "pad_token_id": None,
            "bos_token_id": None, "eos_token_id": None,
        },
        HYBRID, "4 layers, 8 heads, 128 states",
    ),
    "kimi_linear": Shape(
        {
            **COMMON, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 256, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "kv_lora_rank": 64,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "linear_num_heads": 4,
            "linear_head_dim": 128, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
        HYBRID, "3 of Kimi delta attention, 1 of latent attention; 8 experts, 2 per token, 1 for all; 1 layer without",
    ),
}  # fmt: skip

Step = Callable[[Tensor, list[int], float], tuple[float, float]]  # of documents at a rate: loss and gradient's norm


def row(number: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(number))


def starts(lengths: list[int]) -> Tensor:
    """Where the documents of a row begin: no token before them predicts those tokens."""
    return torch.tensor([0, *lengths[:-1]]).cumsum(0)


def theirs(folder: Path) -> Step:
    """transformers' class of the model that the folder is named by, and is filled with."""
    sys.modules.update(dict.fromkeys(LIBRARIES))  # type: ignore[arg-type]
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shape, implementations = SHAPES[folder.name], {}
    if "num_attention_heads" in shape.config:
        implementations["attn_implementation"] = "sdpa"
    if "num_experts_per_tok" in shape.config:
        implementations["experts_implementation"] = "grouped_mm"
    torch.manual_seed(0)
    config = CONFIG_MAPPING[folder.name](**json.loads(json.dumps(shape.config)), **implementations)
    model = AutoModelForCausalLM.from_config(config).float().train()
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(tokens: Tensor, lengths: list[int], rate: float) -> tuple[float, float]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        packed = {}
        if len(lengths) > 1:  # positions that begin anew are how it is told of documents
            packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        labels = tokens.index_fill(1, starts(lengths), -100)
        loss = model(input_ids=tokens, labels=labels, use_cache=False, **packed).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    return step


def ours(folder: Path) -> Step:
    """The trainer's engine, with the model read from the folder."""
    from hydra.utils import instantiate

    from longreach.kernels.documents import Documents
    from longreach.models import hf
    from longreach.parallel.mesh import Mesh
    from longreach.parallel.sequence import Sequence
    from longreach.trainer.engine import Engine, OptimizerSettings
    from longreach.trainer.engine_config import EngineSettings
    from longreach.trainer.ranks import processes

    device = processes.start(10.0)
    engine = Engine(
        lambda: instantiate(hf.read_settings(folder), _convert_="all"),
        settings=EngineSettings(zero_stage=0),
        optimizer=OptimizerSettings(learning_rate=RATE, weight_decay=0.0),
        clip=CLIP,
        mesh=Mesh.create(),
        device=device,
        load=lambda model, gather: hf.load(folder, model, gather),
    )

    def step(tokens: Tensor, lengths: list[int], rate: float) -> tuple[float, float]:
        targets = tokens.index_fill(1, starts(lengths), -100).roll(-1, 1)
        loss, count = engine(tokens, Sequence.single(Documents.from_lengths([lengths])), targets)
        engine.backward(loss, int(count))
        norm = engine.step(rate)
        return float(loss.detach()) / int(count), float(norm)

    return step


ALONE = "unavoidable"
SIDES = {"transformers": theirs, "LongReach": ours}  # the first writes the weights that the second reads


def serve(side: str, folder: Path, lengths: list[int]) -> None:
    """A step at each line of input, which prints its seconds, loss and norm; at last its growth of memory."""
    torch.set_num_threads(1)
    keep_memory()
    if side == ALONE:
        serve_unavoidable(folder, lengths)
        return
    step = SIDES[side](folder)
    step(
        row(-1, WARM_UP_TOKENS), [WARM_UP_TOKENS], 0.0
    )  # makes the optimizer's states, and leaves the weights as they are
    print(json.dumps("ready"), flush=True)
    for number, order in enumerate(sys.stdin):
        tokens = row(number, sum(lengths))
        if order == PEAK:
            return_memory()
            print(json.dumps(peak_bytes(partial(step, tokens, lengths, RATE), "cpu")), flush=True)
            continue
        start = time.process_time()
        loss, norm = step(tokens, lengths, RATE)
        print(json.dumps([time.process_time() - start, loss, norm]), flush=True)


def serve_unavoidable(folder: Path, lengths: list[int]) -> None:
    """At each line of input prints the seconds of a step's unavoidable work: its products, attention and AdamW."""
    from longreach.benchmarks.steps.unavoidable import Unavoidable

    work = Unavoidable(folder, lengths)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(list(work.step().values())), flush=True)


class Worker:
    """A process that takes the steps of one side."""

    def __init__(self, side: str, folder: Path, kind: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **QUIET}
        command = [sys.executable, __file__, "--serve", side, str(folder), kind]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def step(self) -> list[float]:
        """Seconds, loss and norm of the next step; of unavoidable work the seconds of its parts."""
        return self._ask("\n")

    def end(self) -> int:
        """The bytes by which memory grew within a last step."""
        grown = self._ask(PEAK)
        self.close()
        return grown

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, order: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(order)
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if re.match(r'\[|"|\d', line):  # libraries may print too
                return json.loads(line)
        raise SystemExit(f"{' '.join(map(str, self._process.args))} failed")


def measured(name: str, kind: str, rounds: int) -> str:
    """The line of a model on a kind of row."""
    with tempfile.TemporaryDirectory() as work:
        workers = {side: Worker(side, Path(work, name), kind) for side in (*SIDES, ALONE)}
        found: dict[str, list[list[float]]] = {side: [] for side in workers}
        for _ in range(1 + rounds):
            for side, worker in workers.items():
                found[side].append(worker.step())
        workers[ALONE].close()
        peaks = {side: workers[side].end() for side in SIDES}
    apart = [
        max(abs(a - b) / abs(b) for a, b in zip(ours[1:], theirs[1:], strict=True))
        for ours, theirs in zip(found["LongReach"], found["transformers"], strict=True)
    ]
    differ = apart[0], max(apart[1:])
    if differ[0] > FIRST_APART or differ[1] > APART:
        raise SystemExit(
            f"{name}: losses and norms must differ by less than {FIRST_APART} in the first step and {APART} in later "
            f"ones; got {differ[0]:.0e} and {differ[1]:.0e}: another model"
        )
    found[ALONE] = [[sum(parts)] for parts in found[ALONE]]
    times = {side: statistics.median(answer[0] for answer in answers[1:]) for side, answers in found.items()}
    return line(name, kind, rounds, times, peaks, differ)


def line(
    name: str, kind: str, rounds: int, times: dict[str, float], peaks: dict[str, float], differ: tuple[float, float]
) -> str:
    """A line of the table. The goals are of whole rows alone, and that of memory of the longer one."""
    ratio, share = times["transformers"] / times["LongReach"], peaks["LongReach"] / peaks["transformers"]
    goal, half = SHAPES[name].faster.get(kind), 0.5 if kind == "8192" else None
    bound = times["transformers"] / times[ALONE]

    def verdict(met: bool, reachable: bool = True) -> str:
        return "met" if met else "NOT met" if reachable else f"NOT met (bound {bound:.2f})"

    cells = [name, kind, f"{rounds}", *(f"{times[side]:.2f} s" for side in ORDER), f"{ratio:.2f}"]
    cells += [f"{goal}", verdict(ratio >= goal, goal <= bound)] if goal else ["", ""]
    cells += [f"{times[ALONE]:.2f} s", f"{bound:.2f}"]
    cells += [*(f"{peaks[side] / 2**20:,.0f} MiB" for side in ORDER), f"{share:.2f}"]
    cells += [f"{half}", verdict(share <= half)] if half else ["", ""]
    return f"| {' | '.join([*cells, *(f'{each:.0e}' for each in differ)])} |"


def written() -> dict[tuple[str, str], str]:
    """The rows that the page has, but for those of a table of other columns."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    found = ((re.match(r"\| (\w+) \| (\w+) \| \d", each), each) for each in lines)
    columns = HEAD.partition("\n")[0].count("|")
    return {(match[1], match[2]): each for match, each in found if match and each.count("|") == columns}


def write(rows: dict[tuple[str, str], str]) -> None:
    import transformers

    kept = [rows[key] for key in sorted(rows, key=lambda key: (list(SHAPES).index(key[0]), list(ROWS).index(key[1])))]
    models = "\n".join(f"- {name}: {shape.told}" for name, shape in SHAPES.items())
    parts = [
        "# A training step beside transformers",
        f"`python benchmarks/steps/peers.py --write`, {machine('cpu')}, transformers {transformers.__version__}.",
        " ".join(__doc__.split("\n\n")[2].split()),
        "\n".join([HEAD, *kept]),
        f"Width {COMMON['hidden_size']}, a vocabulary of {VOCABULARY:,}:\n\n{models}",
        f"A packed row has documents of {', '.join(map(str, ROWS['packed']))} tokens; others are one document.",
        NOTE,
    ]
    PAGE.write_text("\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["2048", "8192", "packed"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        side, folder, kind = chosen.serve
        serve(side, Path(folder), ROWS[kind])
        return
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    for name in chosen.models:
        for kind in chosen.rows:
            if kind == "packed" and not SHAPES[name].packs:
                continue
            found = measured(name, kind, chosen.rounds)
            print(found, flush=True)
            if chosen.write:
                write({**written(), (name, kind): found})


if __name__ == "__main__":
    main()
