"""What DESIGN.md promises about the code itself: imports, sizes, forbidden things, public names, and what adding costs.

`python -m tests.test_architecture` writes `tests/snapshots/public_names.txt`; a change of it is reviewed like code.
"""

import ast
import difflib
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import toys

ROOT = Path(__file__).parents[1]
FOLDERS = ("fla", "tests", "benchmarks", "examples", "tools")
LIBRARY = sorted((ROOT / "fla").rglob("*.py"))
ALL = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NAMES = ROOT / "tests" / "snapshots" / "public_names.txt"
PACKAGES = ("fla", "fla.ops", "fla.modules", "fla.layers", "fla.models")
PUBLIC = (*PACKAGES, "fla.varlen", "fla.utils", "fla.compat", "fla.ops.utils", "fla.testing")

# what a part of the library may import of the others; `shapes`, `varlen`, `utils` and `_names` are leaves
MAY_IMPORT = {
    "varlen": (),
    "shapes": (),
    "utils": ("_version",),
    "_names": (),
    "ops._spec": ("ops._spec", "_names"),
    "backends": ("backends", "varlen", "shapes"),
    "ops": ("ops", "ops._spec", "shapes", "backends", "varlen", "_names"),
    "modules": ("modules", "shapes", "backends", "varlen", "_names"),
    "layers": ("layers", "modules", "ops", "ops._spec", "shapes", "backends", "varlen"),
    "models": ("models", "layers", "modules", "ops", "ops._spec", "shapes", "backends", "varlen", "_names"),
    "testing": ("testing", "ops", "ops._spec", "shapes", "backends", "varlen"),
    "compat": ("compat", "modules", "shapes", "_names"),
    "_auto": (),
    "_version": (),
    "": ("_auto", "_version", "backends", "varlen"),
}
OPTIONAL = {"transformers": "fla/models/", "triton": "fla/backends/triton/"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            folder = ROOT / base.replace(".", "/")
            for alias in node.names:
                inside = (folder / alias.name).is_dir() or (folder / f"{alias.name}.py").exists()
                found.add(f"{base}.{alias.name}" if inside else base)
    return found


def part(module: str) -> str:
    """The part of the library that a module belongs to: a key of MAY_IMPORT."""
    names = module.split(".")[1:]
    if names[:2] in (["ops", "_spec"], ["ops", "_names"]):
        return "ops._spec"
    return names[0] if names and names[0] in MAY_IMPORT else ""


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_imports_go_one_way(path):
    here, found = part(module_name(path)), imports(path)
    for module in sorted(name for name in found if name.split(".")[0] == "fla"):
        there = part(module)
        if there or module == "fla":
            assert there in MAY_IMPORT[here] or (there == here and there), f"{relative(path)} imports {module}"
        backend = module.split(".")[1:3]
        if backend[:1] == ["backends"] and here != "backends":
            assert backend[-1] not in ("torch", "triton"), f"{relative(path)} names a backend: {module}"
    for package, home in OPTIONAL.items():
        if any(name.split(".")[0] == package for name in found):
            assert relative(path).startswith(home), f"{relative(path)} imports {package}; only {home} may"
    assert not any(name.split(".")[0] in ("einops", "flash_attn", "causal_conv1d", "numpy") for name in found)


def python(code: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_budget():
    """`import fla` adds under 0.1 s of processor time, loads neither Triton nor transformers, touches no GPU."""
    code = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import fla
spent = time.process_time() - start
heavy = [m for m in sys.modules if m not in before and m.split(".")[0] in ("triton", "transformers", "numpy")]
print(spent, heavy, torch.cuda.is_initialized())
"""
    runs = [python(code).split(maxsplit=1) for _ in range(3)]
    assert {rest.strip() for _, rest in runs} == {"[] False"}
    assert min(float(spent) for spent, _ in runs) < 0.1


def test_ops_modules_and_layers_run_without_triton_and_transformers():
    python("""
import sys, torch
loaded = set(sys.modules)
for name in ("triton", "transformers"):
    sys.modules[name] = None
import fla.layers, fla.modules, fla.ops
layer = fla.layers.GatedLinearAttention(hidden_size=32, num_heads=2)
layer(torch.randn(1, 5, 32))[0].sum().backward()
""")


def functions(path: Path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def is_kernel(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_sizes(path):
    lines = path.read_text().count("\n")
    assert lines < 500, f"{relative(path)} has {lines} lines, the bar is 500"
    name = relative(path)
    if name.startswith("fla/models/") and not path.name.startswith("_") and path.name not in ("cache.py", "utils.py"):
        assert lines < 80, f"{name} has {lines} lines, a model file's bar is 80"
    for node in functions(path):
        length, kernel = node.end_lineno - node.lineno + 1, is_kernel(node)
        bar = 120 if kernel else 80
        assert length < bar, f"{name}: {node.name} has {length} lines, the bar is {bar}"
        if kernel:
            arguments = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            assert arguments <= 20, f"{name}: kernel {node.name} has {arguments} arguments, the bar is 20"


def test_public_ops_have_at_most_16_parameters_and_no_var_keywords():
    import fla.ops
    from fla.ops._spec import REGISTRY

    assert fla.ops and REGISTRY
    for spec in REGISTRY.values():
        for function in spec.forms.values():
            found = inspect.signature(function).parameters
            bar = spec.parameters  # of `OpSpec`: 16, but where other programs' calls set a form's parameters
            assert len(found) <= bar, f"{function.__name__} has {len(found)} parameters, the bar is {bar}"
            kinds = {parameter.kind for parameter in found.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
            last = list(found.values())[-1]
            assert (last.name, last.kind, last.default) == ("backend", inspect.Parameter.KEYWORD_ONLY, None)


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_nothing_forbidden(path):
    """No block pointers, no timing-based tuning, no atomics; three environment variables of our own, and Triton's."""
    for node in ast.walk(tree(path)):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in ("make_block_ptr", "autotune"), f"{relative(path)} uses {name}"
        assert not name.startswith("atomic_"), f"{relative(path)} uses {name}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv", "os.environ.pop"):
            variable = ast.literal_eval(node.args[0])
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            variable = ast.literal_eval(node.slice)
        else:
            continue
        allowed = ("FLA_BACKEND", "FLA_AUTOTUNE", "FLA_CACHE_DIR", "TRITON_INTERPRET")
        assert variable in allowed, f"{relative(path)} reads the environment variable {variable}"


def public_names() -> str:
    """Names of the public modules, with the parameters of ops, one a line."""
    lines = []
    for module in map(importlib.import_module, PUBLIC):
        listed = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in sorted(listed):
            value = getattr(module, name)
            if isinstance(value, ModuleType) or getattr(value, "__module__", "fla").split(".")[0] != "fla":
                continue
            lines.append(f"{module.__name__}.{name}" + (f"({_parameters(value)})" if is_op(value) else ""))
    return "\n".join(lines) + "\n"


def _parameters(function) -> str:
    """Names and defaults, with the star that keyword-only ones stand behind."""
    shown: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(parameter.name + default)
    return ", ".join(shown)


def is_op(value) -> bool:
    return inspect.isfunction(value) and value.__module__.startswith("fla.ops.")


def test_public_names():
    expected, actual = NAMES.read_text(), public_names()
    if expected != actual:
        diff = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "committed", "now", lineterm="")
        pytest.fail("if meant, run `python -m tests.test_architecture` and review the diff\n" + "\n".join(diff))


@pytest.fixture
def scratch(tmp_path) -> Path:
    """A copy of the project to add to."""
    for folder in ("fla", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def add(path: Path, text: str, line: str) -> None:
    """One new file, and one line in the list beside it."""
    path.write_text(text)
    listing = path.with_name("__init__.py")
    listing.write_text(listing.read_text() + line)


def suite(scratch: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", *arguments]
    return subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=600, **options)


def passed(done: subprocess.CompletedProcess) -> int:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(int(line.split()[0]) for line in done.stdout.splitlines() if " passed" in line)


@pytest.mark.slow
def test_an_op_is_one_file_and_one_line(scratch):
    """The suite finds, runs and passes it; and fails it when it computes something else than its reference."""
    add(scratch / "fla/ops/toy.py", toys.OP, toys.OP_LINE)
    only = ("tests/ops/test_contract.py", "-m", "not exhaustive", "-k")
    assert passed(suite(scratch, *only, "toy and not compiles and not gradcheck")) > 100
    (scratch / "fla/ops/toy.py").write_text(toys.OP.replace("FORGET = 0.5", "FORGET = 0.5001"))
    wrong = suite(scratch, *only, "toy and (values or ways)", "-x")
    assert wrong.returncode == 1 and "over the budget" in wrong.stdout


def failed(done: subprocess.CompletedProcess) -> set[str]:
    """The tests that a suite refused, without their files."""
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    return {line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}


def change(path: Path, old: str, new: str) -> None:
    """Replace what stands in a file once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


QUICK = ("-m", "not exhaustive")


@pytest.mark.slow
def test_a_layer_is_one_file_and_one_line(scratch):
    """A mixer without heads and with one convolution passes; one that forgets its past does not."""
    file = scratch / "fla/layers/toy.py"
    add(file, toys.LAYER, toys.LAYER_LINE)
    only = ("tests/layers/test_contract.py", "tests/layers/test_layers.py", "-k", "toy or Toy")
    assert passed(suite(scratch, *only, *QUICK)) > 40
    change(file, 'call.state.get("recurrent_state")', "None")
    refused = failed(suite(scratch, *only[:2], "-k", "toy and (row_alone or token_by_token)"))
    assert refused == {"test_token_by_token[toy]", "test_token_by_token[toy-wide]"}


@pytest.mark.slow
def test_a_family_without_heads_is_one_file_and_one_of_each_backend(scratch):
    """Its op, one file and one line, passes all that an op must; suites of a backend that lacks it say so."""
    assert toys.SCAN_FAMILY.count("\n") <= 80
    (scratch / "fla/backends/toyscan.py").write_text(toys.SCAN_FAMILY)
    (scratch / "fla/backends/torch/toyscan.py").write_text(toys.SCAN_TORCH)
    add(scratch / "fla/ops/toyscan.py", toys.SCAN_OP, toys.SCAN_LINE)
    assert passed(suite(scratch, "tests/ops", "-k", "toyscan", "-m", "not exhaustive")) > 150
    interpreting = {**os.environ, "TRITON_INTERPRET": "1"}
    said = suite(
        scratch, "tests/triton_interpreter/test_ops.py", "-k", "bad_calls", "-m", "not exhaustive", env=interpreting
    )
    assert passed(said) > 100
    assert "no Triton backend: toyscan (toyscan)" in said.stdout


@pytest.mark.slow
def test_a_model_is_one_file_and_one_line(scratch):
    """A model that hands its layers values and a carry passes, with both kinds of gradient checkpointing."""
    assert toys.MODEL.count("\n") < 80
    add(scratch / "fla/layers/toy.py", toys.LAYER, toys.LAYER_LINE)
    add(scratch / "fla/models/toy.py", toys.MODEL, toys.MODEL_LINE)
    files = ("contract", "generation", "config", "loading")
    assert passed(suite(scratch, *(f"tests/models/test_{name}.py" for name in files), "-k", "toy", *QUICK)) > 50


@pytest.mark.slow
def test_a_model_whose_layers_get_the_wrong_tensors_is_refused(scratch):
    """Values of other layers, tensors that re-entrant checkpointing cannot see, and a block that loses its carry."""
    add(scratch / "fla/layers/toy.py", toys.LAYER, toys.LAYER_LINE)
    add(scratch / "fla/models/toy.py", toys.MODEL, toys.MODEL_LINE)
    losing = toys.MODEL.replace('"toy"', '"losing"').replace("Toy", "Losing").replace("LosingMixer", "ToyMixer")
    block = "    mixer_cls, mlp_cls = ToyMixer, LosingMLP\n"
    loss = "\n    def forward(self, *args, **kwargs):\n        return super().forward(*args, **kwargs)[:3]\n"
    line = toys.MODEL_LINE.replace(".toy", ".losing").replace("Toy", "Losing")
    add(scratch / "fla/models/losing.py", losing.replace(block, block + loss), line)
    decoder = scratch / "fla/models/_decoder.py"
    change(decoder, "zip(self.layers, self.layer_inputs(), strict=True)", "zip(self.layers, self.layer_inputs()[::-1])")
    change(
        decoder, "False, *carry, *extra, **packing", "False, *carry, **packing, **block.attn.named_inputs(None, extra)"
    )
    tests = "what_reaches or checkpointing or forward_and_backward"
    refused = failed(
        suite(scratch, "tests/models/test_contract.py", "-k", f"({tests}) and (toy or losing) and not hybrid")
    )
    assert refused == {
        "test_what_reaches_every_layer[toy]",
        "test_what_reaches_every_layer[losing]",
        "test_gradient_checkpointing_keeps_the_gradients[True-toy]",
        "test_gradient_checkpointing_keeps_the_gradients[True-losing]",
        "test_gradient_checkpointing_keeps_the_gradients[False-losing]",
        "test_forward_and_backward[losing]",
    }


if __name__ == "__main__":
    NAMES.parent.mkdir(exist_ok=True)
    NAMES.write_text(public_names())
