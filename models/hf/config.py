"""config.json, read and written key by key; every key or setting that does not fit is named at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("longreach")

# Keys of every config.json that say nothing about the function that the weights compute.
IGNORED = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "pretraining_tp",
        "output_router_logits",
        "keys_to_ignore_at_inference",
        "max_position_embeddings",
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "task_specific_params",
    ]
)

# Keys that an export says anew or that are of another file, so that those of the model it began with do not count.
SAID_ANEW = frozenset(
    [
        "rope_parameters",
        "original_max_position_embeddings",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "quantization_config",
        "auto_map",
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
    ]
)


class ConfigReader:
    """A config.json, read key by key; `finish` raises one ValueError that names every key that does not fit."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []
        self._read: set[str] = set(IGNORED)

    def problem(self, text: str) -> None:
        """Notes what does not fit, once: several parts of a model may read the same key."""
        if text not in self.problems:
            self.problems.append(text)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.config.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problem(f"{key} must be a positive integer; got {value!r}")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number; `default` where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        return self.positive(key, value)

    def positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problem(f"{key} must be a positive number; got {value!r}")
            return 1.0
        return float(value)

    def coefficient(self, key: str, default: float) -> float:
        """A number that is not negative; `default` where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            self.problem(f"{key} must be a number that is not negative; got {value!r}")
            return default
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """So many positive numbers; all 1 where the key is absent or null."""
        value = self.get(key)
        value = [1.0] * count if value is None else value
        if not isinstance(value, list | tuple) or len(value) != count:
            self.problem(f"{key} must list {count} positive numbers; got {value!r}")
            return [1.0] * count
        return [self.positive(key, number) for number in value]

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.problem(f"{key} must be true or false; got {value!r}")
            return default
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Only these values of the key are computed here; an absent or null key stands for the first."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self.problem(f"{key} must be {' or '.join(map(repr, allowed))}; got {value!r}")

    def absent(self, key: str, why: str) -> None:
        """The key must be absent, null, false, zero or empty."""
        value = self.get(key)
        if value not in (None, False, {}, [], [0]):
            self.problem(f"{key} must be absent; got {value!r}. {why}")

    def finish(self) -> None:
        if self.problems:
            raise ValueError(
                f"config.json describes a {self.config.get('model_type')} model that is not supported: "
                + "; ".join(self.problems)
            )
        unknown = sorted(set(self.config) - self._read)
        if unknown:
            logger.warning("config.json: ignored keys that this architecture does not define: %s", ", ".join(unknown))


class ConfigWriter:
    """A config.json that is being written, and `problems`: the settings that it cannot express.

    kinds: for each part by its name in the settings, the name of the component that it is written as. layers: the names
        of the mixers of each layer.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config: dict[str, Any] = dict(config or {})
        self.problems: list[str] = []
        self.kinds: dict[str, str] = {}
        self.layers: list[tuple[str, ...]] = []
        self._settings: dict[str, str] = {}  # by key

    def put(self, key: str, value: Any, setting: str) -> None:
        """Writes the value of `setting`. Settings that share a key must be equal."""
        if key not in self.config:
            self.config[key], self._settings[key] = value, setting
        elif self.config[key] != value:
            first = f"{self._settings.get(key, key)}={self.config[key]!r}"
            self.problems.append(f"{first} with {setting}={value!r}, which must be equal")

    def refuse(self, setting: str, value: Any, why: str = "") -> None:
        self.problems.append(f"{setting}={value!r}{why}")
