"""What the configs of the paper's models and datasets share (Bhatia et al., arXiv 2510.26707).

The argument of such a config is a list of words joined by commas, in any order: a size, what SFT learns from and, where
there is a preference stage, what that learns from. What is left out takes the first name of its table below:

    configs/qwen3_dpo.py                      4B, WildChat, UltraFeedback
    configs/qwen3_dpo.py:8b,alpaca,hh-rlhf    8B, Alpaca, HH-RLHF

From the paper: models, datasets and 3 epochs of SFT. Its learning rates, batch sizes, lengths, beta and gamma are not
known to us, nor how much of each dataset it used: those values are our defaults. A dataset's `revision` is a commit of
its repository on the hub; for another one pass --config.STAGE.data.revision=COMMIT.
"""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from vdjax import config
from vdjax.errors import UserError, nearest

SFT_DATA: dict[str, dict[str, Any]] = {
    "wildchat": {  # all languages; one of them: --config.sft.data.options.language=English
        "source": "wildchat",
        "path": "allenai/WildChat-1M",
        "revision": "7d6490e462285cf85d91eabea0f9a954fbddcd1f",
    },
    "alpaca": {
        "source": "alpaca",
        "path": "tatsu-lab/alpaca",
        "revision": "dce01c9b08f87459cf36a430d809084718273017",
    },
}
PREFERENCE_DATA: dict[str, dict[str, Any]] = {
    "ultrafeedback": {
        "source": "ultrafeedback",
        "path": "HuggingFaceH4/ultrafeedback_binarized",
        "revision": "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        "split": "train_prefs",
    },
    "hh-rlhf": {  # the helpful and the harmless part
        "source": "hh-rlhf",
        "path": "Anthropic/hh-rlhf",
        "revision": "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
    },
}
HYPER: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},  # gamma in the reward's units, not the ratio gamma/beta
    "ppo": {"kl_coef": 0.05},
}
LEARNING_RATES = {"dpo": 5e-7, "simpo": 6e-7, "ppo": 1e-6}


def experiment(arg: str, sizes: dict[str, str], chat_template: str, preference: str = "") -> ConfigDict:
    """SFT and, with `preference` (dpo, simpo or ppo), that after it, from one of the base models `sizes`.

    PPO has a reward model before it, from the same pairs; it answers their prompts.
    """
    tables: list[Collection[str]] = [sizes, SFT_DATA, PREFERENCE_DATA if preference else ()]
    size, sft_data, preference_data = _choose(arg, tables)
    c = config.experiment()
    c.model.path = sizes[size]
    c.model.param_dtype = "float32"  # 12 bytes a parameter with AdamW's moments, and 4 more for gradients
    c.model.compute_dtype = "bfloat16"
    c.model.head_chunk = 512
    c.model.remat = "full"  # the memory of one layer's activations, for a third more work
    c.model.query_chunk = 512  # no [length, length] array of attention weights
    c.tokenizer.chat_template = chat_template
    c.mesh.fsdp = -1  # parameters spread over all devices
    c.probes.readouts = ("statement", "options")
    c.resume_every = 200  # three times a snapshot's bytes each; the last two are kept
    c.log_every = 10

    c.stages = ("sft", "reward", "ppo") if preference == "ppo" else ("sft", *filter(None, [preference]))
    c.sft = config.stage(
        "sft",
        data=SFT_DATA[sft_data],
        eval_examples=500,  # ours
        max_length=2048,  # ours
        batch_size=128,  # ours
        epochs=3,  # the paper's
        optimizer={"learning_rate": 1e-5},  # ours; with 10% warm-up, then cosine to 0
        snapshots={"log_spaced": 8},  # ten with the first and the last; --dry_run says how many bytes
    )
    if preference:
        c[preference] = config.stage(
            preference,
            hyper=HYPER[preference],  # ours
            data=PREFERENCE_DATA[preference_data],
            eval_examples=1000,  # ours
            max_length=2048,  # ours: a prompt and one response
            batch_size=128,  # ours
            epochs=1,  # ours
            optimizer={"learning_rate": LEARNING_RATES[preference]},  # ours
            snapshots={"log_spaced": 8},
        )
    if preference == "ppo":
        c.reward = config.stage(
            "reward_model",
            data=PREFERENCE_DATA[preference_data],
            eval_examples=1000,  # ours
            max_length=2048,  # ours
            batch_size=128,  # ours
            optimizer={"learning_rate": 5e-6},  # ours
        )
        c.ppo.rollout.update({"max_new_tokens": 512, "epochs": 2, "minibatches": 4})  # ours
        c.ppo.reward.update({"model": "reward", "missing_eos_penalty": 1.0})  # ours
        c.ppo.eval_examples = 128  # ours
    return c


def _choose(arg: str, tables: list[Collection[str]]) -> list[str]:
    """One name of each table: the one that `arg` has, else the table's first; "" of an empty table.

    Raises:
      UserError: a word of `arg` that is in no table, or two of one table.
    """
    words = [word.strip() for word in arg.split(",")] if arg else []
    for word in words:
        if not any(word in table for table in tables):
            raise UserError(f"config argument {word!r} is unknown{nearest(word, [n for t in tables for n in t])}")
    chosen = []
    for table in tables:
        found = [word for word in words if word in table]
        if len(found) > 1:
            raise UserError(f"config argument {arg!r} names {' and '.join(found)}; expected one of {', '.join(table)}")
        chosen.append(found[0] if found else next(iter(table), ""))
    return chosen
