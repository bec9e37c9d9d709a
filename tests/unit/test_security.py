"""Nothing in sources, scripts and configs runs foreign code, reads the hub at any commit, or hands secrets about."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
HUB_CALLS = {
    "hf_hub_download", "hf_hub_url", "snapshot_download", "from_pretrained", "get_paths_info", "repo_info",
    "dataset_info", "model_info", "list_repo_files", "list_repo_tree", "load_dataset", "load_dataset_builder",
    "get_dataset_config_names", "get_dataset_split_names",
}  # fmt: skip
"""What asks the hub for something that changes from commit to commit."""
SECRET = r"((hf|hub|hugging_?face|wandb|auth|access|api|secret)_)*(token|api_key|password|secret)"


def dotted(node: ast.AST) -> str:
    """``torch.serialization.load`` of such an expression; empty for others."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def unsafe_calls(call: ast.Call) -> Iterator[str]:
    name, given = dotted(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("torch.load", "torch.serialization.load") and not is_true(given.get("weights_only")):
        yield "torch.load without weights_only=True"
    if "weights_only" in given and not is_true(given["weights_only"]):
        yield "weights_only that is not True"
    for key in ("trust_remote_code", "allow_pickle", "shell"):
        if key in given:
            yield key
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        yield name
    if name == "yaml.load" and "Loader" not in given or re.fullmatch(r"yaml\.(full|unsafe)_load(_all)?", name):
        yield f"{name} instead of yaml.safe_load"
    if name == "yaml.load" and "Loader" in given and dotted(given["Loader"]) != "yaml.SafeLoader":
        yield "yaml.load without SafeLoader"


def hub_calls_without_revision(function: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    """Calls, also by ``partial``, in a function that neither passes a revision nor asks which is the newest."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    if any(dotted(call.func).endswith("resolve_revision") for call in calls):
        return
    for call in calls:
        called = call.args[0] if dotted(call.func) in ("partial", "functools.partial") and call.args else call.func
        name = called.attr if isinstance(called, ast.Attribute) else dotted(called)
        if name in HUB_CALLS and "revision" not in {keyword.arg for keyword in call.keywords}:
            yield call.lineno, f"{name} without a revision"


def secret_inputs(node: ast.AST) -> Iterator[str]:
    """Secrets as a command's option, or as a field of a config, which is written into the run's folder."""
    if isinstance(node, ast.FunctionDef) and "typer." in ast.unparse(node.args):
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            if re.fullmatch(SECRET, argument.arg):
                yield f"option --{argument.arg.replace('_', '-')}"
    if isinstance(node, ast.ClassDef) and any(re.search("Section$|BaseModel$", dotted(base)) for base in node.bases):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and re.fullmatch(SECRET, dotted(field.target)):
                yield f"field {node.name}.{dotted(field.target)}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
        if re.fullmatch(r"--" + SECRET.replace("_", "[-_]"), text) or text == "trust_remote_code":
            yield repr(text)


def findings(source: str) -> list[tuple[int, str]]:
    """Line and kind of everything in a Python source that must not be there."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call):
            found += [(line, what) for what in unsafe_calls(node)]
        elif isinstance(node, ast.Import):
            imported = [alias for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
            # What is used of a plain ``import pickle`` is looked at below.
            found += [(line, f"import {alias.name}") for alias in imported if alias.name != "pickle" or alias.asname]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            names = {alias.name for alias in node.names}
            found += [(line, f"from {node.module} import {name}") for name in names - {"UnpicklingError"}]
        elif isinstance(node, ast.Attribute) and dotted(node.value) == "pickle" and node.attr != "UnpicklingError":
            found.append((line, f"pickle.{node.attr}"))
        if isinstance(node, ast.FunctionDef):
            found += hub_calls_without_revision(node)
        found += [(line, what) for what in secret_inputs(node)]
    return sorted(set(found))


SHELL_RULES = {
    r"\$\{?(HF_TOKEN|WANDB_API_KEY)\b(?!:-\}\" \]\])": "a secret as an argument, or in what is printed",
    r"--(hf-|wandb-)?(token|api-key|password)\b": "an option for a secret",
    r"trust.remote.code": "trust_remote_code",
    r"\bset -[a-wyz]*x": "a trace that prints every command",
    r"(^|[;&|]\s*)\s*(eval|source|\.)\s": "text that is executed",
    r"\b(curl|wget)\b.*\|\s*(sudo )?(ba|z)?sh\b": "a download that is executed",
}


def shell_findings(script: str) -> list[tuple[int, str]]:
    lines = [(number, line) for number, line in enumerate(script.splitlines(), 1) if not line.lstrip().startswith("#")]
    return [(number, what) for rule, what in SHELL_RULES.items() for number, line in lines if re.search(rule, line)]


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def report(files: list[Path], look: Callable[[str], list[tuple[int, str]]]) -> list[str]:
    assert files
    return [f"{path.relative_to(ROOT)}:{line}: {what}" for path in files for line, what in look(path.read_text())]


def test_nothing_unsafe_in_the_sources() -> None:
    assert report(sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]), findings) == []


def test_nothing_unsafe_in_the_scripts() -> None:
    assert report(sorted((ROOT / "scripts").glob("*.sh")), shell_findings) == []


def test_configs_hold_no_secret_and_trust_nothing() -> None:
    for path in [
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "src").rglob("*.yaml"),
        *(ROOT / "configs").glob("*.json"),
    ]:
        text = re.sub(r"!function .*", "x", path.read_text())  # a tag of the harness's task files
        found = [key for key in keys(yaml.safe_load(text)) if re.fullmatch(SECRET + "|trust_remote_code", key)]
        assert not found, f"{path.relative_to(ROOT)}: {found}"
        assert "!function" not in path.read_text(), f"{path.relative_to(ROOT)}: a task file that names code"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=safe)", "weights_only that is not True"),
        ("engine.load(path, weights_only=False)", "weights_only that is not True"),
        ("load_dataset(name, revision=r, trust_remote_code=True)", "trust_remote_code"),
        ("options = {'trust_remote_code': True}", "'trust_remote_code'"),
        ("import pickle\npickle.loads(data)", "pickle.loads"),
        ("from pickle import load", "from pickle import load"),
        ("import dill", "import dill"),
        ("import pickle as p", "import pickle"),
        ("numpy.load(path, allow_pickle=True)", "allow_pickle"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("subprocess.run(line, shell=True)", "shell"),
        ("os.system(line)", "os.system"),
        ("yaml.load(text)", "yaml.load instead of yaml.safe_load"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load without SafeLoader"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load instead of yaml.safe_load"),
        ("def f():\n    hf_hub_download(name, file)", "hf_hub_download without a revision"),
        ("def f():\n    partial(HfApi().repo_info, name)", "repo_info without a revision"),
        ("def f():\n    AutoTokenizer.from_pretrained(name)", "from_pretrained without a revision"),
        ("def main(hf_token: Annotated[str, typer.Option()]): ...", "option --hf-token"),
        ("def main(api_key: str = typer.Option()): ...", "option --api-key"),
        ("class Settings(Section):\n    wandb_api_key: str", "field Settings.wandb_api_key"),
        ("command = ['hf', '--token', token]", "'--token'"),
        ("model.eval()\nfile.load()\nyaml.safe_load(text)\nyaml.load(text, Loader=yaml.SafeLoader)", None),
        ("import pickle\ntry: ...\nexcept pickle.UnpicklingError: ...", None),
        ("torch.load(path, weights_only=True)\nsubprocess.run([program])", None),
        ("def f():\n    resolve_revision(name)\n    hf_hub_download(name, file)", None),
        ("class Group(NamedTuple):\n    token: Tensor\ndef permute(index, token): ...", None),
        ("def main(max_tokens: Annotated[int, typer.Option()]): ...\nclass A(Section):\n    tokenizer: str", None),
    ],
)
def test_each_rule_finds_what_it_is_for_and_nothing_else(source: str, found: str | None) -> None:
    assert (found in [what for _, what in findings(source)]) if found else findings(source) == []


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ('hf auth login --token "$HF_TOKEN"', True),
        ("wandb login $WANDB_API_KEY", True),
        ('echo "${HF_TOKEN}"', True),
        ("set -x", True),
        ("set -euxo pipefail", True),
        ("source .env", True),
        (". .env", True),
        ("curl https://example.org/install | bash", True),
        ('if [[ -n "${HF_TOKEN:-}" ]]; then', False),
        ('missing+=("HF_TOKEN in .env: create one")', False),
        ("set -euo pipefail", False),
        ("# source .env would execute it", False),
        ('cd "$(dirname "$0")/.."', False),
    ],
)
def test_each_rule_for_scripts_finds_what_it_is_for(line: str, is_found: bool) -> None:
    assert bool(shell_findings(line)) == is_found
