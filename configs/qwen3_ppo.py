"""The paper's SFT, then a reward model and PPO with it, of Qwen3-4B-Base or Qwen3-8B-Base.

    python -m vdjax.main --config configs/qwen3_ppo.py:8b,wildchat,ultrafeedback --workdir runs/qwen3_ppo

Words of the argument, in any order: 4b or 8b; wildchat or alpaca; ultrafeedback or hh-rlhf.
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {"4b": "Qwen/Qwen3-4B-Base", "8b": "Qwen/Qwen3-8B-Base"}
# Not the template in the tokenizer: that one puts an empty <think> block before a conversation's last answer.
CHAT_TEMPLATE = "chatml"


def get_config(arg: str = "") -> ConfigDict:
    return base.experiment(arg, SIZES, CHAT_TEMPLATE, preference="ppo")
