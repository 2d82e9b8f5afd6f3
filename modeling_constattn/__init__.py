"""ConstAttn: Transformers models whose attention costs the same for every token. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .attention_constattn import ConstAttnState, constant_attention, quadratic_attention, scan_attention
from .cache_constattn import ConstAttnCacheLayer, cache_nbytes
from .configuration_constattn import ConstAttnConfig
from .modeling_constattn import ConstAttnForCausalLM, ConstAttnModel

__version__ = "0.1.0"

AutoConfig.register("constattn", ConstAttnConfig)
ConstAttnConfig.register_for_auto_class()
for _auto_class, _model_class in ((AutoModel, ConstAttnModel), (AutoModelForCausalLM, ConstAttnForCausalLM)):
    _auto_class.register(ConstAttnConfig, _model_class)
    _model_class.register_for_auto_class(_auto_class.__name__)  # saving a model copies its code beside the weights

__all__ = [
    "ConstAttnCacheLayer",
    "ConstAttnConfig",
    "ConstAttnForCausalLM",
    "ConstAttnModel",
    "ConstAttnState",
    "cache_nbytes",
    "constant_attention",
    "quadratic_attention",
    "scan_attention",
]
