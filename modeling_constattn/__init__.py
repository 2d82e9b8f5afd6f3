from .attention_constattn import ConstAttnState, constant_attention, quadratic_attention, scan_attention
