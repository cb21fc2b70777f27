"""Small checkpoints on the disk, without an engine, and what can happen to them."""

import json
import os
from pathlib import Path

import torch

from longreach.trainer.checkpoint.stored import FORMAT
from longreach.trainer.checkpoint.tensor_files import TensorWriter


def store(folder: Path, step: int) -> Path:
    """A whole checkpoint of one parameter."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    files = {}
    for kind, names in (("weights", ["w"]), ("moments", ["exp_avg/w", "exp_avg_sq/w"])):
        writer = TensorWriter(path / f"{kind}-00001-of-00001.safetensors", dict.fromkeys(names, (3,)))
        for name in names:
            writer.write(name, torch.full((3,), float(step)))
        writer.close()
        files[writer.path.name] = {"bytes": writer.size, "crc32": writer.checksums}
    index = {"format": FORMAT, "state": {"step": step}, "adam_steps": step, "files": files}
    (path / "index.json").write_text(json.dumps(index))
    return path


def _weights(path: Path) -> Path:
    return next(path.glob("weights-*"))


def truncated(path: Path) -> None:
    os.truncate(_weights(path), _weights(path).stat().st_size - 4)


def flipped(path: Path) -> None:
    data = bytearray(_weights(path).read_bytes())
    data[-1] ^= 1
    _weights(path).write_bytes(data)


def missing(path: Path) -> None:
    next(path.glob("moments-*")).unlink()


def torn_index(path: Path) -> None:
    (path / "index.json").write_text((path / "index.json").read_text()[:60])


def no_state(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | {"state": None}))


def unreadable(path: Path) -> None:
    """A folder in the place of the file: as a file without permission, for the superuser too."""
    (path / "index.json").unlink()
    (path / "index.json").mkdir()


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def a_file(path: Path) -> None:
    empty(path)
    path.rmdir()
    path.write_text("")


DAMAGE = [truncated, flipped, missing, torn_index, no_state, unreadable, empty, a_file]
