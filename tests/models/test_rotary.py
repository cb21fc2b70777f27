"""Rotary positions of a model: one set of angles per batch, the same ones on every layer, rank and piece."""

import pytest
import torch
from model_presets import build_model, randomise, tokens

from longreach.kernels.documents import Documents
from longreach.kernels.pointwise import RopeScaling, Rotation, rope
from longreach.models.layers.rotary import Rotary
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 24
DOCUMENTS = Documents.from_lengths([[9, 15], [20]], LENGTH)
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_a_packed_row_turns_by_the_positions_of_its_documents(scaling, dtype):
    x = torch.randn(2, LENGTH, 3, 16).to(dtype)
    frequencies, factor = Rotation(8, 1e4, RopeScaling(**scaling) if scaling else None).frequencies()
    expected = rope(x, DOCUMENTS.positions(), inverse_frequencies=frequencies, attention_factor=factor)
    assert torch.equal(Rotary(16, 1e4, 0.5, scaling)(x, Sequence.single(DOCUMENTS)), expected)


def test_ranks_and_decoded_pieces_turn_by_positions_in_the_row():
    x, rotary = torch.randn(2, LENGTH, 3, 16), Rotary(16, 1e4)
    whole = rotary(x, Sequence.single(DOCUMENTS))
    layout = Layout(LENGTH, 2, 2)
    seq = Sequence.rehearsal(DOCUMENTS, layout, Strategy())
    assert torch.equal(rotary(seq.shard(x), seq), seq.shard(whole))
    cache, row = DecodingCache(), rotary(x, Sequence.single(Documents.whole(2, LENGTH)))
    cache.advance(11)
    assert torch.equal(rotary(x[:, 11:], Sequence.decoding(cache, 2, LENGTH - 11)), row[:, 11:])


LONGROPE = {
    "kind": "longrope",
    "factor": 4.0,
    "original_length": 15,
    "short_factors": [1.0] * 8,
    "long_factors": [4.0] * 8,
}


@pytest.mark.parametrize("scaling", [{"kind": "dynamic", "factor": 2.0, "original_length": 15}, LONGROPE], ids=str)
def test_a_scaling_by_length_refuses_longer_documents_on_every_rank_whatever_it_holds_of_them(scaling):
    x = torch.randn(2, LENGTH, 3, 16)
    for rotary, most in ((Rotary(16, 1e4, 1.0, scaling), 15), (Rotary(16, 1e4, 1.0, scaling | {"length": 20}), 20)):
        fits, beyond = [Documents.from_lengths([[9, 15], [longest]], LENGTH) for longest in (most, most + 1)]
        rotary(x, Sequence.single(fits))
        if rotary.rotation.longest is None:  # long factors are those of any length beyond the original
            rotary(x, Sequence.single(beyond))
            continue
        layout = Layout(LENGTH, 2, 1)
        message = f"rope_scaling.length must be at least .*; got {most} for one of {most + 1} tokens"
        for seq in (Sequence.single(beyond), Sequence.rehearsal(beyond, layout, Strategy())):
            with pytest.raises(ValueError, match=message):
                rotary(seq.shard(x), seq)
        cache = DecodingCache()
        cache.advance(most - 1)
        rotary(x[:, :1], Sequence.decoding(cache, 2, 1))
        with pytest.raises(ValueError, match=message):
            rotary(x[:, :2], Sequence.decoding(cache, 2, 2))


def test_a_scaling_of_other_settings_is_refused_by_their_names():
    for scaling, message in (
        (YARN | {"lenght": 3}, "rope_scaling must have settings of kind, factor, .*; got lenght"),
        ({"kind": "linear"}, "rope_scaling must have factor; got kind"),
        (LONGROPE | {"long_factors": [1.0]}, "long_factors must be one for each pair of the 16 dims"),
    ):
        with pytest.raises(ValueError, match=message):
            Rotary(16, 1e4, 1.0, scaling)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_all_layers_of_a_step_share_one_set_of_angles_for_each_base(checkpointing, monkeypatch):
    made = []
    original = Rotation.frequencies
    monkeypatch.setattr(Rotation, "frequencies", lambda self: made.append(self) or original(self))
    model = build_model("sliding_window_tiny", activation_checkpointing=checkpointing)  # two bases
    randomise(model)
    inputs = tokens(1, LENGTH)
    seq = Sequence.single(Documents.whole(1, LENGTH))
    model(inputs, seq, inputs)[0].backward()
    kept = seq._derived.rotations
    assert {rotation.base for rotation, *_ in kept} == {1e4, 1e6}
    assert len(kept) == 2
    assert len(made) == 4  # each twice: the frequencies, and the factor
    assert all(x.shape == (1, LENGTH, rotation.dims // 2) for (rotation, *_), pair in kept.items() for x in pair)
