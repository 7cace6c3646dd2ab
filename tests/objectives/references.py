"""Independent references of every objective's losses and gradients, in float64, and the errors against them.

Two references: TRL's own trainers (values in tests/data/goldens/trl_losses.json, which scripts/make_trl_goldens.py
writes) and each paper's formula in numpy, differentiated by a complex step: d f/dx = Im f(x + ih)/h, exact to rounding.
`python scripts/objective_errors.py` prints the table of docs/objectives.md.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdjax.objectives import OBJECTIVES, Pairs, Unpaired

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "goldens" / "trl_losses.json").read_text())
DATA = {k: np.array(GOLDEN[k]) for k in GOLDEN if k not in ("made_by", "about", "cases")}
N = len(DATA["lengths"]) // 2
STEP = 1e-30
SHORT = ("w", "l", "nw", "nl", "rw", "rl", "kw", "kl", "rkw", "rkl")  # names of the fields of Pairs in formulas


def log_sigmoid(x: Any) -> Any:
    return np.where(np.real(x) > 0, -np.log1p(np.exp(-x)), x - np.log1p(np.exp(x)))


def sigmoid(x: Any) -> Any:
    return np.exp(log_sigmoid(x))


def positive(x: Any) -> Any:
    return np.where(np.real(x) > 0, x, 0)


def ascending(x: Any) -> Any:
    return x[np.argsort(np.real(x))]


def score(u: Any, kind: str, alpha: float) -> Any:
    """f'(u) for log u."""
    return {
        "reverse_kl": lambda: u,
        "forward_kl": lambda: 1 - 1 / np.exp(u),
        "js_divergence": lambda: np.log(2) + log_sigmoid(u),
        "alpha_divergence": lambda: u if alpha == 1 else (np.exp(u) ** (alpha - 1) - 1) / (alpha - 1),
    }[kind]()


# Formulas of a loss from p: policy log-probs w and l, log-ratios cw and cl (through f' where one is chosen), lengths nw
# and nl, ... and the hyper-parameters. They are written as in the papers, not as the code has them.


def discopop(p: Any, beta: float, tau: float) -> Any:
    rho = beta * (p.cw - p.cl)
    mix = sigmoid(rho / tau)
    return (1 - mix) * -log_sigmoid(rho) + mix * np.exp(-rho)


def exo_pair(p: Any, beta: float, label_smoothing: float) -> Any:
    q = sigmoid(beta * (p.cw - p.cl)), sigmoid(-beta * (p.cw - p.cl))
    log_q = log_sigmoid(beta * (p.cw - p.cl)), log_sigmoid(-beta * (p.cw - p.cl))
    return q[0] * (log_q[0] - np.log(1 - label_smoothing)) + q[1] * (log_q[1] - np.log(label_smoothing))


def ld_dpo(p: Any, beta: float, ld_alpha: float) -> Any:
    def short(total: Any, common: Any) -> Any:
        return common + ld_alpha * (total - common)

    chosen = beta * (short(p.w, p.kw) - short(p.rw, p.rkw))
    return -log_sigmoid(chosen - beta * (short(p.l, p.kl) - short(p.rl, p.rkl)))


def simpo(p: Any, beta: float, gamma: Any, gamma_beta_ratio: Any, label_smoothing: float) -> Any:
    ratio = 0.5 if gamma_beta_ratio is None else gamma_beta_ratio
    margin = beta / p.nw * p.w - beta / p.nl * p.l - (beta * ratio if gamma is None else gamma)
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def alphapo(p: Any, beta: float, gamma: Any, gamma_beta_ratio: Any, alpha: float) -> Any:
    ratio = 0.5 if gamma_beta_ratio is None else gamma_beta_ratio
    rewards = [beta * (1 - np.exp(m) ** -alpha) / alpha if alpha else beta * m for m in (p.w / p.nw, p.l / p.nl)]
    return -log_sigmoid(rewards[0] - rewards[1] - (beta * ratio if gamma is None else gamma))


def cpo(p: Any, beta: float, label_smoothing: float, cpo_alpha: float) -> Any:
    margin = beta * p.w - beta * p.l
    preference = -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)
    return preference - cpo_alpha * p.w / p.nw


def orpo(p: Any, beta: float) -> Any:
    odds = [np.exp(m) / -np.expm1(m) for m in (p.w / p.nw, p.l / p.nl)]
    return -p.w / p.nw - beta * log_sigmoid(np.log(odds[0] / odds[1]))


def aot(p: Any, beta: float, label_smoothing: float) -> Any:
    u = beta * (ascending(p.w - p.l) - ascending(p.rw - p.rl))
    return (-(1 - label_smoothing) * log_sigmoid(u) - label_smoothing * log_sigmoid(-u))[np.argsort(np.argsort(np.real(p.w - p.l)))]  # fmt: skip # noqa: E501


def aot_unpaired(p: Any, beta: float, label_smoothing: float) -> Any:
    u = beta * (ascending(p.cw) - ascending(p.cl))
    return (-(1 - label_smoothing) * log_sigmoid(u) - label_smoothing * log_sigmoid(-u))[np.argsort(np.argsort(np.real(p.cw)))]  # fmt: skip # noqa: E501


def bco_pair(p: Any, beta: float, reward_shift: str) -> Any:
    new = beta * np.real(np.concatenate([p.cw, p.cl]))
    delta = (p.carry["mean"] * p.carry["count"] + new.sum()) / (p.carry["count"] + len(new))
    delta = delta if reward_shift == "running" else 0
    return -log_sigmoid(beta * p.cw - delta) - log_sigmoid(-(beta * p.cl - delta))


def beta_dpo(p: Any, beta: float, alpha: float, momentum: float, filter_ratio: float, seed: int) -> Any:
    gap = np.real(p.cw - p.cl)
    usual = momentum * p.carry["gap_mean"] + (1 - momentum) * gap.mean()
    kept = p.extra["kept"] == 1
    assert kept.sum() == int((1 - filter_ratio) * len(gap) + 1e-9)
    batch = max(beta * (1 + alpha * (gap[kept].mean() - usual)), 1e-3)
    return np.where(kept, -log_sigmoid(batch * (p.cw - p.cl)), 0) * len(gap) / kept.sum()


def kto(p: Any, beta: float, desirable_weight: float, undesirable_weight: float) -> Any:
    z = max(np.mean(p.m - p.rm), 0)
    good = desirable_weight * (1 - sigmoid(beta * (p.w - p.rw - z)))
    return np.where(p.good, good, undesirable_weight * (1 - sigmoid(beta * (z - (p.w - p.rw)))))


def apo_zero_unpaired(p: Any, beta: float, desirable_weight: float, undesirable_weight: float) -> Any:
    up = sigmoid(beta * (p.w - p.rw))
    return np.where(p.good, desirable_weight * (1 - up), undesirable_weight * up)


def bco(p: Any, beta: float) -> Any:
    reward = beta * (p.w - p.rw)
    count = p.carry["count"]
    delta = (p.carry["mean"] * count + np.real(reward).sum()) / (count + len(reward))
    return np.where(p.good, -log_sigmoid(reward - delta), -log_sigmoid(-(reward - delta)))


def cdpo(p: Any, beta: float, label_smoothing: float) -> Any:
    m = beta * (p.cw - p.cl)
    return -(1 - label_smoothing) * log_sigmoid(m) - label_smoothing * log_sigmoid(-m)


def robust(p: Any, beta: float, label_smoothing: float) -> Any:
    m = beta * (p.cw - p.cl)
    return (-(1 - label_smoothing) * log_sigmoid(m) + label_smoothing * log_sigmoid(-m)) / (1 - 2 * label_smoothing)


FORMULAS = {
    "dpo": cdpo,
    "robust": robust,
    "sigmoid_norm": lambda p, beta: -log_sigmoid(beta * (p.cw / p.nw - p.cl / p.nl)),
    "dpop": lambda p, beta, penalty: -log_sigmoid(beta * (p.cw - p.cl - penalty * positive(p.rw - p.w))),
    "r_dpo": lambda p, beta, alpha: -log_sigmoid(beta * p.cw + alpha * p.nw - (beta * p.cl + alpha * p.nl)),
    "ld_dpo": ld_dpo,
    "hinge": lambda p, beta: positive(1 - beta * (p.cw - p.cl)),
    "ipo": lambda p, beta: (p.cw / p.nw - p.cl / p.nl - 0.5 / beta) ** 2,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "nca_pair": lambda p, beta: -log_sigmoid(beta * p.cw) - (log_sigmoid(-beta * p.cw) + log_sigmoid(-beta * p.cl)) / 2,
    "sppo_hard": lambda p, beta: (p.cw - 0.5 / beta) ** 2 + (p.cl + 0.5 / beta) ** 2,
    "apo_zero": lambda p, beta: 1 - sigmoid(beta * p.cw) + sigmoid(beta * p.cl),
    "apo_down": lambda p, beta: sigmoid(beta * p.cw) + 1 - sigmoid(beta * (p.cw - p.cl)),
    "simpo": simpo, "alphapo": alphapo, "cpo": cpo, "orpo": orpo,
    "aot": aot, "aot_unpaired": aot_unpaired, "bco_pair": bco_pair, "beta_dpo": beta_dpo,
    "kto": kto, "apo_zero_unpaired": apo_zero_unpaired, "bco": bco,
}  # fmt: skip

# Besides those that TRL was run with: objective, hyper-parameters, running values from earlier steps.
MORE: list[tuple[str, dict[str, Any], dict[str, float]]] = [
    *(("dpo", {"beta": 0.3, "label_smoothing": e}, {}) for e in (0.1, 0.4)),
    *(
        (name, {"beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}, {})
        for name in ("dpo", "ipo", "hinge", "robust")
        for alpha in (0.5, 1.0, 1.2)
    ),
    *(("dpop", {"beta": beta, "penalty": penalty}, {}) for beta in (0.05, 0.3) for penalty in (0.0, 5.0, 50.0)),
    *(("r_dpo", {"beta": beta, "alpha": alpha}, {}) for beta in (0.05, 0.5) for alpha in (0.0, 0.01, 0.3)),
    ("simpo", {}, {}),
    *(("simpo", {"beta": 2.5, "gamma_beta_ratio": ratio}, {}) for ratio in (0.0, 0.3)),
    *(("alphapo", {"beta": 2.5, "gamma_beta_ratio": 0.3, "alpha": alpha}, {}) for alpha in (0.25, 1.0)),
    *(("bco_pair", {"beta": beta}, {"mean": m, "count": c}) for beta in (0.1, 0.5) for m, c in ((0, 0), (0.7, 48))),
    *(("bco", {"beta": beta}, {"mean": m, "count": c}) for beta in (0.1, 0.5) for m, c in ((0, 0), (0.7, 48))),
    *(
        ("beta_dpo", {"alpha": alpha, "filter_ratio": ratio}, {"gap_mean": 1.0, "gap_std": 20.0, "step": 3})
        for alpha in (0.0, 0.02, 0.6)
        for ratio in (0.0, 0.2, 0.5)
    ),
    *((name, {"rpo_alpha": 0.7}, {}) for name in ("orpo", "bco_pair", "aot", "beta_dpo", "dpop")),
]
CASES = [(case["objective"], case["hyper"], {}, case) for case in GOLDEN["cases"]] + [(*case, None) for case in MORE]


def inputs(kind: str) -> Pairs | Unpaired:
    """The golden data as numpy arrays: pairs [16] or single responses [32]."""
    d = DATA
    if kind == "unpaired":
        names = ("policy", "lengths", "reference", "desirable", "mismatched", "reference_mismatched")
        return Unpaired(*(d[name] for name in names))
    names = ("policy", "lengths", "reference", "policy_common", "reference_common")
    p, n, r, k, rk = (d[name].reshape(2, N) for name in names)
    return Pairs(p[0], p[1], n[0], n[1], r[0], r[1], k[0], k[1], rk[0], rk[1])


def grad_fields(examples: Any) -> tuple[str, ...]:
    """Inputs that have a gradient."""
    if isinstance(examples, Unpaired):
        return ("response",)
    return "chosen", "rejected", "chosen_common", "rejected_common"


def run(
    name: str, hyper: dict[str, Any], carry: dict[str, float], examples: Any, valid: Any = None, dtype: Any = None
) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Our losses, what else the objective returns, the new carry, and the gradients of the losses' sum by name."""
    objective = OBJECTIVES[name]
    dtype = dtype or jnp.zeros(()).dtype  # float64 within jax.enable_x64()

    def array(x: Any) -> jax.Array:
        return jnp.asarray(x, bool if x.dtype == bool else dtype)

    examples = type(examples)(*map(array, examples))
    valid = jnp.ones(len(examples[0]), bool) if valid is None else jnp.asarray(valid)
    carry = {k: jnp.asarray(carry.get(k, value), dtype) for k, value in objective.carry.items()}
    batch = (valid, carry) if objective.batch_level else ()

    def total(parts: dict[str, Any]) -> tuple[Any, Any]:
        losses, extra, *new = objective.fn(examples._replace(**parts), *batch, **hyper)
        return jnp.where(valid, losses, 0).sum(), (losses, extra, new[0] if new else {})

    parts = {field: getattr(examples, field) for field in grad_fields(examples)}
    gradients, (losses, extra, new) = jax.grad(total, has_aux=True)(parts)
    return losses, extra, new, gradients


def written_out(name: str, hyper: dict[str, Any], carry: dict[str, float], extra: dict[str, Any]) -> tuple[Any, Any]:
    """Losses by the formula, and the gradients of their sum by a complex step."""
    objective = OBJECTIVES[name]
    full = {**objective.hyper, **hyper}
    rpo_alpha = full.pop("rpo_alpha", 0)
    kind, alpha = full.pop("f_divergence_type", "reverse_kl"), full.pop("f_alpha_divergence_coef", 1)
    examples = inputs(objective.kind)

    def losses(x: Any) -> Any:
        both = {"carry": {**objective.carry, **carry}, "extra": extra}
        if isinstance(x, Unpaired):
            w, _, rw, good, m, rm = x
            return FORMULAS[name](SimpleNamespace(w=w, rw=rw, good=good, m=m, rm=rm, **both), **full)
        p = SimpleNamespace(**dict(zip(SHORT, x, strict=True)), **both)
        p.cw, p.cl = score(p.w - p.rw, kind, alpha), score(p.l - p.rl, kind, alpha)
        return FORMULAS[name](p, **full) + rpo_alpha * -p.w / p.nw

    with np.errstate(all="ignore"):
        values, gradients = losses(examples), {}
        finite = np.isfinite(values)
        assert finite.all() or (name == "discopop" and kind == "forward_kl"), "the formula overflows"
        for field in grad_fields(examples):
            steps = 1j * STEP * np.eye(len(values))
            slopes = [losses(examples._replace(**{field: getattr(examples, field) + s})).imag for s in steps]
            gradients[field] = np.where(finite, np.sum(slopes, axis=1, where=finite) / STEP, np.nan)
        return values, gradients


def error(ours: Any, reference: Any) -> float:
    """Largest absolute error, relative where the reference is above 1; None and nan in the reference are left out."""
    reference = np.array(reference, float)
    errors = np.abs(np.asarray(ours) - reference) / np.maximum(1, np.abs(reference))
    assert np.isfinite(np.asarray(ours)).all()
    return float(errors[np.isfinite(reference)].max())


def errors(case: tuple[str, dict[str, Any], dict[str, float], dict[str, Any] | None]) -> dict[str, tuple[float, float]]:
    """Errors of our losses and of our gradients, in float64, by reference."""
    name, hyper, carry, golden = case
    with jax.enable_x64(True):
        losses, extra, _, gradients = jax.tree.map(np.asarray, run(name, hyper, carry, inputs(OBJECTIVES[name].kind)))
    expected, slopes = written_out(name, hyper, carry, extra)
    found = {"formula": (error(losses, expected), max(error(gradients[k], slopes[k]) for k in slopes))}
    if golden is None:
        return found
    if len(golden["losses"]) == 1:  # TRL gives a mean of the batch
        gradients = {k: v / len(losses) for k, v in gradients.items()}
        losses = losses.mean(keepdims=True)
    if OBJECTIVES[name].kind == "unpaired":
        first = last = gradients["response"]
    else:
        total = np.concatenate([gradients["chosen"], gradients["rejected"]])
        common = np.concatenate([gradients["chosen_common"], gradients["rejected_common"]])
        lengths = DATA["lengths"]
        shorter = np.tile(lengths.reshape(2, N).min(0), 2)
        first, last = total + common, total + common * (lengths <= shorter)
    slope_error = max(error(first, golden["first"]), error(last, golden["last"]))
    return found | {"TRL 1.16": (error(losses, golden["losses"]), slope_error)}


def table() -> dict[str, dict[str, tuple[int, float, float]]]:
    """By objective and reference: cases, largest error of the losses, of the gradients."""
    rows: dict[str, dict[str, tuple[int, float, float]]] = {}
    for name in FORMULAS:
        found = [errors(case) for case in CASES if case[0] == name]
        for reference in ("TRL 1.16", "formula"):
            pairs = [x[reference] for x in found if reference in x]
            if pairs:
                rows.setdefault(name, {})[reference] = len(pairs), max(x for x, _ in pairs), max(x for _, x in pairs)
    return rows
