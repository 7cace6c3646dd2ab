"""The paper's SFT of Llama-3.2-3B or Llama-3.1-8B.

    python -m vdjax.main --config configs/llama3_sft.py:8b,alpaca --workdir runs/llama3_sft

Words of the argument, in any order: 3b or 8b; wildchat or alpaca.
"""

from ml_collections import ConfigDict

from configs import base

# Gated: accept the licence on the hub, then `hf auth login`.
SIZES = {"3b": "meta-llama/Llama-3.2-3B", "8b": "meta-llama/Llama-3.1-8B"}
CHAT_TEMPLATE = "llama3"  # the base models have none; the tokens of this one are in their vocabulary


def get_config(arg: str = "") -> ConfigDict:
    return base.experiment(arg, SIZES, CHAT_TEMPLATE)
