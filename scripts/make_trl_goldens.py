"""Writes tests/data/goldens/trl_losses.json: TRL's preference losses and gradients on random log-probs, in float64.

Needs torch and trl (tried with 2.13 and 1.16), in an environment of its own: python scripts/make_trl_goldens.py
The losses come from TRL's own trainers, called with a stand-in for `self` that holds only what they read there. Where a
loss is one of single pairs it is called pair by pair, so that TRL's means over a batch's tokens are means over a
response's.
"""

import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

OUT = Path(__file__).parent.parent / "tests" / "data" / "goldens" / "trl_losses.json"
SCALES = (1e-3, 1.0, 4.0, 30.0)  # of the log-ratios, in nats: four pairs of each
LENGTH = 9
SMOOTHING = "label_smoothing"


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Objective (our name) and hyper-parameters that differ from our defaults or are tested at them."""
    out: list[tuple[str, dict[str, Any]]] = []
    for beta in (0.05, 0.1, 0.5):
        plain = ("dpo", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "orpo")
        out += [(name, {"beta": beta}) for name in plain]
        out += [(name, {"beta": beta, SMOOTHING: e}) for name in ("aot", "aot_unpaired") for e in (0.0, 0.2)]
        out += [("robust", {"beta": beta, SMOOTHING: e}) for e in (0.0, 0.1, 0.3)]
        out += [("exo_pair", {"beta": beta, SMOOTHING: e}) for e in (1e-3, 0.1)]
        out += [("discopop", {"beta": beta, "tau": tau}) for tau in (0.05, 0.5)]
        out += [("ld_dpo", {"beta": beta, "ld_alpha": alpha}) for alpha in (0.0, 0.3, 1.0)]
        out += [("bco_pair", {"beta": beta, "reward_shift": "none"})]
        out += [("cpo", {"beta": beta, "cpo_alpha": alpha, SMOOTHING: e}) for alpha, e in ((1.0, 0.0), (0.3, 0.1))]
        for desirable, undesirable in ((1.0, 1.0), (1.3, 0.6)):
            hyper = {"beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable}
            out += [("kto", hyper), ("apo_zero_unpaired", hyper)]
    out += [("sigmoid_norm", {"beta": beta}) for beta in (0.1, 5.0, 10.0)]
    for beta, gamma in ((2.0, 0.5), (2.5, 1.4), (10.0, 3.0)):
        out += [("simpo", {"beta": beta, "gamma": gamma, SMOOTHING: e}) for e in (0.0, 0.1)]
        out += [("alphapo", {"beta": beta, "gamma": gamma, "alpha": alpha}) for alpha in (0.0, 0.25, -0.1)]
    for name in ("dpo", "hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "discopop"):
        out += [(name, {"beta": 0.3, "f_divergence_type": kind}) for kind in ("forward_kl", "js_divergence")]
        out += [(name, {"beta": 0.3, "rpo_alpha": 0.7})]
    return out + [(name, {"beta": 0.3, "rpo_alpha": 0.7}) for name in ("nca_pair", "apo_zero", "ld_dpo")]


DEFAULTS = {  # ours, where a case leaves them out
    "robust": {SMOOTHING: 0.1}, "exo_pair": {SMOOTHING: 1e-3}, "ld_dpo": {"ld_alpha": 0.5}, "discopop": {"tau": 0.05},
}  # fmt: skip
SAME = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(log_probs)  # for metrics only
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def dpo(
    name: str, hyper: dict[str, Any], policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The mean loss of `DPOTrainer._compute_loss` for models with these token log-probs, chosen rows first."""
    sft = hyper.get("rpo_alpha")
    kinds = [{"dpo": "sigmoid", "ld_dpo": "sigmoid"}.get(name, name)] + ["sft"] * (sft is not None)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False, _modules={}),
        ref_model=lambda **_: outputs(reference), accelerator=SAME, precompute_ref_logps=False,
        args=SimpleNamespace(discopop_tau=hyper.get("tau"), gradient_checkpointing_kwargs=None), aux_loss_enabled=False,
        ld_alpha=hyper.get("ld_alpha"), f_divergence_type=hyper.get("f_divergence_type", "reverse_kl"),
        loss_types=kinds, loss_weights=[1.0, sft], beta=hyper["beta"], label_smoothing=hyper.get(SMOOTHING, 0.0),
        use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer.loss_weights = trainer.loss_weights[: len(kinds)]
    ids = torch.zeros(len(mask), LENGTH + 1, dtype=torch.long)
    prompt = torch.zeros(len(mask), 1, dtype=mask.dtype)
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": torch.cat([prompt, mask], dim=1)}
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs(policy), inputs, False)


def reference_free(name: str, hyper: dict[str, Any], policy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss of one pair by `get_batch_loss_metrics` of CPOTrainer or ORPOTrainer, after a prompt of one token."""
    # With two tokens, of which 0 is always the next one, log-softmax gives back the log-prob and its own gradient.
    logits = torch.stack([policy, torch.log(-torch.expm1(policy))], dim=-1)
    logits = torch.cat([logits, torch.zeros(2, 1, 2)], dim=1)
    trainer = SimpleNamespace(
        loss_type="simpo" if name in ("simpo", "alphapo") else "sigmoid", simpo_gamma=hyper.get("gamma"),
        beta=hyper["beta"], alpha=hyper.get("alpha", 0.0), label_smoothing=hyper.get(SMOOTHING, 0.0),
        cpo_alpha=hyper.get("cpo_alpha", 0.0), accelerator=SAME, is_encoder_decoder=False, pad_token_id=0,
        padding_value=0, aux_loss_enabled=False,
    )  # fmt: skip
    kind = ORPOTrainer if name == "orpo" else CPOTrainer
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, method):
            setattr(trainer, method, partial(getattr(kind, method), trainer))
    trainer.concatenated_inputs, trainer.get_batch_logps = kind.concatenated_inputs, kind.get_batch_logps
    present = torch.cat([torch.ones(2, 1, dtype=mask.dtype), mask], dim=1)
    labels = torch.where(present == 1, 0, -100)
    labels[:, 0] = -100
    batch = {}
    for row, side in enumerate(("chosen", "rejected")):
        batch |= {f"{side}_input_ids": torch.zeros(1, LENGTH + 1, dtype=torch.long),
                  f"{side}_attention_mask": present[row : row + 1], f"{side}_labels": labels[row : row + 1]}
    # ORPO casts to float32, which would be all that one could compare.
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return kind.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def kto(
    name: str, hyper: dict[str, Any], policy: torch.Tensor, reference: torch.Tensor, mismatched: torch.Tensor,
    mask: torch.Tensor, label: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The mean loss of `KTOTrainer._compute_loss`. `mismatched`: token log-probs of policy and reference, stacked."""
    rows = torch.arange(len(mask))[:, None].expand(-1, LENGTH + 1)

    def model(own: torch.Tensor, other: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        return outputs(torch.cat([own, other])[kwargs["input_ids"][:, 0]])

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False, _modules={}), accelerator=SAME,
        aux_loss_enabled=False,
        ref_model=partial(model, reference, mismatched[1]), precompute_ref_logps=False, calculate_KL=name == "kto",
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), loss_type=name, **hyper,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    full = torch.cat([torch.zeros(len(mask), 1, dtype=mask.dtype), mask], dim=1)
    ones = torch.ones_like(full)
    inputs = {"input_ids": rows, "attention_mask": ones, "completion_mask": full, "KL_input_ids": rows + len(mask),
              "KL_attention_mask": ones, "KL_completion_mask": full, "label": label}  # fmt: skip
    return KTOTrainer._compute_loss(trainer, partial(model, policy, mismatched[0]), inputs, False)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    scales = np.repeat(SCALES, 4)
    pairs = len(scales)
    rows = 2 * pairs  # chosen, then rejected
    scale = torch.tensor(np.concatenate([scales, scales]))
    lengths = torch.tensor(rng.integers(1, LENGTH + 1, rows))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()

    def tokens(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x) * mask

    # The reference's tokens are probable and improbable; the policy's differ by `scale` nats a response, but stay < 0.
    reference = tokens(-rng.gamma(1.0, 2.0, (rows, LENGTH)) - 0.01)
    shift = (torch.tensor(rng.normal(size=(rows, 1))) * (scale / lengths)[:, None]) * mask
    policy = reference + shift
    lift = torch.clamp(policy + 1e-3, min=0) * mask  # where it would be above 0, both are lowered
    policy, reference = policy - lift, reference - lift
    other = tokens(-rng.gamma(1.0, 2.0, (rows, LENGTH)))
    mismatched = torch.stack([other, other - 0.05 * mask])
    label = torch.tensor(rng.random(rows) < 0.6)
    policy = torch.where(mask == 1, policy, -1e-3)  # unscored, but log(1 - p) must exist

    def run(name: str, hyper: dict[str, Any]) -> dict[str, Any]:
        scored = policy.clone().requires_grad_()
        masked = scored * mask
        given = DEFAULTS.get(name, {}) | hyper
        if name in ("kto", "apo_zero_unpaired"):
            losses = [kto(name, given, masked, reference, mismatched, mask, label)]
        elif name in ("aot", "aot_unpaired"):
            losses = [dpo(name, given, masked, reference, mask)]
        else:
            both = [[i, i + pairs] for i in range(pairs)]
            if name in ("simpo", "alphapo", "cpo", "orpo"):
                losses = [reference_free(name, given, scored[i], mask[i]) for i in both]
            else:
                losses = [dpo(name, given, masked[i], reference[i], mask[i]) for i in both]
        sum(losses).backward()
        gradient = scored.grad
        first, last = gradient[:, 0], gradient[torch.arange(rows), lengths - 1]
        columns = {"losses": torch.stack(losses).tolist(), "first": first.tolist(), "last": last.tolist()}
        columns = {k: [x if math.isfinite(x) else None for x in column] for k, column in columns.items()}
        return {"objective": name, "hyper": hyper} | columns

    common = torch.minimum(lengths[:pairs], lengths[pairs:]).repeat(2)
    shared = mask * (torch.arange(LENGTH) < common[:, None])
    data = {
        "lengths": lengths, "policy": (policy * mask).sum(1), "reference": reference.sum(1),
        "policy_common": (policy * shared).sum(1), "reference_common": (reference * shared).sum(1),
        "mismatched": mismatched[0].sum(1), "reference_mismatched": mismatched[1].sum(1), "desirable": label,
    }  # fmt: skip
    head = {
        "made_by": f"scripts/make_trl_goldens.py, trl {trl.__version__}, torch {torch.__version__}",
        "about": "Rows are chosen responses, then rejected ones; unpaired losses take all rows. `losses`: of pairs, "
        "or one mean of the batch; `first` and `last`: the gradient of their sum by a row's first and last token. "
        "null where TRL overflows.",
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines += [f"{json.dumps(key)}: {json.dumps(value.tolist())}" for key, value in data.items()]
    lines += ['"cases": [\n' + ",\n".join(json.dumps(run(*case)) for case in cases()) + "\n]"]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
