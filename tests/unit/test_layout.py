"""The shape of the source tree: lengths, who may import what, and what an import costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "finetune"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted([*ROOT.glob("trainers/*.py"), *ROOT.glob("examples/*.py")])
MODULE_LINES, FACADE_LINES, FUNCTION_LINES = 400, 500, 80

# Which modules may import a package; a trailing slash means everything below that folder.
# `import_or_explain`, which takes a name, is not seen; it is for the packages of optimizers.
ALLOWED = {
    "trl": [],
    "transformers.trainer": [],
    "transformers.training_args": [],
    "transformers.Trainer": [],
    "transformers.TrainingArguments": [],
    "galore_torch": [],
    "peft": ["models/adapters.py", "checkpoint/weights.py", "cli/script_arguments.py"],
    "liger_kernel": ["kernels/liger.py"],
    "bitsandbytes": ["optim/galore_rules.py"],
    "deepspeed": ["distributed/", "checkpoint/backends.py", "checkpoint/gathered.py"],
}
# Too slow to import before they are used.
LAZY = {
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "huggingface_hub", "liger_kernel", "matplotlib", "peft",
    "scipy", "sklearn", "tokenizers", "transformers", "trl",
}  # fmt: skip


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yields `a.b` for `import a.b`, and both `a` and `a.b` for `from a import b`; nothing under `TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from imported_names(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def too_long(source: str, cap: int) -> list[str]:
    found = [f"{lines} lines, at most {cap}"] if (lines := source.count("\n")) > cap else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{node.name}: {length} lines, at most {FUNCTION_LINES}")
    return found


def names_package(name: str, package: str) -> bool:
    """Returns whether the imported `name` is of `package`, a key of `ALLOWED`."""
    # "transformers.trainer" also stands for trainer_utils, trainer_callback and the like.
    return name.startswith(package) if "." in package else name == package or name.startswith(package + ".")


def is_at_home(path: str, home: str) -> bool:
    return path.startswith(home) if home.endswith("/") else path == home


def misplaced_imports(source: str, path: str) -> list[str]:
    found = []
    for name in imported_names(ast.parse(source)):
        for package, homes in ALLOWED.items():
            if names_package(name, package) and not any(is_at_home(path, home) for home in homes):
                found.append(f"{name}, allowed in {homes}")
    return found


def unused_allowances(sources: dict[str, str]) -> list[str]:
    """Returns the homes in `ALLOWED` whose modules, given by path, import nothing of the package allowed there."""
    imported = {path: list(imported_names(ast.parse(source))) for path, source in sources.items()}
    return [
        f"{package} in {home}"
        for package, homes in ALLOWED.items()
        for home in homes
        if not any(
            names_package(name, package) for path, names in imported.items() if is_at_home(path, home) for name in names
        )
    ]


def heavy_top_imports(source: str) -> list[str]:
    top = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = imported_names(ast.Module(body=list(top), type_ignores=[]))
    return sorted({name for name in names if name.split(".")[0] in LAZY})


def private_imports(source: str, exported: set[str]) -> list[str]:
    """Returns what a program takes from finetune that is not one of its public names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("finetune.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "finetune":
            names = [alias.name for alias in node.names]
            found += [f"{node.module}.{name}" for name in names if node.module != "finetune" or name not in exported]
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*SOURCES, *PROGRAMS], ids=relative)
def test_modules_and_functions_can_be_read_in_one_go(path: Path) -> None:
    cap = FACADE_LINES if path == PACKAGE / "trainer.py" else MODULE_LINES
    assert too_long(path.read_text(), cap) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_third_party_packages_stay_in_their_place(path: Path) -> None:
    source = path.read_text()
    assert misplaced_imports(source, path.relative_to(PACKAGE).as_posix()) == []
    assert heavy_top_imports(source) == []


def test_every_allowance_is_used() -> None:
    assert unused_allowances({path.relative_to(PACKAGE).as_posix(): path.read_text() for path in SOURCES}) == []


@pytest.mark.parametrize("path", PROGRAMS, ids=relative)
def test_programs_use_public_names_only(path: Path) -> None:
    import finetune

    assert private_imports(path.read_text(), set(finetune.__all__)) == []


def test_the_rules_above_can_fail() -> None:
    assert too_long("\n" * 401, 400) == ["401 lines, at most 400"]
    assert too_long("def f():\n" + "    x = 1\n" * 80, 400) == ["f: 81 lines, at most 80"]
    assert misplaced_imports("def f():\n    from transformers.trainer_utils import set_seed", "engine/loop.py")
    assert misplaced_imports("from transformers import training_args", "engine/loop.py")
    assert misplaced_imports("import peft", "sft/trainer.py") and not misplaced_imports(
        "import peft", "models/adapters.py"
    )
    assert not misplaced_imports("import deepspeed", "distributed/prepare.py")
    unused = unused_allowances({"models/adapters.py": "import peft.utils", "distributed/prepare.py": "import peft"})
    assert "deepspeed in distributed/" in unused and "peft in checkpoint/weights.py" in unused
    assert "peft in models/adapters.py" not in unused
    assert heavy_top_imports("import torch\nfrom transformers import X") == ["transformers", "transformers.X"]
    assert heavy_top_imports("if TYPE_CHECKING:\n    import transformers\ndef f():\n    import datasets") == []
    assert private_imports("from finetune import Trainer, hidden", {"Trainer"}) == ["finetune.hidden"]
    assert private_imports("from finetune.engine import loop", set()) == ["finetune.engine.loop"]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_finetune_is_quick_and_leaves_the_heavy_packages_alone() -> None:
    code = """
import sys, time
start = time.perf_counter()
import finetune
seconds = time.perf_counter() - start
print(seconds, sorted({"torch", "transformers", "accelerate", "datasets", "numpy"} & set(sys.modules)))
"""
    # The best of three: the machine may be busy.
    outputs = [run_python(code).split(" ", 1) for _ in range(3)]
    assert min(float(seconds) for seconds, _ in outputs) < 0.3
    assert {heavy.strip() for _, heavy in outputs} == {"[]"}


def test_a_run_without_adapters_does_not_load_peft(tmp_path: Path) -> None:
    """transformers' trainer modules import it, and bitsandbytes with it: seconds of each start."""
    code = f"""
import sys, torch
from finetune import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {{"loss": ((self.layer(x) - labels) ** 2).mean()}}

rows = [{{"x": torch.ones(1), "labels": torch.zeros(1)}}] * 4
args = TrainingArguments({str(tmp_path)!r}, max_steps=2, save_steps=1, report_to="none", use_cpu=True)
trainer = Trainer(Model(), args, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
print(sorted({{"peft", "bitsandbytes", "transformers.trainer_utils"}} & set(sys.modules)))
"""
    assert run_python(code).splitlines()[-1] == "[]"


def test_importing_a_trainer_leaves_the_compiler_and_the_models_alone() -> None:
    code = """
import sys
from finetune import SequenceClassificationTrainer, SFTConfig, SFTTrainer, Trainer
print(sorted({"torch._dynamo", "torch._inductor", "sympy", "accelerate", "peft", "datasets", "trl"} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"


def test_help_does_not_import_torch() -> None:
    code = """
import sys
from finetune.cli.main import main
code = main(["--help"])
assert code == 0, code
print("loaded", sorted({"torch", "transformers", "accelerate", "datasets"} & set(sys.modules)))
"""
    output = run_python(code)
    assert "finetune sft" in output
    assert output.strip().endswith("loaded []")


def test_every_public_name_can_be_imported() -> None:
    import finetune

    for name in finetune.__all__:
        assert getattr(finetune, name) is not None


def test_type_checkers_see_the_names_that_are_imported_when_used() -> None:
    import finetune

    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    seen = {
        alias.asname: node.module for node in ast.walk(stub) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {name: f"finetune.{module}" for name, module in finetune._EXPORTS.items()}
    for name in finetune._EXPORTS:
        assert getattr(finetune, name).__name__ == name
