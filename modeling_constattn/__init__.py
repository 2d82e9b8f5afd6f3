"""ConstAttn: Transformers models whose attention costs the same for every token. Importing it registers the Auto classes."""

import transformers

from .attention_constattn import ConstAttnState, constant_attention, quadratic_attention, scan_attention
from .cache_constattn import (
    CompressedCacheLayer,
    ConstAttnCacheLayer,
    LearnedState,
    cache_nbytes,
    merge_caches,
    row_lengths,
    split_cache,
    stack_caches,
)
from .compressed_constattn import CompressedState, compressed_attention, quadratic_compressed_attention
from .configuration_constattn import ConstAttnConfig
from .context_constattn import shard
from .cpu_constattn import speed_up_cpu_inference
from .modeling_constattn import (
    AUTO_CLASSES,
    ConstAttnForCausalLM,
    ConstAttnForMaskedLM,
    ConstAttnForQuestionAnswering,
    ConstAttnForSequenceClassification,
    ConstAttnForTokenClassification,
    ConstAttnModel,
)
from .state_files_constattn import check_cache_path, load_cache, model_fingerprint, read_cache_header, save_cache

__version__ = "0.1.0"

transformers.AutoConfig.register("constattn", ConstAttnConfig)
ConstAttnConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(ConstAttnConfig, _model_class)
    _model_class.register_for_auto_class(_auto_class)  # saving a model copies its code beside the weights

__all__ = [
    "CompressedCacheLayer",
    "CompressedState",
    "ConstAttnCacheLayer",
    "ConstAttnConfig",
    "ConstAttnForCausalLM",
    "ConstAttnForMaskedLM",
    "ConstAttnForQuestionAnswering",
    "ConstAttnForSequenceClassification",
    "ConstAttnForTokenClassification",
    "ConstAttnModel",
    "ConstAttnState",
    "LearnedState",
    "cache_nbytes",
    "check_cache_path",
    "compressed_attention",
    "constant_attention",
    "load_cache",
    "merge_caches",
    "model_fingerprint",
    "quadratic_attention",
    "quadratic_compressed_attention",
    "read_cache_header",
    "row_lengths",
    "save_cache",
    "scan_attention",
    "shard",
    "speed_up_cpu_inference",
    "split_cache",
    "stack_caches",
]
