"""The house: imports point one way, each outside library has one home, ``src`` is an alias, files stay readable."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/polyglu"
COMMON = {"errors", "files", "config_file", "logs", "estimates", "__init__"}
MAY_IMPORT = {
    "model": set(),
    "data": set(),
    "inference": {"model", "data"},
    "continuation": {"model", "data", "inference"},
    "routing_view": {"model", "data"},
    "generate": {"model", "data", "inference", "continuation", "routing_view"},
    "chat": {"model", "data", "inference", "continuation", "generate"},
    "export": {"model", "data", "inference", "evaluation"},
    "training": {"model", "data"},
    "sft": {"model", "data", "training"},
    "evaluation": {"model", "data", "inference"},
    "page": set(),
    "interpretability": {"model", "data", "inference", "page"},
    "report": {"interpretability", "page"},
    "data_figure": {"interpretability"},
    "eval_comparison_figure": {"interpretability"},
    "eval_comparison": {"evaluation", "eval_comparison_figure", "interpretability"},
    "data_page": {"data", "data_figure", "interpretability", "page"},
    "data_report": {"data", "data_page", "page"},
    "compare": {"model", "data", "training", "interpretability", "page"},
    "cli": {
        "demo",
        "data",
        "data_report",
        "training",
        "sft",
        "evaluation",
        "eval_comparison",
        "interpretability",
        "generate",
        "chat",
        "compare",
        "export",
    },
    "demo": {"data", "training", "sft", "evaluation", "interpretability", "report"},
}
"""Part of the package -> other parts it may import."""
ONE_HOME: dict[str, str | tuple[str, ...]] = {
    "transformers": ("export/", "data/tokenizer.py"),
    "deepspeed": "training/",
    "flash_attn": "model/flash_attention.py",
    "triton": "model/kernels/triton_",
    "wandb": "training/wandb_run.py",
    "lm_eval": "evaluation/",
    "scipy": "estimates.py",
    "matplotlib": "interpretability/plotting",
    "jinja2": ("page/", "evaluation/local_data.py"),  # makes pages; what the harness's templates read
    "gigatoken": "data/encoding.py",
    "awkward": "data/encoding.py",
}


def modules() -> dict[str, set[str]]:
    """File, relative to the package -> names of the modules it imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names.add(node.module or "")
        found[path.relative_to(PACKAGE).as_posix()] = names
    return found


def test_imports_point_one_way() -> None:
    for file, names in modules().items():
        part = file.split("/")[0].removesuffix(".py")
        if part in COMMON:
            continue
        for name in names:
            if name.startswith("polyglu."):
                other = name.split(".")[1]
                assert other == part or other in COMMON | MAY_IMPORT[part], f"{file} must not import {name}"


def test_each_library_has_one_home() -> None:
    homes = defaultdict(set)
    for file, names in modules().items():
        for name in names:
            homes[name.split(".")[0]].add(file)
    for library, home in ONE_HOME.items():
        assert homes[library] and all(file.startswith(home) for file in homes[library]), (library, homes[library])


def test_files_and_functions_stay_readable() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 330, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{path}: {node.name} has {lines} lines"


def test_consoles_and_bars_show_texts_as_they_are() -> None:
    bare = {"Console", "TextColumn"}  # without markup=False they read names as markup; logs.py makes the consoles
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in bare:
                fixed = all(isinstance(one, ast.Constant) and "task.description" not in one.value for one in node.args)
                assert path.name == "logs.py" or (node.func.id == "TextColumn" and fixed), f"{path}: {node.func.id}"


def test_src_is_an_alias_and_no_class_exists_twice() -> None:
    code = """
import src.model.config, src.model.model, src.training.train
from src.model.config import ModelConfig
import polyglu.model.config, polyglu.model.model
assert src.model.config is polyglu.model.config
assert ModelConfig is polyglu.model.config.ModelConfig
assert src.model.model.create_model is polyglu.model.model.create_model
assert polyglu.model.config.__spec__.name == 'polyglu.model.config'
try:
    import src.model.nothing
except ModuleNotFoundError as error:
    assert 'nothing' in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], cwd=ROOT, check=True)


STAGES = [
    "demo",
    "data",
    "train",
    "sft",
    "eval",
    "compare",
    "compare-evals",
    "analyze",
    "ablate",
    "generate",
    "chat",
    "export",
    "import",
]


@pytest.mark.parametrize("verb", STAGES)
def test_help_offers_the_stages(verb: str) -> None:
    from typer.testing import CliRunner

    from polyglu.cli import build_app

    listed = CliRunner().invoke(build_app(["--help"]), ["--help"])
    assert listed.exit_code == 0 and verb in listed.output
    own = CliRunner().invoke(build_app([verb]), [verb, "--help"])
    assert own.exit_code == 0 and "Usage" in own.output


def test_help_answers_without_importing_torch() -> None:
    code = "import sys; import polyglu.cli as c; c.build_app(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
