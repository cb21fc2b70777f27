"""python -m longreach.launch.harness --model longreach --model_args checkpoint=PATH --tasks … — benchmarks.

This is the command of lm-evaluation-harness (`pip install longreach[eval]`), which takes its settings, with a
checkpoint as one of its models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..models.decoding import continue_all, log_likelihoods
from ..trainer.checkpoint.choice import locate, read_config
from .generate import device_of, load

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]
except ModuleNotFoundError as error:
    MISSING = f"{error}. Install lm-evaluation-harness: pip install 'longreach[eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {MISSING}")
    raise ModuleNotFoundError(MISSING) from error

Request = TypeVar("Request")
NEW_TOKENS = 256  # that are generated where a task does not say how many
KNOWN = {"until", "do_sample", "temperature", "top_p", "max_gen_toks", "max_new_tokens"}


@register_model("longreach")
class LongReachLM(TemplateLM):
    """A checkpoint of LongReach, on one device.

    checkpoint: a checkpoint, or a run's folder, of which the newest is taken. max_length: tokens of context and
    continuation, by default the length of the rows that it was trained on. batch_size: requests at once, each of
    whatever length. prefill_tokens: tokens of each that are read at a time. device: auto, cpu or cuda.
    Texts begin as documents do; a text without context follows that beginning, or the end of a text if it has none.
    """

    def __init__(
        self,
        checkpoint: str,
        max_length: int | None = None,
        batch_size: int | str = 1,
        prefill_tokens: int = 4096,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1; got {batch_size!r}. Give it in --batch_size")
        self._device = device_of("auto" if device is None else device)
        path = locate(Path(checkpoint), "checkpoint")
        self.model, self.tokens = load(path, self._device)
        self.path = path
        self.max_length = int(max_length or read_config(path)["data"]["sequence_length"])
        self.batch_size, self.prefill_tokens = int(batch_size), int(prefill_tokens)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint, by which the harness tells requests that it has kept apart."""
        return str(self.path)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self.tokens.beginning[-1] if self.tokens.beginning else self.tokens.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, begun as documents are unless `add_special_tokens` is False."""
        return self.tokens.encode(string) if add_special_tokens is False else self.tokens.encode_prompt(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, of which parts of `max_length` tokens get the context there is room for."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        def score(batch: list[Any]) -> list[tuple[float, bool]]:
            rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in batch]
            given = [len(row) - len(continuation) for row, (*_, continuation) in zip(rows, batch, strict=True)]
            if min(given) < 1:
                raise ValueError(f"max_length must hold every continuation; got {self.max_length}. Raise it")
            scores = log_likelihoods(self.model, rows, given, prefill_tokens=self.prefill_tokens, device=self._device)
            for (texts, *_), result in zip(batch, scores, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
            return scores

        return self._in_batches(requests, lambda request: len(request[1]) + len(request[2]), score)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each context what the model adds up to the first of the texts `until`, which is left out."""
        kinds = {repr(sorted(request.args[1].items(), key=repr)): request.args[1] for request in requests}
        results: dict[int, str] = {}
        for kind, settings in kinds.items():
            mine = [n for n, r in enumerate(requests) if repr(sorted(r.args[1].items(), key=repr)) == kind]
            texts = self._generate([requests[n].args[0] for n in mine], settings)
            results.update(zip(mine, texts, strict=True))
            for number, text in zip(mine, texts, strict=True):
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [results[number] for number in range(len(requests))]

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        if unknown := set(settings) - KNOWN:
            raise ValueError(f"gen_kwargs must be among {sorted(KNOWN)}; got {sorted(unknown)}. Leave them out")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampled = settings.get("do_sample", False)
        new = int(settings.get("max_gen_toks", settings.get("max_new_tokens", NEW_TOKENS)))
        if new >= self.max_length:
            raise ValueError(f"max_gen_toks must be less than max_length, {self.max_length}; got {new}")

        def complete(batch: list[list[int]]) -> list[str]:
            ids: list[list[int]] = [[] for _ in batch]

            def ends(row: int, token: int) -> bool:
                ids[row].append(token)
                text = self.tokens.decode(ids[row])
                return any(stop in text for stop in stops)

            drawn = continue_all(
                self.model, batch, max_new_tokens=new, temperature=settings.get("temperature", 1.0) if sampled else 0.0,
                top_p=settings.get("top_p", 1.0) if sampled else 1.0, stop=(self.tokens.end_of_text,), ends=ends,
                known=self.tokens.ids(), prefill_tokens=self.prefill_tokens, device=self._device,
            )  # fmt: skip
            for _ in drawn:
                pass
            return [_before(self.tokens.decode(each), stops) for each in ids]

        prompts = [self.tok_encode(text) or [self.prefix_token_id] for text in contexts]
        return self._in_batches([ids[-(self.max_length - new) :] for ids in prompts], len, complete)

    def _in_batches(
        self, requests: list[Request], length: Callable[[Request], int], run: Callable[[list[Request]], list[Any]]
    ) -> list[Any]:
        """What `run` gives of requests of like length together, in the order of the requests."""
        order = sorted(range(len(requests)), key=lambda number: -length(requests[number]))
        results: dict[int, Any] = {}
        for batch in _cut(order, self.batch_size):
            results.update(zip(batch, run([requests[number] for number in batch]), strict=True))
        return [results[number] for number in range(len(requests))]


def _cut(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _before(text: str, stops: list[str]) -> str:
    """The text up to the first of the stops in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

    cli_evaluate()
