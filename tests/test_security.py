"""What nothing here may do: unpickle, run code that came with data, leave a folder, or show a key.

Beside these: HTML of model text is inert (drift/test_report_in_browser.py, test_study_report_in_browser.py), an API key
is in no file, log or error (test_chat_api.py, judges/test_api_judge.py), an index cannot point out of its directory
(models/test_hf.py), prompts of judges and templates are sandboxed (judges/).
"""

import ast
import functools
import importlib.metadata
import io
import pickle
import re
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_chat_server import Answer, serve
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vdjax import chat_api
from vdjax.data import chat, tokenizer
from vdjax.data.readers import read_rows
from vdjax.errors import UserError
from vdjax.judges import prompts

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for folder in ("vdjax", "scripts", "configs", "tpu") for file in (ROOT / folder).rglob("*.py"))
UNPICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"),
    *("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.fromregex", "tarfile.open"),
    *("shutil.unpack_archive",),
}
RUNS_FILES = {"vdjax/config.py", "vdjax/train/rewards.py"}  # Python files that the user names on the command line
KEY = "sk-of-no-one-0123456789abcdef"


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(node: ast.expr) -> str:
    """os.path.join as "os.path.join"; what hangs on a call or an index begins with a point."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: "np" for numpy, "load" for torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def offences(tree: ast.Module, file: str) -> Iterator[str]:
    stands_for = imported(tree)
    for node in ast.walk(tree):
        place = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in [module, *(alias.name for alias in node.names)]:
                if name.split(".")[0] in UNPICKLES:
                    yield f"{place} imports {name}"
        if not isinstance(node, ast.Call):
            continue
        first, point, rest = name_of(node.func).partition(".")
        name = stands_for.get(first, first) + point + rest
        if name in NEVER_CALLED or name.rpartition(".")[2] in ("read_pickle", "to_pickle", "extractall", "unsafe_load"):
            yield f"{place} calls {name}"
        if name.endswith("exec_module") and file not in RUNS_FILES:
            yield f"{place} runs a Python file"
        for keyword in node.keywords:
            given = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell", "weights_only") and given is not False:
                yield f"{place} {keyword.arg} is not False"


def test_nothing_unpickles_or_runs_what_came_with_data() -> None:
    assert len(SOURCES) > 100
    found = [x for f in SOURCES for x in offences(tree_of(f), f.relative_to(ROOT).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import cloudpickle as c",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "torch.load(f)",
        "from torch import load as read; read(f)",
        "import torch as t; t.load(f)",
        "from os import system; system(f)",
        "yaml.load(f)",
        "eval(text)",
        "pd.read_pickle(f)",
        "frame.x().to_pickle(f)",
        "A.from_pretrained(f, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(f)",
        "spec.loader.exec_module(m)",
    ],
)
def test_what_is_looked_for_is_found(line: str) -> None:
    assert len(list(offences(ast.parse(line), "vdjax/x.py"))) == 1
    sound = ast.parse("np.load(f, allow_pickle=False); ast.literal_eval(x); re.compile(x); model.eval()")
    assert not list(offences(sound, "vdjax/x.py"))


def test_every_class_of_transformers_that_may_run_code_is_told_not_to() -> None:
    loads = [
        (file, node)
        for file in SOURCES
        if file.is_relative_to(ROOT / "vdjax")
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call) and re.search(r"\bAuto\w+\.from_pretrained$", name_of(node.func))
    ]
    assert loads
    for file, node in loads:
        assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, f"{file}:{node.lineno}"


class Bomb:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_a_pickle_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever its name says, and inside an array."""
    bomb = pickle.dumps(Bomb())
    pickle.loads(bomb)
    assert "unpickled" in capsys.readouterr().out  # it goes off where it is let
    array = io.BytesIO()
    np.save(array, np.array([Bomb()], object))
    for name in ("rows.jsonl", "rows.json", "rows.txt.gz", "rows.parquet"):
        for content in (bomb, array.getvalue()):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name):
                list(read_rows(str(tmp_path / name)))
    (tmp_path / "rows.pkl").write_bytes(bomb)
    with pytest.raises(UserError, match="unknown suffix"):
        read_rows(str(tmp_path / "rows.pkl"))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("fast", [True, False])
def test_code_beside_a_tokenizer_is_not_run(fast: bool, tmp_path: Path) -> None:
    made = tokenizer.byte_level()
    made.save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for name, key in (("tokenizer_config.json", "AutoTokenizer"), ("config.json", "AutoConfig")):
        (tmp_path / name).write_text(
            f'{{"auto_map": {{"{key}": ["mine.Tokenizer", "mine.Tokenizer"]}}, "model_type": "x"}}'
        )
    if not fast:
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(UserError, match="cannot load one from"):
            tokenizer.load(tmp_path)
    else:
        assert len(tokenizer.load(tmp_path)) == len(made)
    assert not (tmp_path / "ran").exists()


def test_templates_reach_nothing_but_what_they_are_given(tmp_path: Path) -> None:
    """Neither Python's classes nor files beside them."""
    (tmp_path / "secret.txt").write_text("secret")
    for text in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        f"{{% include '{tmp_path}/secret.txt' %}}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
    ):
        (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + text)
        with pytest.raises(UserError, match="mine.jinja fails on an ordinary conversation"):
            chat.pick_template(tokenizer.byte_level(), str(tmp_path / "mine.jinja"))
        labels = '[{text = "a", label = "support", graded = 1}, {text = "b", label = "oppose"}]'
        prompt = f"prompt = '''{{{{ proposition }}}} {{{{ response }}}} {text} ->'''"
        (tmp_path / "mine.toml").write_text(f"chat = true\nletters = true\n{prompt}\nlabels = {labels}\n")
        with pytest.raises(UserError, match="mine.toml: prompt"):
            prompts.read_template(str(tmp_path / "mine.toml"))


def test_a_key_is_not_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in one with all causes, of a server that sends the key back."""
    monkeypatch.setenv("VDJAX_TEST_KEY", KEY)
    ask = [chat_api.Request((("user", "x"),), 0.0, 1)]
    with serve(lambda body, number: Answer({"error": {"message": f"{KEY} is wrong"}}, 401)) as server:
        endpoint = chat_api.Endpoint(server.url, "m", "VDJAX_TEST_KEY", 1, 0, 0, 5.0, 9, 9.0, 1.0, 1.0)
        with pytest.raises(UserError, match=r"\[key\] is wrong") as refused:
            chat_api.ask(endpoint, ask, tmp_path / "replies")
        assert server.seen[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(UserError) as lost:
        chat_api.ask(endpoint, ask, tmp_path / "replies")  # nobody answers there any more
    for error in (refused.value, lost.value):
        assert KEY not in "".join(traceback.format_exception(error))
        assert KEY not in repr(error) + repr(endpoint)
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.iterdir())


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "-")]
    found = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", line).groups() for line in lines]
    assert len({canonicalize_name(package) for package, _ in found}) == len(found), f"{name} has a package twice"
    return {canonicalize_name(package): version for package, version in found}


def needed(requirements: Iterable[str], extras: Iterable[str] = ("",)) -> Iterator[Requirement]:
    """Of these, what this machine installs."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def test_every_dependency_of_a_developer_is_pinned() -> None:
    """Each package once, here or with those of a TPU worker; and what the packages need themselves."""
    assert "-c tpu/constraints.txt\n" in (ROOT / "constraints.txt").read_text()
    tools, workers = pins("constraints.txt"), pins("tpu/constraints.txt")
    assert not tools.keys() & workers.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    left = list(needed(project["dependencies"] + project["optional-dependencies"]["dev"]))
    seen: set[tuple[str, frozenset[str]]] = set()
    while left:
        wanted = left.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        assert wanted.specifier.contains((tools | workers)[name], prereleases=True), wanted
        if (name, extras) not in seen:
            seen.add((name, extras))
            left += needed(importlib.metadata.requires(name) or [], extras or ("",))
    assert len({name for name, _ in seen}) > 100
