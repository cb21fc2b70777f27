"""Checkpoints: bitwise at every topology and stage, whole or not at all, and refused where they do not fit."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from distributed import RankError, run_ranks
from safetensors.torch import load_file
from small_model import SmallModel, full, make_engine, train_step

from longreach.trainer.checkpoint import checkpoint
from longreach.trainer.checkpoint.checkpoint import CheckpointError, assign, latest, load, load_weights, save, verify
from longreach.trainer.zero.masters import KINDS

pytestmark = pytest.mark.slow  # engines on several ranks: a minute together

EVERY_KIND = [(0, "float32"), *((stage, dtype) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16"))]


def bits(engine):
    return {kind: {n: v.view(torch.int32) for n, v in full(engine, kind).items()} for kind in KINDS}


def same(a, b):
    return all(torch.equal(a[kind][name], b[kind][name]) for kind in KINDS for name in a[kind])


def visible(engine):
    values = {}
    for name, parameter in engine.named_parameters():
        with engine.gather([parameter]):
            values[name] = parameter.detach().clone()
    return values


def train_and_save(rank, world, folder, stage, dtype, steps):
    """Two steps, a checkpoint in pieces of 16 elements, and `steps` more; what was saved, and what came after."""
    engine = make_engine(stage, dtype=dtype, clip=0.5)
    for step in range(2):
        train_step(engine, step, rank, world, 1)
    _, moment = engine.fragment(next(iter(dict(engine.named_parameters()).values())), "exp_avg")
    moment[:3] = -0.0  # a bit that sums of floats would lose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "PIECE", 16)
        save(engine, folder, {"step": 2, "text": "ä", "rate": 0.1}, keep=2)
    saved = bits(engine)
    norms = [train_step(engine, step, rank, world, 1) for step in range(2, 2 + steps)]
    return saved, norms, bits(engine)


def load_and_train(rank, world, path, stage, dtype, steps):
    engine = make_engine(stage, dtype=dtype, clip=0.5, seed=7)
    state = load(engine, path)
    loaded, seen, taken = bits(engine), visible(engine), engine.adam_steps
    norms = [train_step(engine, step, rank, world, 1) for step in range(2, 2 + steps)]
    return state, loaded, seen, taken, norms, bits(engine)


@pytest.mark.parametrize(("stage", "dtype"), EVERY_KIND)
def test_resuming_on_the_same_ranks_and_stage_is_bitwise(tmp_path, stage, dtype):
    before = run_ranks(2, train_and_save, tmp_path, stage, dtype, 3)
    after = run_ranks(2, load_and_train, latest(tmp_path), stage, dtype, 3)
    for (_, norms, end), (_, _, _, _, resumed_norms, resumed_end) in zip(before, after, strict=True):
        assert norms == resumed_norms
        assert same(end, resumed_end)


@pytest.mark.parametrize(
    ("world", "stage", "dtype", "others"),
    [
        (2, 1, "float32", [(1, 0, "float32"), (4, 3, "float32"), (1, 2, "bfloat16")]),
        (4, 3, "bfloat16", [(2, 1, "bfloat16"), (1, 3, "bfloat16"), (2, 0, "float32")]),
        (1, 0, "float32", [(2, 3, "float32"), (4, 1, "float32")]),
        (4, 2, "float32", [(2, 3, "bfloat16"), (2, 2, "float32"), (4, 1, "bfloat16")]),
    ],
)
def test_any_ranks_and_stage_load_it_bit_by_bit(tmp_path, world, stage, dtype, others):
    saved, _, _ = run_ranks(world, train_and_save, tmp_path, stage, dtype, 0)[0]
    norms = []
    for other in others:
        results = run_ranks(other[0], load_and_train, tmp_path / "step-00000002", *other[1:], 1)
        for state, loaded, seen, taken, norm, _ in results:
            assert state == {"step": 2, "text": "ä", "rate": 0.1}
            assert taken == 2
            assert same(saved, loaded)
            for name, value in seen.items():
                assert torch.equal(value, saved["parameter"][name].view(torch.float32).to(value.dtype))
        norms += [norm[0] for *_, norm, _ in results if other[2] == "float32"]
    if norms:
        torch.testing.assert_close(norms, norms[:1] * len(norms), rtol=1e-5, atol=0)


def save_before_any_step(rank, world, folder):
    engine = make_engine(1)
    save(engine, folder, {"step": 0}, keep=1)
    return [train_step(engine, step, rank, world, 1) for step in range(2)], bits(engine)


def load_at_zero(rank, world, path):
    engine = make_engine(1, seed=3)
    load(engine, path)
    return [train_step(engine, step, rank, world, 1) for step in range(2)], bits(engine)


def test_a_checkpoint_before_the_first_step(tmp_path):
    norms, end = run_ranks(2, save_before_any_step, tmp_path)[0]
    resumed_norms, resumed_end = run_ranks(2, load_at_zero, tmp_path / "step-00000000")[0]
    assert norms == resumed_norms
    assert same(end, resumed_end)


def save_many(rank, world, folder, keep):
    engine = make_engine(2)
    for step in (1, 2, 3, 3, 12):
        save(engine, folder, {"step": step}, keep)


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path):
    (tmp_path / ".step-00000009.writing").mkdir()  # of a run that was killed
    run_ranks(2, save_many, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000012"]
    assert latest(tmp_path) == tmp_path / "step-00000012"
    run_ranks(2, save_many, tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]


def save_on_a_full_disk(rank, world, folder, full_rank):
    engine = make_engine(1)
    save(engine, folder, {"step": 1}, keep=1)
    train_step(engine, 0, rank, world, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        save(engine, folder, {"step": 2}, keep=1)
        message = None
    except CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    names = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    save(engine, folder, {"step": 3}, keep=1)
    return message, names, bits(engine)


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_is_told_on_every_rank_and_loses_nothing(tmp_path, full_rank):
    results = run_ranks(2, save_on_a_full_disk, tmp_path, full_rank)
    for message, names, _ in results:
        assert "step-00000002 could not be written: [Errno 27] File too large" in message
        assert f"(rank {full_rank})" in message
        assert names == ["step-00000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    _, loaded, *_ = run_ranks(1, load_and_train, tmp_path / "step-00000003", 0, "float32", 0)[0]
    assert same(loaded, results[0][2])


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RankError, match=r"CheckpointError: checkpoint .* could not be written: .*file"):
        run_ranks(2, save_before_any_step, tmp_path / "file")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(2, train_and_save, folder, 1, "float32", 0)
    return folder / "step-00000002"


def truncate(path):
    file = path / "moments-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def flip(path):
    file = path / "weights-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def spoil_header(path):
    file = path / "weights-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = b"\xff" * 8
    file.write_bytes(data)


def remove_file(path):
    (path / "weights-00002-of-00002.safetensors").unlink()


def remove_index(path):
    (path / "index.json").unlink()


def cut_index(path):
    (path / "index.json").write_text((path / "index.json").read_text()[:100])


def another_row(path):
    text = (path / "index.json").read_text()
    assert text.count('"step": 2') == 1
    (path / "index.json").write_text(text.replace('"step": 2', '"step": 3'))


def other_format(path):
    (path / "index.json").write_text('{"format": "something else"}')


def foreign_index(path):
    (path / "index.json").write_text("[1]")


def load_refused(rank, world, path, model):
    engine = make_engine(1, model=model)
    before = bits(engine)
    try:
        load(engine, path)
        message = None
    except CheckpointError as error:
        message = str(error)
    return message, same(before, bits(engine))


def wide():
    return SmallModel(width=12)


def deep():
    model = SmallModel()
    model.more = torch.nn.Linear(2, 3)
    return model


DAMAGE = [
    (truncate, "moments-00002-of-00002.safetensors has"),
    (flip, "in weights-00001-of-00002.safetensors have changed"),
    (spoil_header, "weights-00001-of-00002.safetensors cannot be read"),
    (remove_file, "weights-00002-of-00002.safetensors cannot be read"),
    (remove_index, "index.json cannot be read"),
    (cut_index, "index.json cannot be read"),
    (another_row, "index.json has changed since it was written"),
    (other_format, "not of the format"),
    (foreign_index, "index.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(tmp_path, good, damage, message):
    path = tmp_path / "step-00000002"
    shutil.copytree(good, path)
    damage(path)
    for got, unchanged in run_ranks(2, load_refused, path, SmallModel):
        assert message in got
        assert str(path) in got
        assert unchanged
    with pytest.raises(CheckpointError, match="must be complete and undamaged"):
        load_weights(path, SmallModel())


@pytest.mark.parametrize(
    ("model", "message"),
    [(wide, "safetensors has shape [23, 10] instead of [23, 12]"), (deep, "more.weight is missing")],
)
def test_a_checkpoint_of_another_model_is_refused(good, model, message):
    for got, unchanged in run_ranks(2, load_refused, good, model):
        assert message in got
        assert unchanged


def test_latest_passes_over_what_is_incomplete(tmp_path, good):
    assert latest(tmp_path / "nothing") is None
    for step in (2, 5, 10):
        shutil.copytree(good, tmp_path / f"step-{step:08d}")
    truncate(tmp_path / "step-00000010")
    shutil.copytree(good, tmp_path / ".step-00000011.writing")
    assert latest(tmp_path) == tmp_path / "step-00000005"


def test_weights_load_without_deepspeed(good):
    program = (
        "import sys; from small_model import SmallModel\n"
        "from longreach.trainer.checkpoint.checkpoint import load_weights\n"
        f"model = SmallModel(); state = load_weights({str(good)!r}, model); assert 'deepspeed' not in sys.modules\n"
        "print(state['step'], model.embedding.weight.double().sum().item())"
    )
    path = [str(folder) for folder in sys.path if folder]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{program}"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    step, total = result.stdout.split()
    stored = verify(good).map("embedding.weight")
    assert int(step) == 2
    assert float(total) == stored.double().sum().item()


def test_safetensors_reads_the_files(good):
    tensors = {}
    for file in good.glob("*.safetensors"):
        tensors.update(load_file(file))
    model = SmallModel()
    load_weights(good, model)
    names = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    assert set(tensors) == {*names, *buffers, *(f"{kind}/{name}" for kind in KINDS[1:] for name in names)}
    assert all(torch.equal(tensors[name], parameter) for name, parameter in names.items())
    assert json.loads((good / "index.json").read_text())["state"]["text"] == "ä"


def test_ranks_write_about_the_same():
    sizes = {f"p{i}": 10 + i for i in range(40)}
    names = assign(sizes, 8)
    assert sorted(name for part in names for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in names]
    assert max(loads) - min(loads) <= 10


def highest_memory(rank, world, folder):
    """Bytes that saving needed on top of what was held before, and the size of the largest tensor."""
    engine = make_engine(3, model=lambda: SmallModel(width=512, vocabulary=40_000))
    engine.create_moments()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    save(engine, folder, {"step": 1}, 1)
    return memory("VmHWM") - before, 4 * 40_000 * 512


def memory(key):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(key + ":")).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_saving_needs_no_more_memory_than_the_largest_tensor(tmp_path):
    for needed, largest in run_ranks(2, highest_memory, tmp_path, timeout=120):
        assert needed < 1.1 * largest


def save_with_a_note(rank, world, folder, full_disk):
    def beside(path):
        if full_disk:
            raise OSError("no room for the note")
        (path / "note.txt").write_text("here")

    save(make_engine(1), folder, {"step": 1}, 1, beside)


def test_more_files_go_into_the_folder(tmp_path):
    with pytest.raises(RankError, match="no room for the note"):
        run_ranks(2, save_with_a_note, tmp_path, True)
    assert list(tmp_path.iterdir()) == []
    run_ranks(2, save_with_a_note, tmp_path, False)
    assert (tmp_path / "step-00000001" / "note.txt").read_text() == "here"
    verify(tmp_path / "step-00000001")
