"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek-V3 whose queries read the tokens that an indexer selects."""

from dataclasses import replace

from ....mixers.sparse.sparse_latent_attention import SparseLatentAttention
from ...family import RULES
from ...fields import Chosen, Integer
from ...latent import COMPRESSED
from ...layers import DENSE, EXPERTS, ExpertsFrom, LayerTypes
from ...rules import Absent, Known, Only, Replaced, Same
from .deepseek_v3 import FAMILY as DEEPSEEK_V3

INDEXED = "indexed"
KINDS = {"deepseek_sparse_attention": INDEXED, "indexed_attention": INDEXED}  # the former in older versions

FAMILY = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    mixers={
        INDEXED: COMPRESSED.but(
            target=SparseLatentAttention,
            query_rank=Integer("q_lora_rank", absent=1536),
            top_k=Integer("index_topk", 2048),
            index_heads=Integer("index_n_heads", 64),
            index_dim=Integer("index_head_dim", 128),
            index_loss=Chosen(1.0),
            dense_steps=Chosen(0),
            names={
                "indexer.query": "self_attn.indexer.wq_b",
                "indexer.key": "self_attn.indexer.wk",
                "indexer.key_norm": "self_attn.indexer.k_norm",
                "indexer.weight": "self_attn.indexer.weights_proj",
            },
        )
    },
    layers=LayerTypes(lambda reader, depth: [INDEXED] * depth, KINDS),
    feed_forward_layers=LayerTypes(
        ExpertsFrom("first_k_dense_replace", absent=3).read, {"dense": DENSE, "sparse": EXPERTS}, "mlp_layer_types"
    ),
    rules=(
        *RULES,
        Same("num_key_value_heads", "num_attention_heads"),
        Only("scoring_func", ("sigmoid",)),
        Only("topk_method", ("noaux_tc",)),
        Only("moe_layer_freq", (1,)),
        Absent("mlp_bias", "The feed-forward layers here have none"),
        Replaced("num_nextn_predict_layers", 0),
        Known(("head_dim", "qk_head_dim", "first_k_dense_replace", "aux_loss_alpha", "seq_aux", "ep_size")),
    ),
)
