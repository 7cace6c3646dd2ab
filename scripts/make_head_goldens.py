"""Makes tests/data/head_goldens: reward models as transformers computes them, and adapters as peft does.

Needs torch, transformers and peft, which vdjax itself does not:

    python -m venv v && v/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    v/bin/python scripts/make_head_goldens.py

FAMILY_score is a sequence-classification directory of one label with `golden.npz`: padded rows of tokens and the
reward of each. FAMILY_peft is a PEFT directory beside a model of tests/data/goldens, with the logits of the two.
"""

import json

import numpy as np
import peft
import torch
import transformers
from make_goldens import GOLDENS, case, make_config, randomise

HEAD_GOLDENS = GOLDENS.parent / "head_goldens"
PAD = 7  # occurs within rows too: only the last token that is another counts
SCORES = {
    "llama": case("llama", 4, 2, 32, dtype="float32"),
    "qwen3": case("qwen3", 4, 2, 16, tied=True, theta=1000000.0),
}
ADAPTERS = {
    "llama": ("llama_mha", dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])),
    "qwen3": (
        "qwen3_gqa2",
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    ),
}


def make_score(family: str, seed: int) -> None:
    torch.manual_seed(seed)
    out = HEAD_GOLDENS / f"{family}_score"
    kind = {"llama": "LlamaForSequenceClassification", "qwen3": "Qwen3ForSequenceClassification"}[family]
    config = make_config(SCORES[family])
    config.num_labels, config.pad_token_id = 1, PAD
    model = getattr(transformers, kind)(config)
    randomise(model)
    model.to(getattr(torch, SCORES[family]["dtype"])).save_pretrained(out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    lengths = (20, 13, 1, 7)
    tokens = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(0, 53, (length,))
        tokens[row, length - 1] = 11
    with torch.no_grad():
        rewards = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, 0]
    np.savez_compressed(
        out / "golden.npz", tokens=tokens.numpy().astype(np.int32), lengths=lengths, rewards=rewards.numpy()
    )
    print(f"{out.name}: rewards {rewards.numpy().round(2)}")


def make_peft(family: str, seed: int) -> None:
    torch.manual_seed(seed)
    out, (base, options) = HEAD_GOLDENS / f"{family}_peft", ADAPTERS[family]
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / base, dtype=torch.float32).eval()
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.7 * value.shape[1] ** -0.5)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokens = torch.randint(0, 53, (2, 24))
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
        plain = model.get_base_model()
        with model.disable_adapter():
            change = (plain(input_ids=tokens).logits - logits).abs().max()
    np.savez_compressed(out / "golden.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    print(f"{out.name}: the adapters change logits by up to {change:.2f}")


def main() -> None:
    for seed, family in enumerate(SCORES):
        make_score(family, seed)
        make_peft(family, seed)


if __name__ == "__main__":
    main()
