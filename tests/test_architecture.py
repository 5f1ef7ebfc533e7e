"""What may depend on what, and what every config must hold."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml
from children import finished
from source_trees import nodes, tree

from textdiff.config import Config
from textdiff.config.reading import load
from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.sampling.rules import RULES

PACKAGE = Path(__file__).resolve().parent.parent / "textdiff"

PATHS = sorted(PACKAGE.rglob("*.py"))

CONTRIBUTING = (PACKAGE.parent / "CONTRIBUTING.md").read_text()

# Module or folder -> floor; a module may import from its own folder and from lower floors.
FLOORS = {
    name: int(floor)
    for floor, names in re.findall(r"^\| (\d+) \| ((?:`\w+`(?:, )?)+) \|", CONTRIBUTING, re.M)
    for name in re.findall(r"\w+", names)
}


def test_every_module_has_a_floor():
    assert {wing(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == set(FLOORS)


def wing(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The wings of textdiff that a module imports."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("textdiff.")}
    return found


def test_imports_run_downwards():
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in PATHS
        if (here := wing(path)) != "__init__"
        for other in imports(path)
        if other != here and FLOORS[other] >= FLOORS[here]
    ]
    assert upwards == []


def test_models_travel_alone():
    assert {path.name: imports(path) for path in PATHS if wing(path) == "models"} == {
        path.name: set() for path in (PACKAGE / "models").glob("*.py")
    }


ENGINES = ["train/trainer.py", "sampling/engine.py", "cli.py"]
ENGINES += [f"commands/{path.name}" for path in sorted((PACKAGE / "commands").glob("*.py"))]


@pytest.mark.parametrize("name", ENGINES)
def test_engines_name_no_objective_and_no_rule(name):
    words = {
        node.value if isinstance(node, ast.Constant) else node.id
        for node in nodes(PACKAGE / name)
        if (isinstance(node, ast.Constant) and isinstance(node.value, str))
        or isinstance(node, ast.Name)
    }
    classes = {cls.__name__ for cls in OBJECTIVES.values()}
    forbidden = {*OBJECTIVES, *RULES, *classes}
    assert not words & forbidden


def test_only_the_door_prints_and_reads_the_environment():
    inside = [p for p in PATHS if wing(p) not in ("cli", "commands", "view", "__main__")]
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in inside
        for node in nodes(path)
        if (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print")
        or (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "argv"))
    ]
    assert found == []


def test_import_is_light():
    program = "import sys, textdiff; print('torch' in sys.modules, textdiff.__version__)"
    done = finished([sys.executable, "-c", program])
    assert done.stdout.split()[0] == "False"


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "configs").glob("*.yaml")), ids=str)
def test_configs_are_complete_and_commented(path):
    resolved = load(path).model_dump(mode="json")
    written = yaml.safe_load(path.read_text())

    def keys(node, prefix=""):
        if isinstance(node, list):
            return {k for i, item in enumerate(node) for k in keys(item, f"{prefix}.{i}")}
        if isinstance(node, dict):
            return {k for name, value in node.items() for k in keys(value, f"{prefix}.{name}")}
        return {prefix}

    def known(node):  # a list of numbers is one value
        return {k for k in keys(node) if not k.rsplit(".", 1)[-1].isdigit()}

    assert known(written) == known(resolved)
    uncommented = [
        line for line in path.read_text().splitlines() if ": " in line and "#" not in line
    ]
    assert uncommented == []


def test_published_small_model_is_the_published_one(root):
    config = load(root / "configs" / "mdlm-owt-small.yaml")
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == (
        768,
        12,
        12,
    )
    assert config.data.sequence_length == 1024
    assert config.train.global_batch_size == 512
    assert config.model.adaln
    assert not config.model.time_conditioning


def test_defaults_are_a_valid_config():
    assert Config.model_validate({}) == Config()


def test_custom_code_is_refused_wherever_transformers_could_ask_for_it():
    calls = [
        node
        for path in PATHS
        for node in nodes(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.startswith("Auto")
    ]
    assert calls
    for call in calls:
        trust = {k.arg: k.value for k in call.keywords}["trust_remote_code"]
        assert ast.literal_eval(trust) is False


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PATHS}


def imported_modules(name: str) -> set[str]:
    """Modules of textdiff that a module imports at run time, with the packages they lie in."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for_types = [
        node for top in tree(path).body if isinstance(top, ast.If) for node in ast.walk(top)
    ]  # `if TYPE_CHECKING:`, the one condition that modules have
    candidates = []
    for node in nodes(path):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            candidates += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            candidates += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    parents = {".".join(c.split(".")[:n]) for c in candidates for n in range(1, 5)}
    return parents & set(MODULES)


def test_the_training_loss_imports_little():
    closure, waiting = set(), ["textdiff.loss"]
    while waiting:
        name = waiting.pop()
        if name not in closure:
            closure.add(name)
            waiting += imported_modules(name)
    assert len(closure) < 35
    assert not {name for name in closure if name.startswith("textdiff.likelihood")}
