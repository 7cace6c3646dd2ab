"""Exports of stages with adapters and of reward models, from a workdir whose snapshots are random numbers."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax import nnx

from vdjax import cli, export, models, runs, runtime, sharding, snapshots
from vdjax import config as configs
from vdjax.data import tokenizer
from vdjax.errors import UserError
from vdjax.models import config as model_config
from vdjax.models import hf, lora
from vdjax.models.functional import make_model, shardings, trained_part
from vdjax.setup import Setup, setup

TOKENS = jnp.array([[72, 105, 33, 5, 200, 7]])
STAGES = ("first", "sft", "dpo", "again", "reward", "judge")
SAVED: dict[str, Any] = {}  # what each stage's snapshot holds


@pytest.fixture(scope="module")
def made(tiny_data: Path) -> Setup:
    return setup(configs.load(tiny.config_spec(tiny_data)))


@pytest.fixture(scope="module")
def workdir(tiny_data: Path, made: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first (adapters on the seed's model), sft, dpo (adapters on sft), again (adapters on dpo); rewards on sft."""
    config = configs.load(tiny.config_spec(tiny_data))
    adapters = {"rank": 3, "alpha": 6.0, "targets": ("q_proj", "up_proj", "down_proj")}
    data = {"path": f"{tiny_data}/preferences.jsonl"}
    with config.unlocked():
        config.stages = STAGES
        config.dpo.lora.update(adapters)
        config.again = configs.stage("dpo", data=data, lora=adapters, init_from="dpo")
        config.reward = configs.stage("reward_model", data=data, init_from="sft")
        config.judge = configs.stage("reward_model", data=data, lora=adapters, init_from="sft")
        config.first = configs.stage("sft", data=data, lora=adapters)
    folder = tmp_path_factory.mktemp("export") / "run"
    runs.claim(config, folder, "COMMAND")
    runs.write_model_files(made, folder / "model")
    saver = snapshots.saver()
    for seed, name in enumerate(config.stages):
        rng, model = np.random.default_rng(seed), runs.stage_model(config, name, made.model.cfg)
        SAVED[name] = jax.tree.map(
            lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape, scale=0.3), jnp.float32),
            trained_part(model, model.params),
        )
        snapshots.save(saver, folder / name / "snapshots", 6, SAVED[name])
        saver.wait_until_finished()
        (folder / name / "done.json").write_text(json.dumps({"total_steps": 6}))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr(runtime, "start", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.run_cli(export.main)
    return int(stop.value.code or 0)


def adapted_logits(made: Setup, base: Any, adapters: Any) -> Any:
    """Logits with the adapters beside their base."""
    model = make_model(made.model.cfg, tiny.MODEL, lora=lora.Lora(3, 6.0, ("q_proj", "up_proj", "down_proj")))
    return nnx.merge(model.graphdef, lora.join(base, adapters)).logits(TOKENS)


def merged(base: Any, adapters: Any) -> Any:
    return lora.merge(lora.join(base, adapters), lora.Lora(3, 6.0, ("q_proj", "up_proj", "down_proj")))


def snapshot(workdir: Path, name: str) -> Path:
    return workdir / name / "snapshots" / "6"


def test_adapters_are_exported_merged(workdir: Path, made: Setup, tmp_path: Path) -> None:
    """Also those of a stage whose base has merged adapters itself."""
    dpo = merged(SAVED["sft"], SAVED["dpo"])
    for name, base in (("dpo", SAVED["sft"]), ("again", dpo)):
        export.export(snapshot(workdir, name), tmp_path / name)
        found = models.load_pretrained(tmp_path / name).logits(TOKENS)
        want = adapted_logits(made, base, SAVED[name])
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * scale)
        plain = nnx.merge(made.model.graphdef, base).logits(TOKENS)
        assert np.abs(plain - want).max() > 0.1 * scale
        assert {"generation_config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / name).iterdir()}


def test_adapters_alone_lie_beside_what_the_printed_command_exports(
    workdir: Path, made: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, base in (("dpo", SAVED["sft"]), ("again", merged(SAVED["sft"], SAVED["dpo"]))):
        out = tmp_path / name
        assert run(monkeypatch, "--snapshot", str(snapshot(workdir, name)), "--out", str(out), "--adapters") == 0
        printed = capsys.readouterr().out
        command = re.search(r"exported by: python -m vdjax.export (.*)\n", printed)
        assert command, printed
        assert run(monkeypatch, *shlex.split(command[1])) == 0
        config = json.loads((out / "adapter_config.json").read_text())
        where = Path(config["base_model_name_or_path"])
        assert where.is_absolute() and (config["r"], config["lora_alpha"], config["revision"]) == (3, 6, None)
        _, params = models.split(models.load_pretrained(where))
        np.testing.assert_array_equal(params["embed"], base["embed"])
        tensors = safetensors.numpy.load_file(out / "adapter_model.safetensors")
        for i in range(made.model.cfg.num_layers):
            module = f"base_model.model.model.layers.{i}.mlp.up_proj"
            for side, theirs in (("a", "lora_A"), ("b", "lora_B")):
                np.testing.assert_array_equal(
                    tensors[f"{module}.{theirs}.weight"].T, SAVED[name]["layers"][f"up_proj_lora_{side}"][i]
                )
        want = adapted_logits(made, base, SAVED[name])
        found = adapted_logits(made, params, SAVED[name])
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
        names = {p.name for p in out.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
        assert not names & {"config.json", "model.safetensors", "generation_config.json"}
        capsys.readouterr()


def test_adapters_alone_that_have_no_base_to_name_are_refused(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, message in (
        ("sft", "stage sft has no adapters (config.sft.lora.rank is 0)"),
        ("judge", "a reward model's head fits no PEFT directory"),
        ("first", "the base of stage first was made from a seed"),
    ):
        arguments = ["--snapshot", str(snapshot(workdir, name)), "--out", str(tmp_path / name), "--adapters"]
        assert run(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert run(monkeypatch, *arguments, "--dtype", "bfloat16") == 2
    assert "--dtype: adapters are written in float32" in capsys.readouterr().err


def test_the_base_is_the_pretrained_model_where_a_stage_starts_from_it(
    workdir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, _ = runs.locate(snapshot(workdir, "first"))
    config.model.path, config.model.revision = "who/what", "abc"
    base, revision, about = export.base_model(config, "first", workdir, tmp_path)
    assert (base, revision) == ("who/what", "abc") and "who/what" in about
    monkeypatch.chdir(workdir)
    config.model.path = "model"
    assert export.base_model(config, "first", workdir, tmp_path)[0] == str(workdir.resolve() / "model")


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_a_reward_model_is_exported_with_its_head(
    workdir: Path, made: Setup, tmp_path: Path, name: str
) -> None:
    if name == "judge":  # whose tokenizer pads with what ends a turn, as many do
        workdir = Path(shutil.copytree(workdir, tmp_path / "run"))
        file = workdir / "model" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<|im_end|>"}))
        assert tokenizer.load(workdir / "model").pad_token_id in made.template.stop_ids
    out = tmp_path / "out"
    export.export(snapshot(workdir, name), out)
    config = hf.read_config(out)
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and config["id2label"] == {"0": "LABEL_0"}
    assert config["pad_token_id"] not in made.template.stop_ids
    assert tokenizer.load(out).pad_token_id == config["pad_token_id"]
    cfg = model_config.from_hf(config, where="x", head="score")
    model = make_model(cfg, tiny.MODEL, head="score")
    layout = shardings(model, sharding.make_mesh(devices=jax.devices()[:1]))
    params = hf.place(hf.open_reader(out, cfg, "score"), model.params, layout)
    want = SAVED["reward"]
    if name == "judge":
        base = {k: v for k, v in SAVED["sft"].items() if k != "lm_head"}
        want = merged(base, SAVED["judge"])
    assert params.keys() == want.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, want)
    assert "lm_head.weight" not in safetensors.numpy.load_file(out / "model.safetensors")


def test_what_pads_a_reward_model_ends_no_response() -> None:
    tok = tokenizer.byte_level()
    ids = {token: tok.convert_tokens_to_ids(token) for token in tokenizer.SPECIAL}
    stops = (ids["<|endoftext|>"], ids["<|im_end|>"])
    assert export.padding_id(tok, stops) == ids["<|pad|>"]
    tok.pad_token = "<|im_end|>"
    assert export.padding_id(tok, stops) not in stops
    with pytest.raises(UserError, match="no special token that ends no response"):
        export.padding_id(tok, tuple(ids.values()))
