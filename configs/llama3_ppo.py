"""The paper's SFT, then a reward model and PPO with it, of Llama-3.2-3B or Llama-3.1-8B.

    python -m vdjax.main --config configs/llama3_ppo.py:8b,wildchat,ultrafeedback --workdir runs/llama3_ppo

Words of the argument, in any order: 3b or 8b; wildchat or alpaca; ultrafeedback or hh-rlhf.
"""

from ml_collections import ConfigDict

from configs import base

# Gated: accept the licence on the hub, then `hf auth login`.
SIZES = {"3b": "meta-llama/Llama-3.2-3B", "8b": "meta-llama/Llama-3.1-8B"}
CHAT_TEMPLATE = "llama3"  # the base models have none; the tokens of this one are in their vocabulary


def get_config(arg: str = "") -> ConfigDict:
    return base.experiment(arg, SIZES, CHAT_TEMPLATE, preference="ppo")
