import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vdjax import config as configs
from vdjax.errors import UserError
from vdjax.setup import check_context


@pytest.fixture
def write(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(
        "from vdjax import config as base\n"
        "def get_config(arg='llama'):\n"
        "    c = base.experiment()\n"
        "    c.model.name = arg\n"
        "    c.stages = ('sft', 'dpo')\n"
        "    c.sft = base.stage('sft', data={'path': 'a.jsonl'}, optimizer={'learning_rate': 1})\n"
        "    c.dpo = base.stage('dpo', data={'path': 'b.jsonl', 'options': {'topic': 'tea'}})\n"
        "    return c\n"
    )
    return file


def test_files_arguments_and_overrides(write: Path) -> None:
    assert configs.load(str(write)).model.name == "llama"
    flags = [
        "--config.model.name=1",  # text stays text
        "--config.sft.optimizer.learning_rate=2",  # whole numbers become floats
        "--config.stages=('sft',)",
        "--config.dpo.snapshots.probe=false",
        "--config.sft.snapshots.probe=True",
        "--config.dpo.data.options.align=oppose",  # open-ended
        "--config.dpo.hyper.beta=1e-2",
        "--config.probes.topics=['a','b']",
        "--config.sft.data.path=x=y.jsonl",
    ]
    c = configs.load(f"{write}:qwen", flags)
    assert (c.model.name, c.sft.optimizer.learning_rate, c.stages) == ("1", 2.0, ("sft",))
    assert (c.dpo.snapshots.probe, c.sft.snapshots.probe, c.dpo.hyper.beta) == (False, True, 0.01)
    assert c.dpo.data.options.to_dict() == {"topic": "tea", "align": "oppose"}
    assert c.probes.topics == ("a", "b") and c.sft.data.path == "x=y.jsonl"
    assert isinstance(c.sft.optimizer.learning_rate, float)
    assert json.loads(configs.to_json(c))["dpo"]["objective"] == "dpo"
    assert configs.load(f"{write}:qwen").model.name == "qwen"


@pytest.mark.parametrize(
    ("flag", "match"),
    [
        ("--config.sft.optimizer.learning_rat=1", r"learning_rat is no field; did you mean 'learning_rate'"),
        ("--config.sfd.epochs=1", r"--config.sfd is no field; did you mean 'sft'"),
        ("--config.sft.epochs=two", r"--config.sft.epochs: expected int such as 1, found 'two'"),
        ("--config.sft.epochs=1.5", r"expected int such as 1, found 1.5"),
        ("--config.sft.epochs=True", r"expected int such as 1, found True"),
        ("--config.sft.snapshots.probe=1", r"expected bool such as True, found 1"),
        ("--config.sft.optimizer=1", r"--config.sft.optimizer is a group of fields; valid: .*learning_rate"),
        ("--config.sft.epochs.x=1", r"--config.sft.epochs.x is no field"),
        ("--config.seed", "unknown flag"),
        ("--verbose=1", r"--verbose=1: unknown flag; fields of the config are set by --config.name=value"),
        ("--config.sft.epochs=0", r"config.sft.epochs=0, expected at least 1"),
        ("--config.sft.data.path=", r"config.sft.data.path is empty"),
        ("--config.model.name=", "no model; pass --config.model.path"),
        ("--config.stages=('sft', 'dpoo')", r"stage 'dpoo' has no field config.dpoo"),
        ("--config.stages=('model',)", r"may not be called 'model'"),
        ("--config.stages=('sft', 'sft')", "'sft' stands twice"),
        ("--config.stages=()", "config.stages is empty"),
        ("--config.sft.init_from=dpo", r"config.sft.init_from='dpo' is no earlier stage"),
        ("--config.sft.optimizer.schedule=cosin", r"config.sft.optimizer.schedule='cosin'; did you mean 'cosine'"),
        ("--config.sft.optimizer.name=adafact", r"config.sft.optimizer.name='adafact'; did you mean 'adafactor'"),
        ("--config.dpo.optimizer.moment_dtype=float16", r"moment_dtype='float16'; did you mean 'bfloat16'"),
        ("--config.model.remat=half", r"config.model.remat='half'; valid: none, dots, full"),
        ("--config.dpo.data.truncation=left", r"config.dpo.data.truncation='left'"),
    ],
)
def test_what_an_override_may_not_say(write: Path, flag: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        configs.load(str(write), [flag])


def test_what_adafactor_has_not(write: Path) -> None:
    for flag in ("b1=0.5", "b2=0.99", "eps=1e-6", "moment_dtype=bfloat16"):
        flags = ["--config.sft.optimizer.name=adafactor", f"--config.sft.optimizer.{flag}"]
        with pytest.raises(UserError, match=f"optimizer.{flag[:2]}.* is of adamw alone; adafactor has none"):
            configs.load(str(write), flags)
    assert configs.load(str(write), flags[:1]).sft.optimizer.name == "adafactor"


def test_rows_that_the_context_axis_does_not_divide(write: Path) -> None:
    config = configs.load(str(write), ["--config.dpo.row_length=72"])
    check_context(config, 8)
    with pytest.raises(UserError, match="config.dpo.row_length=72 is no multiple of config.mesh.context=16"):
        check_context(config, 16)
    with pytest.raises(UserError, match="config.mesh.context=3 does not divide 64: rows have a multiple of 64 tokens"):
        check_context(config, 3)


def test_a_file_may_have_fields_of_its_own(write: Path) -> None:
    """As placeholders that other fields refer to; but for those spelt nearly like a field there is."""
    text = write.read_text()
    write.write_text(text.replace("c.stages", "c.hh = 'd.jsonl'\n    c.judge_quality_file = ''\n    c.stages"))
    assert configs.load(str(write)).hh == "d.jsonl"
    write.write_text(text.replace("c.stages", "c.sedes = (1, 2)\n    c.stages"))
    with pytest.raises(UserError, match=r"mine.py: config.sedes is no field; did you mean 'seeds'"):
        configs.load(str(write))


def test_files_that_are_none(write: Path) -> None:
    with pytest.raises(UserError, match=r"min.py: no such file; did you mean '.*mine.py'"):
        configs.load(str(write.parent / "min.py"))
    with pytest.raises(UserError, match="--config gs://b/mine.py:x: expected a file on this machine"):
        configs.load("gs://b/mine.py:x")
    write.write_text("import ml_collections\nget_config = lambda arg: ml_collections.ConfigDict({'x': arg})\n")
    assert configs.read(f"{write}:gs://b/data").x == "gs://b/data"
    with pytest.raises(UserError, match="nowhere/x.py: no such file"):
        configs.load("nowhere/x.py")
    write.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"has no function get_config\(\)"):
        configs.load(str(write))


def test_the_extra_fields_of_an_endpoint_are_whatever_they_are_given() -> None:
    c = configs.experiment()
    c.judges.api = configs.judge("api", extra={"max_tokens": None, "chat_template_kwargs": {"enable_thinking": True}})
    for flag in ("reasoning_effort=low", "chat_template_kwargs.enable_thinking=False", "chat_template_kwargs.more=[1]"):
        configs.override(c, f"--config.judges.api.extra.{flag}")
    configs.override(c, "--config.judges.api.extra.other={'a': None}")
    kwargs = {"enable_thinking": False, "more": [1]}
    want = {"max_tokens": None, "chat_template_kwargs": kwargs, "reasoning_effort": "low", "other": {"a": None}}
    assert c.judges.api.extra.to_dict() == want
    assert json.loads(configs.to_json(c))["judges"]["api"]["extra"] == want
    assert configs.judge("api").extra.to_dict() == {}
    with pytest.raises(UserError, match="--config.judges.api.extra.new is no field"):
        configs.override(c, "--config.judges.api.extra.new.field=1")
    with pytest.raises(UserError, match="did you mean 'extra'"):
        configs.judge("api", extras={})


def test_stage_fields() -> None:
    stage = configs.stage("simpo", batch_size=4, hyper={"gamma": 2}, data={"options": {"anything": 1}})
    assert (stage.batch_size, stage.hyper.gamma, stage.hyper.beta) == (4, 2.0, 2.0)
    assert stage.data.options.anything == 1 and stage.data.truncation == "response_end"
    for fields, match in (
        ({"batchsize": 4}, r"stage\('simpo'\).batchsize is no field; did you mean 'batch_size'"),
        ({"hyper": {"betta": 1}}, r"hyper.betta is no field; did you mean 'beta'"),
        ({"batch_size": "4"}, r"batch_size: expected int such as 32, found '4'"),
        ({"batch_size": {"a": 1}}, r"batch_size: expected int, found a dict"),
        ({"optimizer": 3}, r"optimizer: expected ConfigDict"),
    ):
        with pytest.raises(UserError, match=match):
            configs.stage("simpo", **fields)
    with pytest.raises(UserError, match="objective 'dpoo' is unknown; did you mean 'dpo'"):
        configs.stage("dpoo")


def test_stages_do_not_share_defaults() -> None:
    one, other = configs.stage("dpo"), configs.stage("dpo")
    one.hyper.beta, one.optimizer.learning_rate = 0.7, 1.0
    assert (other.hyper.beta, other.optimizer.learning_rate) == (0.1, 1e-5)
    assert isinstance(configs.experiment(), ConfigDict)


def test_another_objective_brings_its_own_hyper_parameters(write: Path) -> None:
    """In whatever order the flags stand."""
    c = configs.load(str(write), ["--config.dpo.hyper.desirable_weight=2.0", "--config.dpo.objective=kto"])
    assert c.dpo.hyper.to_dict() == {"beta": 0.1, "desirable_weight": 2.0, "undesirable_weight": 1.0}
    with pytest.raises(UserError, match="did you mean 'simpo'"):
        configs.load(str(write), ["--config.dpo.objective=simpoo"])
    both = ["--config.dpo.hyper.gamma=1", "--config.dpo.hyper.gamma_beta_ratio=1"]
    with pytest.raises(UserError, match="gamma"):
        configs.load(str(write), ["--config.dpo.objective=simpo", *both])
