"""Writes tests/data/goldens/trl_losses.json: TRL's preference losses and their gradients on random log-probs.

Needs torch and trl (tried with 2.13 and 1.16), in an environment of its own: python scripts/make_trl_goldens.py
The losses come from TRL's own code, called with a stand-in for the trainer that holds only what it reads there.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

OUT = Path(__file__).parent.parent / "tests" / "data" / "goldens" / "trl_losses.json"
PAIRS, LENGTH, VOCAB = 6, 9, 11
BETAS = (0.05, 0.1, 0.5)
SIMPO = ((2.0, 0.5), (2.5, 1.4), (10.0, 3.0))  # beta, gamma


def dpo(token_log_probs: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """The mean loss of `DPOTrainer._compute_loss` (loss_type "sigmoid") for a model with these token log-probs."""

    def model(**_: Any) -> SimpleNamespace:
        # The others are for metrics only.
        zeros = torch.zeros_like(token_log_probs)
        return SimpleNamespace(log_probs=token_log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, precompute_ref_logps=True, aux_loss_enabled=False,
        ld_alpha=None, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        beta=beta, use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    prompt = torch.zeros(2 * PAIRS, 1, dtype=mask.dtype)
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, LENGTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, LENGTH + 1, dtype=torch.long),
        "completion_mask": torch.cat([prompt, mask], dim=1),
        "ref_chosen_logps": reference[:PAIRS],
        "ref_rejected_logps": reference[PAIRS:],
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """Losses of `CPOTrainer.cpo_loss` (loss_type "simpo") for average log-probs."""
    trainer = SimpleNamespace(
        loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=0.0, alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def main() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2 * PAIRS, LENGTH + 1, VOCAB)
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH + 1))
    lengths = torch.tensor(np.random.default_rng(0).integers(1, LENGTH + 1, 2 * PAIRS))
    labels[:, 0] = -100
    labels[torch.arange(LENGTH + 1) > lengths[:, None]] = -100
    mask = (labels[:, 1:] != -100).long()
    sums = CPOTrainer.get_batch_logps(logits, labels)
    averages = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    reference = sums + 4 * torch.randn(2 * PAIRS)
    cases = []
    for beta in BETAS:
        # Spread evenly over the tokens: only their sum matters, and each one's gradient is that of the sum.
        tokens = (mask * (sums / lengths)[:, None]).requires_grad_()
        loss = dpo(tokens, mask, reference, beta)
        loss.backward()
        gradient = tokens.grad[:, 0].tolist()
        cases.append({"objective": "dpo", "hyper": {"beta": beta}, "loss": loss.item(), "gradient": gradient})
    for beta, gamma in SIMPO:
        average = averages.clone().requires_grad_()
        loss = simpo(average[:PAIRS], average[PAIRS:], beta, gamma).mean()
        loss.backward()
        gradient = (average.grad / lengths).tolist()  # by the sum, of which the average is 1 / length
        cases.append(
            {"objective": "simpo", "hyper": {"beta": beta, "gamma": gamma}, "loss": loss.item(), "gradient": gradient}
        )
    golden = {
        "made_by": f"scripts/make_trl_goldens.py, trl {trl.__version__}, torch {torch.__version__}",
        "log_probs": sums.tolist(),  # chosen, then rejected
        "lengths": lengths.tolist(),
        "reference": reference.tolist(),
        "cases": cases,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
