"""The table of mixers is that of today, decoding keeps what it says, and hard inputs give finite results."""

import re

import pytest
import torch
from mixer_table import COMMAND, PAGE, Described, calls_of, kept_by, measured, page, row
from model_presets import MIXERS, WIDTH, build_mixer

from longreach.kernels.documents import Documents
from longreach.parallel.sequence import DecodingCache, Sequence

ROWS = {found[1]: found[0] for found in re.finditer(r"^\| \*\*(\w+)\*\*.*$", PAGE.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_that_of_today(name):
    assert name in MIXERS, f"conf/mixer has no {name}; run {COMMAND}"
    assert ROWS[name] == row(name, measured().get(name, {})), f"run {COMMAND}"


def test_every_mixer_has_a_row():
    missing = [name for name in MIXERS if name not in ROWS]
    assert not missing, f"docs/mixers.md has no row for {', '.join(missing)}; run {COMMAND} {' '.join(missing)}"
    assert PAGE.read_text() == page(ROWS, {name: Described(name).family for name in ROWS}), f"run {COMMAND}"


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_decoding_keeps_what_the_table_says(name):
    """States are of one size whatever the length, and keys and values grow by those of the new tokens."""
    mixer, cache, sizes = build_mixer(name), DecodingCache(), []
    for length in (47, 48):  # one token before blocks are full
        mixer(torch.randn(1, length, WIDTH, dtype=torch.float64), Sequence.decoding(cache, 1, length))
        cache.advance(length)
        sizes.append(bytes_kept(cache))
    kept = [kept_by(call) for call in calls_of(mixer.to("meta"), WIDTH, torch.float64)[1]]
    growth = 48 * sum(each.per_token for each in kept)
    assert sizes[1] - sizes[0] == growth
    assert growth or sizes[0] == sum(each.fixed for each in kept)


def bytes_kept(cache):
    rows = sum(of.kept * sum(x[0, 0].numel() * x.element_size() for x in of.tensors) for of in cache.rows.values())
    return sum(x.numel() * x.element_size() for x in cache.states.values()) + rows


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_large_inputs_and_documents_of_one_token_are_finite(name, dtype):
    """Keys of 0, gates far beyond saturation, and rows in which every token is a document: outputs and gradients."""
    mixer = build_mixer(name, dtype)
    x = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(0))
    x[0, :12], x[0, 12:] = 0, 100 * x[0, 12:]
    leaf = x.to(dtype).requires_grad_()
    out = mixer(leaf, Sequence.single(Documents.from_lengths([[24], [1] * 24])))
    out.sum().backward()
    for tensor in (out, leaf.grad, *(parameter.grad for parameter in mixer.parameters())):
        assert tensor is None or tensor.isfinite().all()
