"""gpt-oss (OpenAI, 2025, arXiv 2508.10925): windows in every other layer, sinks, experts with biases and a limit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...components import ATTENTION, MIXTURE, MODEL
from ...config import ConfigReader, ConfigWriter
from ...family import Family, renamed
from ...fields import Fixed, Flag, Integer, Number, Quotient
from ...layers import EXPERTS, FULL, WINDOW, Every, LayerTypes, every_nth_full
from ...rope import RopeBase
from ...rules import Absent, Known, Only, Rule
from ...tensors import Weight, inputs_first, rows_of

SCALING = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where nothing is said of positions, transformers scales them."""
    new = renamed(num_experts="num_local_experts")(config)
    return new if new.get("rope_scaling") or new.get("rope_parameters") else {**new, "rope_scaling": SCALING}


class SaidUnscaled(Rule):
    """Where positions are not scaled, `rope_parameters` says so."""

    def read(self, reader: ConfigReader) -> None:
        pass

    def write(self, writer: ConfigWriter) -> None:
        if writer.config.get("rope_scaling") is None:
            base = writer.config.get("rope_theta")
            writer.config["rope_parameters"] = {"rope_type": "default", "rope_theta": base}


def _gated(number: int, ours: str) -> dict[str, str | Weight]:
    """Of gates and values, which alternate, one."""

    def rows(layer: Any) -> Tensor:
        return rows_of(number, (1, 1), layer.hidden)

    name = "mlp.experts.gate_up_proj"
    return {
        f"experts.{ours}.weight": inputs_first(name, rows),
        f"experts.{ours}.bias": Weight(f"{name}_bias", rows=rows, dim=1),
    }


attention = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
    head_dim=Integer("head_dim", Quotient("hidden_size", "num_attention_heads"), absent=64),
    rope_base=RopeBase(150000.0),
    bias=Flag("attention_bias", default=True),
    output_bias=Flag("attention_bias", default=True),
    sink_logits=Fixed(True),
    names={"sink_logits": "self_attn.sinks"},
)

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window", absent=128))},
    layers=LayerTypes(every_nth_full(2)),
    feed_forwards={
        EXPERTS: MIXTURE.but(
            experts=Integer("num_local_experts", 128),
            experts_per_token=Integer("num_experts_per_tok", 4),
            router_bias=Fixed(True),
            bias=Fixed(True),
            limit=Number("swiglu_limit", 7.0),
            names={
                "router.weight": "mlp.router.weight",
                "router.logit_bias": "mlp.router.bias",
                **_gated(0, "gate"),
                **_gated(1, "up"),
                "experts.down.weight": inputs_first("mlp.experts.down_proj"),
                "experts.down.bias": "mlp.experts.down_proj_bias",
            },
        )
    },
    feed_forward_layers=Every(EXPERTS),
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(
        Only("hidden_act", ("silu", "swish")),
        Only("attention_dropout", (0.0, 0)),
        Only("swiglu_alpha", (1.702,)),
        Absent(
            "quantization_config",
            "Save the model dequantised: AutoModelForCausalLM.from_pretrained(PATH, quantization_config="
            "Mxfp4Config(dequantize=True)).save_pretrained(OTHER_PATH)",
        ),
        SaidUnscaled(),
        Known(("initial_context_length", "experts_per_token")),
    ),
    current=_current,
)
