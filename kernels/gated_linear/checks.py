"""What the inputs of gated linear attention must be."""

from __future__ import annotations

from torch import Tensor

from ..documents import Documents

READS = ("inclusive", "exclusive")
NORMALISERS = (None, "sum", "at_least_one")


def check_variant(read: str, normaliser: str | None) -> None:
    """Raises ValueError for settings that do not exist."""
    if read not in READS:
        raise ValueError(f"read must be one of {', '.join(READS)}; got {read!r}. Choose one")
    if normaliser not in NORMALISERS:
        raise ValueError(
            f"normaliser must be one of {', '.join(map(str, NORMALISERS))}; got {normaliser!r}. Choose one"
        )


def check_vectors(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> None:
    """Raises ValueError unless queries, keys and values fit one another."""
    if q is None or k is None or v is None or any(x.dim() != 4 for x in (q, k, v)):
        shapes = [None if x is None else list(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v must be [B, T, heads, dim]; got {shapes}. Put time in dimension 1")
    heads = v.shape[2]
    if any(x.shape[:2] != v.shape[:2] or heads % x.shape[2] for x in (q, k)) or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must be [B, T, H or G, K] for v [B, T, H, V] with G dividing H; got {list(q.shape)}, "
            f"{list(k.shape)} and {list(v.shape)}. Check the heads of the mixer"
        )
    if v.shape[1] == 0:
        raise ValueError("the sequence must have at least one token; got none. Leave empty segments out")


def check_decays(k: Tensor, v: Tensor, log_decay: Tensor | None, value_log_decay: Tensor | None) -> None:
    """Raises ValueError for decays of other shapes, or positive ones; looks at values only of tensors on the host."""
    batch, length, heads, values = v.shape
    keys = k.shape[-1]
    known = {
        "log_decay": (log_decay, ((heads,), (heads, keys), (batch, length, heads), (batch, length, heads, keys))),
        "value_log_decay": (value_log_decay, ((batch, length, heads, values),)),
    }
    named = {"log_decay": "[H], [H, K], [B, T, H] or [B, T, H, K]", "value_log_decay": "[B, T, H, V]"}
    for name, (decay, shapes) in known.items():
        if decay is None:
            continue
        if decay.shape not in shapes:
            raise ValueError(
                f"{name} must be {named[name]} = {' or '.join(str(list(s)) for s in shapes)}; got "
                f"{list(decay.shape)}. Project it to one of these"
            )
        if decay.device.type == "cpu" and float(greatest := decay.detach().max()) > 0:
            raise ValueError(f"{name} must not be positive; got {float(greatest)}. Pass the logarithm of the decay")


def check_variants(
    k: Tensor,
    v: Tensor,
    decays: tuple[Tensor | None, Tensor | None],
    bonus: Tensor | None,
    log_input: Tensor | None,
    read: str,
    normaliser: str | None,
) -> None:
    """Raises ValueError for variants that have no meaning together, and for shapes of their tensors."""
    log_decay, value_log_decay = decays
    if bonus is not None and (read != "exclusive" or bonus.shape != (v.shape[2], k.shape[-1])):
        raise ValueError(
            f"bonus must be [H, K] = {[v.shape[2], k.shape[-1]]} and come with read='exclusive'; got "
            f"{list(bonus.shape)} and {read!r}. An inclusive read has the token itself without one"
        )
    if normaliser is not None and value_log_decay is not None:
        raise ValueError(
            f"normaliser must be None with a value_log_decay; got {normaliser!r}. The sum of what is read would "
            "be another one for each value channel"
        )
    if log_input is None:
        return
    if log_input.shape != v.shape[:3]:
        raise ValueError(
            f"log_input must be [B, T, H] = {list(v.shape[:3])}; got {list(log_input.shape)}. Give one a token and head"
        )
    if normaliser is None or (log_decay is not None and log_decay.dim() in (2, 4)):
        raise ValueError(
            "log_input must come with a normaliser and at most one decay a head; got normaliser="
            f"{normaliser!r} and log_decay {'None' if log_decay is None else list(log_decay.shape)}. Without a "
            "divisor its exponentials overflow, and one scale keeps them only where channels decay alike"
        )


def check_state(initial_state: Tensor | None, shape: tuple[int, ...], named: str) -> None:
    """Raises ValueError for an initial state of another shape."""
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(
            f"initial_state must be {named} = {list(shape)}; got {list(initial_state.shape)}. Pass the final state of "
            "the tokens before"
        )


def check_documents(v: Tensor, documents: Documents) -> None:
    """Raises ValueError unless the documents are those of the tokens, and only a row's first goes on from elsewhere."""
    if (documents.batch, documents.length) != tuple(v.shape[:2]):
        raise ValueError(
            f"documents must describe {v.shape[0]} rows of {v.shape[1]} tokens; got {documents.batch} rows of "
            f"{documents.length}. Build them for the tokens passed"
        )
    for row in documents.runs:
        for run in row[1:]:
            if run.position > 0:
                raise ValueError(
                    f"documents must start at position 0 inside a row; got position {run.position} at token "
                    f"{run.start}. Pass spans that are apart in the document as rows of their own"
                )
