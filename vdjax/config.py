"""What a config file may say: every field with its default, and how files and flags are read.

A config is a Python file with `get_config()` (or `get_config(arg)`, chosen as `file.py:arg`) that starts from
`experiment()` and adds a `stage(...)` under each name that `stages` lists.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from vdjax import check_config
from vdjax.check_config import open_ended
from vdjax.errors import UserError, nearest
from vdjax.models import lora
from vdjax.objectives import OBJECTIVES


def experiment() -> ConfigDict:
    """An experiment without stages."""
    c = ConfigDict()
    c.seed = 0
    c.stages = ()  # names of the stages in the order they run; each is a field of its own, made by `stage`

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face directory or hub id; empty: from scratch, by `config` below
    c.model.revision = ""  # of a hub id; empty: its main branch
    c.model.name = ""  # from scratch: a named shape such as qwen3-0.6b (vdjax.models.named) ...
    c.model.shape = ConfigDict()  # ... or the fields of a config.json
    c.model.ignore_fields = ()  # unknown fields of config.json that do not change the numbers
    c.model.param_dtype = "float32"
    c.model.compute_dtype = "float32"  # bfloat16 on TPU
    c.model.remat = "none"  # what the backward pass recomputes: none, dots (all but matmul results) or full (all)
    c.model.unroll = 1  # layers per iteration of the layer loop
    c.model.attention = "auto"  # auto: splash (Pallas kernels) on TPU, plain elsewhere
    c.model.query_chunk = 128  # queries per attention block; 0: all at once
    c.model.head_chunk = 128  # scored tokens per application of the vocabulary head; on TPU 512

    c.tokenizer = ConfigDict()
    c.tokenizer.path = ""  # empty: the model's; "bytes": the built-in byte-level one
    c.tokenizer.chat_template = "auto"  # auto: the tokenizer's own, else plain; plain, chatml, llama3; a .jinja file
    c.tokenizer.template_options = ConfigDict({"enable_thinking": False})  # variables of the template where responses
    # are sampled (open_ended, vdjax.sample, vdjax.synthesize), if it has them

    c.mesh = ConfigDict()  # devices along each axis; one may be -1, which takes all that are left
    c.mesh.data = 1  # rows spread, parameters whole; several TPU slices lie along it
    c.mesh.fsdp = -1  # rows and parameters spread
    c.mesh.context = 1  # the length of rows and parameters spread, for long rows
    c.mesh.tensor = 1  # heads, MLP and vocabulary spread

    c.probes = ConfigDict()
    c.probes.path = "builtin"  # or a file: JSONL, JSON or CSV (vdjax.probes.sets)
    c.probes.topics = ()  # empty: all
    c.probes.max_per_topic = 0  # 0: all
    c.probes.readouts = ("statement",)  # ways to ask: statement, options, open_ended (vdjax.probes.readouts)
    c.probes.system_prompts = ("",)  # every probe is asked under each of them; "": none
    c.probes.templates = ("{question}",)  # and in each of these forms
    c.probes.samples = 5  # responses a probe, of the readout open_ended
    c.probes.temperature = 0.7
    c.probes.top_p = 1.0
    c.probes.top_k = 0
    c.probes.max_new_tokens = 256
    c.probes.replicates = 1  # times that the first and last snapshot are sampled, each with seeds of its own; 2 or more
    # measure the noise of sampling
    c.probes.judges = ()  # names of judges (below) of the responses
    c.probes.rows = 0  # rows a call of the evaluator; 0: four for each batch shard
    c.probes.memory_gb = 0.0  # for snapshots held at once on all devices; 0: half of it, on CPU for one a device
    c.probes.max_length = 512  # tokens of a probe with its chat template and longest answer

    c.judges = ConfigDict()  # by name, each made by `judge`

    c.judge_quality = ConfigDict()  # of a stage that trains a judge: measured on labelled stances
    c.judge_quality.stage = ""
    c.judge_quality.path = ""  # as `vdjax.judge --labelled` takes it; several joined by commas
    c.judge_quality.topics = ()  # empty: all
    c.judge_quality.max_examples = 0  # 0: all
    c.judge_quality.template = "trained-v1"

    c.seeds = ()  # runs the whole experiment once with each, in WORKDIR/seed-N, and reports on all
    c.resume_every = 100  # steps between resume points
    c.log_every = 1  # steps between logged lines
    return c


JUDGES: dict[str, dict[str, Any]] = {  # kinds of judges and their fields
    "local": {
        "path": "",  # Hugging Face directory or hub id of a causal language model
        "revision": "",  # of a hub id
        "template": "stance-v1",  # a name in vdjax/judges/templates, or a file
        "max_length": 1024,  # tokens of a prompt with its label
        "rows": 0,  # prompts a call; 0: four for each batch shard
        "repeats": 1,  # judgings with other label orders; 2 or more measure the judge's own noise
        "quality": "",  # the quality.json that vdjax.judge wrote of it, shown in the report
    },
    "api": {
        "base_url": "",  # of an endpoint with OpenAI's protocol, up to and with /v1
        "model": "",
        "key_env": "",  # name of the environment variable with the key; empty: no key is sent
        "template": "stance-v1",
        "votes": 0,  # sampled answers a response; 0: log-probs of the options, or 10 votes where they are not served
        "concurrency": 8,
        "requests_per_minute": 0.0,  # 0: no limit
        "max_retries": 5,
        "timeout_s": 60.0,
        "max_calls": 10_000,  # over all runs with this workdir, or all experiments of a study ...
        "max_usd": 1.0,  # ... and what they may cost
        "usd_per_million_input": -1.0,  # must be given; 0 for a server of your own
        "usd_per_million_output": -1.0,
        "extra": {},  # put into every request's body, such as {"reasoning_effort": "low"}; None takes a field out
        "repeats": 1,
        "quality": "",
    },
    "human": {"path": "", "quality": ""},  # a CSV file of labels (vdjax.judges.human)
}


def judge(kind: str, **fields: Any) -> ConfigDict:
    """A judge; `fields` override the defaults of its kind in JUDGES.

    Raises:
      UserError: an unknown kind or field, or a value of another type.
    """
    if kind not in JUDGES:
        raise UserError(f"judge kind {kind!r} is unknown{nearest(kind, JUDGES)}")
    c = ConfigDict({"kind": kind, **JUDGES[kind]})
    _merge(c, fields, f"judge({kind!r})")
    return c


SAMPLES = {"rloo": 4, "grpo": 8, "dr_grpo": 8, "dapo": 8, "online_dpo": 2}


def stage(objective: str, **fields: Any) -> ConfigDict:
    """One stage; `fields` override defaults by name, nested ones as a dict.

    Raises:
      UserError: an unknown objective or field, or a value of another type.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"objective {objective!r} is unknown{nearest(objective, OBJECTIVES)}")
    c = ConfigDict()
    c.objective = objective
    c.hyper = ConfigDict(dict(OBJECTIVES[objective].hyper))
    c.init_from = ""  # the stage whose final parameters this one starts from; empty: the stage before it, or the model

    c.data = ConfigDict()
    c.data.source = "auto"  # a name in vdjax.data.parsers.SOURCES; auto: by the columns
    c.data.path = ""  # file, directory or hub id; several files joined by commas
    c.data.name = ""  # a hub dataset's configuration
    c.data.revision = ""  # pin a hub dataset to a commit
    c.data.split = ""  # of a hub dataset (default train) or a directory
    c.data.max_examples = 0  # 0: all
    c.data.skip_examples = 0
    c.data.options = ConfigDict()  # of the source (vdjax.data.sources), such as persona's topic, view and align
    c.data.parts = ()  # instead of a path: a mixture of data sets (vdjax.data.mixture)
    c.data.order = "shuffled"  # of an epoch; parts: one part after the other
    c.data.assistant_turns = "all"  # which answers of an SFT conversation are scored: all or last
    c.data.truncation = "response_end"  # what goes when an example is too long: response_end or oldest_turns

    c.rollout = ConfigDict()  # of objectives that learn from the policy's own responses to the data's prompts
    c.rollout.samples = SAMPLES.get(objective, 1)  # responses a prompt
    c.rollout.max_new_tokens = 128  # max_length is for the prompt with one response
    c.rollout.temperature = 1.0
    c.rollout.top_p = 1.0
    c.rollout.top_k = 0
    c.rollout.epochs = 1  # passes over a step's responses ...
    c.rollout.minibatches = 1  # ... in so many updates each
    c.rollout.rows = 0  # responses sampled at a time; 0: 32 for each batch shard, on CPU 64

    c.reward = ConfigDict()  # of those responses
    c.reward.model = ""  # a reward_model stage, or the directory or hub id of a sequence-classification model
    c.reward.revision = ""  # of a hub id
    c.reward.function = ""  # or a Python function: module:function or FILE.py:function (vdjax.train.rewards)
    c.reward.missing_eos_penalty = 0.0  # taken off the reward of a response that does not end by itself

    c.log_kl = False  # log the KL to what the stage starts from even where a preference objective needs no reference
    c.eval_examples = 0  # held out from the end of the data
    c.eval_every = 0  # steps; 0: only before the first and after the last

    c.max_length = 1024  # tokens of a prompt and one response
    c.row_length = 0  # tokens of a packed row; 0: the one with the least padding
    c.batch_size = 32  # examples (pairs, conversations, documents) a step
    c.microbatch_rows = 0  # rows per forward and backward pass; 0: one for each batch shard
    c.epochs = 1
    c.max_steps = 0  # 0: all epochs

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # or adafactor: factored second moments and no momentum, hardly any memory
    c.optimizer.learning_rate = 1e-5
    c.optimizer.schedule = "cosine"  # after warm-up: cosine, linear or constant
    c.optimizer.warmup = 0.1  # share of the steps
    c.optimizer.final = 0.0  # learning rate at the end, as a share of the peak
    c.optimizer.b1 = 0.9  # this and the next three: of adamw
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.moment_dtype = "float32"  # that both moments are kept in; bfloat16 halves their memory
    c.optimizer.master = True  # of parameters kept in bfloat16: a float32 copy, in which small updates add up; without
    # it a step rounds them once, and loses what is less than 1/512 of a parameter
    c.optimizer.weight_decay = 0.0  # not of norms and biases
    c.optimizer.clip_norm = 1.0  # 0: no clipping

    c.lora = ConfigDict()
    c.lora.rank = 0  # of the adapters (vdjax.models.lora); 0: all parameters are trained
    c.lora.alpha = 16.0  # the adapters' product counts alpha / rank
    c.lora.targets = lora.KERNELS  # kernels that have adapters

    c.snapshots = ConfigDict()
    c.snapshots.log_spaced = 6  # snapshots at log-spaced steps between the first and the last
    c.snapshots.every = 0  # and at every multiple of this; 0: none
    c.snapshots.probe = OBJECTIVES[objective].kind != "reward"  # a reward model answers nothing
    _merge(c, fields, f"stage({objective!r})")
    return c


def _merge(config: ConfigDict, fields: Mapping[str, Any], where: str) -> None:
    for name, value in fields.items():
        key = f"{where}.{name}"
        if name not in config and not open_ended(where):
            raise UserError(f"{key} is no field{nearest(name, config)}")
        if isinstance(value, Mapping) and not open_ended(where):
            if not isinstance(config[name], ConfigDict):
                raise UserError(f"{key}: expected {type(config[name]).__name__}, found a dict")
            _merge(config[name], value, key)
        else:
            _assign(config, name, value, key)


def _assign(config: ConfigDict, name: str, value: Any, key: str) -> None:
    old = config.get(name)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    content = value.get() if isinstance(value, FieldReference) else value  # several fields set by one
    if old is not None and type(content) is not type(old):
        raise UserError(f"{key}: expected {type(old).__name__} such as {old!r}, found {content!r}")
    with config.unlocked():
        config[name] = value


def load(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Reads `FILE.py[:ARG]`, applies `--config.key=value` overrides and checks the experiment.

    Raises:
      UserError: no such file, no `get_config`, an unknown key, a value of the wrong type, or one that cannot be meant.
    """
    config = read(spec)
    # Another objective brings its own hyper-parameters, which other flags may then set.
    for flag in sorted(overrides, key=lambda flag: not flag.partition("=")[0].endswith(".objective")):
        override(config, flag)
    check(config, spec.partition(":")[0])
    return config


def check(config: ConfigDict, where: str) -> None:
    """UserError for a field that there is not, and for what no experiment can mean."""
    pattern: dict[str, Any] = experiment().to_dict()
    for name, value in config.items():
        if isinstance(value, ConfigDict) and value.get("objective") in OBJECTIVES:
            pattern[name] = stage(value.objective).to_dict()
    for name, fields in config.get("judges", {}).items():
        pattern["judges"][name] = judge(fields.get("kind", "")).to_dict()
    for name, value in config.to_dict().items():  # a file may have fields of its own, that others refer to
        near = [known for known in pattern if abs(len(known) - len(name)) <= 2]
        if name not in pattern and not difflib.get_close_matches(name, near, n=1, cutoff=0.75):
            pattern[name] = value
    check_config.check_names(config, pattern, "config", where)
    check_config.check_experiment(config, set(experiment()), where)


def read(spec: str) -> ConfigDict:
    """What `FILE.py[:ARG]` gives, unchecked.

    Raises:
      UserError: no such file, no `get_config`, or an error that the file raises, with its line.
    """
    path, _, arg = spec.partition(":")
    if arg.startswith("//"):
        raise UserError(f"--config {spec}: expected a file on this machine, as a config is a program that is run")
    file = Path(path)
    if not file.is_file():
        siblings = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        close = difflib.get_close_matches(path, siblings, n=1)
        raise UserError(f"--config {path}: no such file" + (f"; did you mean {close[0]!r}?" if close else ""))
    module_spec = importlib.util.spec_from_file_location(f"vdjax_config_{file.stem}", file)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    # Config files import their shared parts as `from configs import base`, from whatever directory they are run.
    folder = file.resolve().parent
    root = next((p.parent for p in (folder, *folder.parents) if p.name == "configs"), folder.parent)
    sys.path.insert(0, str(root))
    try:
        with _errors_of(file):
            module_spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: has no function get_config()")
    if arg and not inspect.signature(module.get_config).parameters:
        raise UserError(f"--config {spec}: {path} takes no argument behind the colon")
    with _errors_of(file):
        config = module.get_config(arg) if arg else module.get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() gave {type(config).__name__}, expected the ConfigDict of experiment()")
    return config


@contextlib.contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Turns what a config file raises into a UserError with the line of the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines = [error.lineno]
        place = f"{file}, line {lines[-1]}" if lines else f"{file}"
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error


def override_only(config: ConfigDict, flags: Iterable[str], *groups: str) -> None:
    """Applies `--config.GROUP.a=value` of these groups of fields, for commands that take no other.

    Raises:
      UserError: another flag, or what `override` raises.
    """
    allowed = tuple(f"--config.{group}." for group in groups)
    for flag in flags:
        if not flag.startswith(allowed):
            others = " or ".join(f"{start}*" for start in allowed)
            raise UserError(f"{flag}: unknown flag; expected those of --help" + (f" or {others}" if others else ""))
        override(config, flag)


def override(config: ConfigDict, flag: str) -> None:
    """Applies one `--config.a.b=value`."""
    key, equals, text = flag.removeprefix("--").partition("=")
    parts = key.split(".")
    if parts[0] != "config" or not equals or len(parts) < 2:
        raise UserError(f"{flag}: unknown flag; fields of the config are set by --config.name=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    node = config
    for depth, name in enumerate(parts[1:], start=1):
        where = ".".join(parts[:depth])
        last = depth == len(parts) - 1
        if not isinstance(node, ConfigDict) or (name not in node and not (open_ended(where) and last)):
            raise UserError(
                f"--{where}.{name} is no field{nearest(name, node if isinstance(node, ConfigDict) else ())}"
            )
        if not last:
            node = node[name]
    if isinstance(node.get(parts[-1]), ConfigDict):
        raise UserError(f"--{key} is a group of fields{nearest('', node[parts[-1]])}")
    if isinstance(node.get(parts[-1]), str):
        value = text
    if isinstance(node.get(parts[-1]), bool) and text in ("true", "false"):
        value = text == "true"
    if parts[-1] == "objective" and len(parts) == 3:
        fresh = stage(text)
        node.hyper, node.rollout.samples = fresh.hyper, fresh.rollout.samples
        node.snapshots.probe = fresh.snapshots.probe
    _assign(node, parts[-1], value, f"--{key}")


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON, keys sorted."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)


def facts(config: ConfigDict) -> dict[str, Any]:
    """Every field of the resolved config by its dotted name."""
    return {f"config.{key}": value for key, value in flat(json.loads(to_json(config))).items()}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out
