"""Learning from sampled responses: problems with known answers, the first step, interruption, the loss's gradient."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import experiments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax import runs, snapshots
from vdjax.data import packing
from vdjax.errors import UserError
from vdjax.models import transformer
from vdjax.models.functional import Model
from vdjax.models.hf import _leaves
from vdjax.objectives import OBJECTIVES
from vdjax.train import rewards
from vdjax.train.losses import LossSpec, counts_of, loss_and_metrics

SPEEDS = ("tokens_per_s", "examples_per_s", "mfu", "seconds", "sample_seconds", "new_tokens_per_s")


def config_of(folder: Path, name: str, *overrides: str) -> ConfigDict:
    return configs.load(f"{tiny.HERE / 'tiny_rl_config.py'}:{folder},{name}", overrides)


def run(config: ConfigDict, workdir: Path) -> Path:
    experiments.run(config, workdir)
    return workdir


def metrics(workdir: Path, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in rows]


@tiny.SLOW
@pytest.mark.parametrize(
    ("name", "problem", "tokens"), [("rloo", "arm", 1), ("ppo", "says_a", 8), ("grpo", "says_a", 8)]
)
def test_a_bandit_and_a_say_this_token_task_are_solved(
    name: str, problem: str, tokens: int, tiny_data: Path, tmp_path: Path
) -> None:
    """From 3% (a bandit of 260 arms) and less than 1% (eight times "a") to the best there is, which pays 1."""
    config = config_of(
        tiny_data,
        "grpo",
        "--config.rl.batch_size=8",
        "--config.rl.epochs=100",
        "--config.rl.max_steps=110",
        "--config.rl.rollout.samples=8",
        f"--config.rl.rollout.max_new_tokens={tokens}",
        f"--config.rl.reward.function={tiny.HERE / 'tiny_rewards.py'}:{problem}",
        "--config.rl.optimizer.learning_rate=0.01",
        "--config.resume_every=100",
    )
    config.rl.objective = name
    config.rl.hyper = ConfigDict(dict(OBJECTIVES[name].hyper) | {"beta": 0.0, "kl_coef": 0.0})
    rows = metrics(run(config, tmp_path / "run"), "rl")
    assert rows[0]["eval_reward"] < 0.1
    assert rows[-1]["eval_reward"] >= 0.95
    assert np.mean([row["reward"] for row in rows[-11:-1]]) >= 0.95


@pytest.mark.parametrize("name", ["rloo", "dapo"])
def test_on_the_first_update_ratios_are_1_and_the_kl_is_0(name: str, tiny_data: Path, tmp_path: Path) -> None:
    rows = metrics(run(config_of(tiny_data, name, "--config.rl.max_steps=2"), tmp_path / "run"), "rl")
    first, second = (row for row in rows if "loss" in row)
    assert first["ratio"] == 1 and first["clip_fraction"] == 0 and first["kl_to_old"] == 0
    assert first["kl"] == 0 and first["kl_to_reference"] == 0
    assert second["kl"] != 0 and second["ratio"] == 1
    assert 0 < first["sampler_gap"] < 1e-4
    # With ratios of 1 the loss is the mean of the responses' advantages, which in each group sum to 0.
    if name == "rloo":
        assert abs(first["policy_loss"]) < 1e-5


def test_online_preferences_move_the_reward(tiny_data: Path, tmp_path: Path) -> None:
    config = config_of(
        tiny_data, "online_dpo", "--config.rl.batch_size=8", "--config.rl.epochs=40", "--config.rl.max_steps=25",
        "--config.rl.rollout.samples=8", "--config.rl.hyper.loss=ipo", "--config.rl.optimizer.learning_rate=0.01",
    )  # fmt: skip
    rows = metrics(run(config, tmp_path / "run"), "rl")
    first = next(row for row in rows if "loss" in row)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-4) and first["loss"] == pytest.approx(25, abs=1e-2)
    assert 0 < first["pairs"] <= 8
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.3


def test_equal_rewards_teach_nothing_and_stop_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """No pair, or no advantage, in minibatches of which one has no prompt."""
    overrides = ["--config.rl.max_steps=3", "--config.rl.rollout.minibatches=2", "--config.rl.batch_size=2"]
    overrides.append(f"--config.rl.reward.function={tiny.HERE / 'tiny_rewards.py'}:nothing")
    for name in ("online_dpo", "grpo"):
        workdir = run(config_of(tiny_data, name, *overrides), tmp_path / name)
        rows = [row for row in metrics(workdir, "rl") if "loss" in row]
        assert [row["grad_norm"] for row in rows] == [0] * 3 and len({row["kl"] for row in rows}) == 1


# A whole experiment: reward model and PPO


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_of(tiny_data, "ppo"), tmp_path_factory.mktemp("ppo") / "run")


def params_of(snapshot: Path, head: str) -> dict[str, np.ndarray]:
    from vdjax.models.config import from_hf

    _, shapes = transformer.abstract(from_hf(tiny.SHAPES["qwen"], where="qwen"), head=head)
    read = snapshots.open_reader(snapshot)
    return {".".join(path): read(path, tuple(slice(0, n) for n in leaf.shape)) for path, leaf in _leaves(shapes)}


@tiny.SLOW
def test_interrupted_in_the_middle_of_ppo_equals_uninterrupted(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    spec = f"{tiny.HERE / 'tiny_rl_config.py'}:{tiny_data},ppo"
    for how, stage, step, status in (("KILL", "reward", 3, -signal.SIGKILL), ("KILL", "ppo", 4, -signal.SIGKILL)):
        command = [sys.executable, str(tiny.HERE / "stop_at.py"), how, stage, str(step)]
        command += ["--config", spec, "--workdir", str(workdir)]
        out = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300)
        assert out.returncode == status, out.stderr
    assert [p.name for p in sorted((workdir / "ppo" / "resume").iterdir())][-1] == "2"  # killed at step 4
    run(config_of(tiny_data, "ppo"), workdir)
    for stage, head in (("reward", "score"), ("ppo", "vocab")):
        assert metrics(finished, stage) == metrics(workdir, stage)
        steps = snapshots.kept(finished / stage / "snapshots")
        assert steps == snapshots.kept(workdir / stage / "snapshots") and len(steps) > 2
        for step in steps:
            one, other = (params_of(w / stage / "snapshots" / str(step), head) for w in (finished, workdir))
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], err_msg=f"{stage} {step} {name}")


def test_the_reward_model_learns_and_ppo_uses_it(finished: Path) -> None:
    reward, ppo = metrics(finished, "reward"), metrics(finished, "ppo")
    trained = [row for row in reward if "loss" in row]
    assert trained[-1]["loss"] < 0.9 * trained[0]["loss"]
    coefs = [row["kl_coef"] for row in ppo if "kl_coef" in row]
    assert len(set(coefs)) == len(coefs) > 3  # the coefficient adapts at every step
    assert all(row["value_loss"] > 0 for row in ppo if "loss" in row)
    assert ppo[0]["eval_reward"] != 0 and ppo[0]["eval_kl"] == 0


@tiny.SLOW
@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.rank=2",),
        ("lora.rank=2", "hyper.value_model=shared", "rollout.minibatches=3"),
        ("hyper.value_model=shared", "rollout.temperature=0.7", "rollout.top_p=0.9"),
    ],
    ids=["adapters", "adapters-shared", "shared-temperature"],
)
def test_other_ways_of_ppo(overrides: tuple[str, ...], finished: Path, tiny_data: Path, tmp_path: Path) -> None:
    """From the same reward model; the last batch of an epoch has fewer prompts than minibatches."""
    workdir = tmp_path / "run"
    flags = [f"--config.ppo.{override}" for override in (*overrides, "batch_size=4")]
    config = config_of(tiny_data, "ppo", *flags)
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("ppo", "tb"))
    was = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(was | {"config": json.loads(configs.to_json(config))}))
    run(config, workdir)
    rows = [row for row in metrics(workdir, "ppo") if "loss" in row]
    assert rows[0]["kl"] == 0 and rows[0]["value_loss"] > 0 and all(0.5 < row["ratio"] < 2 for row in rows)
    assert rows[-1]["kl"] != 0
    assert ("sampler_gap" in rows[0]) == ("rollout.temperature=0.7" not in overrides)
    steps = snapshots.kept(workdir / "ppo" / "snapshots")
    before, after = (runs.open_snapshot(workdir / "ppo" / "snapshots" / str(step)) for step in (0, steps[-1]))
    assert (before.params["layers"]["q_proj"] != after.params["layers"]["q_proj"]).any()
    assert ((before.params["embed"] == after.params["embed"]).all()) == ("lora.rank=2" in overrides)


def test_rewards_are_the_reward_models_own(finished: Path, tiny_data: Path) -> None:
    """Reading the policy's tokens, reading the text anew, and the model itself on one response at a time."""
    opened = runs.open_snapshot(finished / "reward" / "snapshots" / "6")
    made, tok = opened.made, opened.made.tokenizer
    prompts = [({"role": "user", "content": f"And {thing}?"},) for thing in ("tea", "a much longer question")]
    texts = ["Yes.", "No, no, no.", "a", "It depends on it"]
    from vdjax.data import chat, pipeline
    from vdjax.data.examples import Counts

    rendered = [
        chat.render_responses(
            prompt, texts[2 * i : 2 * i + 2], tok, made.template, max_length=90, counts=Counts(), where=""
        )
        for i, prompt in enumerate(prompts)
    ]
    data = pipeline.of_rendered(rendered)
    model = nnx.merge(opened.model.graphdef, opened.params)
    with jax.set_mesh(made.mesh):
        one_by_one, ends = [], []
        for i, example in enumerate(rendered):
            for branch in (1, 2):
                ids = example.tokens[(example.branches == 0) | (example.branches == branch)][None]
                hidden = model(ids, np.arange(ids.shape[1])[None], np.ones_like(ids))
                one_by_one.append(float(model.scores(hidden)[0, -1]))
                ends.append(data.offsets[i] + np.flatnonzero(example.branches == branch)[-1])
        batches = pipeline.batches(data, pipeline.in_order(2, 2), packing.Shape(2, 128, 4), 1)
        responses = rewards.Responses(prompts, texts, data, np.array(ends), batches)
        on_tokens = rewards.from_model(opened.model, opened.params, made.mesh)(responses)
        on_text = rewards.from_text(opened.model, opened.params, made.mesh, tok, made.template, 96)(responses)
        unreadable = rewards.from_text(opened.model, opened.params, made.mesh, tok, made.template, 96)
        odd = unreadable(responses._replace(texts=["", "\n", "<|im_end|>", "..."]))
    assert odd[0] == pytest.approx(odd[1], abs=1e-5) and odd[2] == pytest.approx(odd[3], abs=1e-5)
    assert abs(odd[0] - odd[2]) > 1e-3  # another prompt
    assert np.ptp(one_by_one) > 1e-3
    np.testing.assert_allclose(on_tokens, one_by_one, atol=1e-5)
    np.testing.assert_allclose(on_text, one_by_one, atol=1e-5)


# The loss


def rollout_batch(seed: int) -> tuple[dict[str, np.ndarray], int]:
    """Two prompts with two responses each, and random measurements."""
    examples = [e for e in tiny.preference_examples(seed, 2, 6)]
    batch = tiny.pack(examples, 40)
    batch.pop("source")
    rng, mask = np.random.default_rng(seed), batch["loss_mask"]
    for name, value in (
        ("old_log_probs", -5 + 0.3 * rng.normal(size=mask.shape)),
        ("reference_log_probs", -5 + 0.3 * rng.normal(size=mask.shape)),
        ("advantages", rng.normal(size=mask.shape)),
        ("returns", rng.normal(size=mask.shape)),
        ("old_values", rng.normal(size=mask.shape)),
    ):
        batch[name] = np.where(mask, value, 0).astype(np.float32)
    batch["weights"] = np.where(mask, 1 / mask.sum(), 0).astype(np.float32)
    batch["on_policy"] = np.zeros((len(mask), 1), np.float32)
    return batch, 4


@pytest.mark.parametrize("hyper", [{"ratio": "token"}, {"ratio": "sequence"}, {"beta": 0.3}, {"values": True}])
def test_gradients_agree_with_finite_differences(qwen: tuple[Model, Any], hyper: dict[str, Any]) -> None:
    """Along a random direction, in float64."""
    made, start = qwen
    batch, sequences = rollout_batch(5)
    values = hyper.pop("values", False)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), start)
        if values:
            params["value"] = {"score": jnp.linspace(-1, 1, 32, dtype=jnp.float64)}
        settings = dict(OBJECTIVES["ppo"].hyper) | {"clip_low": 0.9, "clip_high": 50.0, "value_clip": 0.0} | hyper
        spec = LossSpec(made.graphdef, "ppo", settings, sequences, 16)
        counts = counts_of(spec, {name: x[None] for name, x in batch.items()})

        @jax.jit
        def loss(params: Any) -> jax.Array:
            return loss_and_metrics(spec, params, batch, counts)[0]

        gradient = jax.jit(jax.grad(loss))(params)
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        step = 2e-4
        ahead = jax.tree.map(lambda p, d: p + step * d, params, direction)
        behind = jax.tree.map(lambda p, d: p - step * d, params, direction)
        measured = (loss(ahead) - loss(behind)) / (2 * step)
    assert abs(float(slope)) > 1e-3
    assert float(measured) == pytest.approx(float(slope), rel=2e-3)


def test_reward_functions_are_checked(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def shout(prompts, responses):\n    return [float('nan')] * len(responses)\n")
    with pytest.raises(UserError, match="has no function shot.*did you mean 'shout'"):
        rewards.from_function(f"{tmp_path / 'mine.py'}:shot")
    with pytest.raises(UserError, match="cannot be imported"):
        rewards.from_function("no.such.module:f")
    reward = rewards.from_function(f"{tmp_path / 'mine.py'}:shout")
    nothing: Any = None  # a function reads the texts alone
    with pytest.raises(UserError, match="gave nan for 'x'; expected a finite number"):
        reward(rewards.Responses(["p"], ["x"], nothing, nothing, nothing))


def test_configs_of_sampled_stages_are_checked(tiny_data: Path) -> None:
    for override, message in (
        ("--config.rl.reward.function=", "give either model"),
        ("--config.rl.reward.model=x", "give either model"),
        ("--config.rl.rollout.samples=1", "compares 2 to 127 responses"),
        ("--config.rl.rollout.temperature=0", "nothing can be learned"),
        ("--config.rl.rollout.top_p=0.0", "top_p is 0.0"),
        ("--config.rl.hyper.advantage=gae", "needs a value model"),
        ("--config.rl.rollout.max_new_tokens=96", "leaves no room for a prompt"),
        ("--config.rl.hyper.kl_estimator=k4", "kl_estimator='k4'"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(tiny_data, "grpo", override)
    with pytest.raises(UserError, match="is a reward model, which has no words"):
        config_of(tiny_data, "ppo", "--config.ppo.init_from=reward")
    with pytest.raises(UserError, match="is no earlier reward_model stage"):
        config_of(tiny_data, "ppo", "--config.ppo.reward.model=sft")
