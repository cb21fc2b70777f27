"""A Hugging Face checkpoint trained on in rows of four times its length, and handed back to transformers.

python examples/05_longer_context.py

The checkpoint is a tiny Llama with random weights, made here; in place of it stands the path of any model that
docs/checkpoints.md lists. The commands are those of the shell: python -m longreach.launch.train init_from=… and so on.
"""

import email
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ENDS, SHORT, LONG = "<|endoftext|>", 256, 1024
TEXTS = Path(email.__file__).parent


def make(folder: Path) -> PreTrainedTokenizerFast:
    """A model of 150,000 parameters, made for documents of 256 tokens, and its tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train(
        [str(path) for path in sorted(TEXTS.glob("*.py"))], trainers.BpeTrainer(vocab_size=512, special_tokens=[ENDS])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=ENDS)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=SHORT, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def run(command: str, *overrides: str) -> None:
    """python -m longreach.launch.<command> with overrides."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-m", f"longreach.launch.{command}", *overrides], check=True, env=environment)


def loss(folder: Path, tokens: torch.Tensor) -> float:
    """What transformers computes for the tokens, in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(tokens, labels=tokens).loss.item()


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    tokenizer = make(folder / "short")
    run(
        "train",
        f"init_from={folder}/short",
        f"run.dir={folder}/run",
        "data=text",
        f"data.path={TEXTS}/*.py",
        f"data.cache_dir={folder}/cache",
        f"data.sequence_length={LONG}",
        "data.rows_per_step=2",
        "+model.mixers.full.rope_base=50000",  # slower rotation, for longer documents
        "optimizer.learning_rate=3e-3",
        "trainer.steps=30",
        "evaluation.every=0",
        "evaluation.sample_tokens=0",
        "logger.wandb.mode=disabled",
    )
    run("export", f"checkpoint={folder}/run", f"path={folder}/long")

    text = (TEXTS / "header.py").read_text()
    tokens = torch.tensor([tokenizer.encode(text)[:LONG]])
    for name in ("short", "long"):
        config = json.loads((folder / name / "config.json").read_text())
        positions = config["max_position_embeddings"]
        print(f"{name}: {positions} positions, {loss(folder / name, tokens):.2f} nats per token over {LONG} tokens")
