"""`transformers serve`, and with it `transformers chat`, for ConstAttn checkpoints.

    python scripts/transformers_serve.py --device cpu
    transformers chat runs/tiny http://localhost:8000/v1

It takes the options of `transformers serve`, which looks for a checkpoint's class among Transformers' own and nowhere else: so
this puts it there. Needs the extra `serving`.
"""

import sys

import transformers
from transformers.cli.transformers import app

from modeling_constattn import ConstAttnForCausalLM

if __name__ == "__main__":
    transformers.ConstAttnForCausalLM = ConstAttnForCausalLM
    app(["serve", *sys.argv[1:]])
