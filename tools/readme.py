"""Write the generated parts of README.md, between the lines `<!-- NAME -->` and `<!-- end NAME -->`.

python tools/readme.py                  write the tables of what works, from the registries, and the demo's output
python tools/readme.py --run runs/demo  the same, with the output and the picture of this run of the demo
python tools/readme.py --check          write nothing; exit code 1 if README.md is not current
"""

import argparse
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BACKENDS = ("torch", "triton")


def public(package: str, suffix: str = "") -> list[str]:
    """The public class names of a package that end in `suffix`, sorted."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return sorted(name for name in names if name.endswith(suffix) and isinstance(getattr(module, name), type))


def ops_table() -> str:
    """One row per registered op: its forms, its backends, and what does not work yet in the words of its spec."""
    import fla.ops  # noqa: F401  registers them
    from fla.ops._spec import REGISTRY

    rows = [
        "| op | forms | torch backend (CPU, GPU) | Triton backend (GPU) | not yet |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, spec in sorted(REGISTRY.items()):
        link = f"[`{name}`]({spec.paper})" if spec.paper else f"`{name}`"
        forms = ", ".join(f"`{function.__name__}`" for function in spec.forms.values())
        runs = [importlib.util.find_spec(f"fla.backends.{backend}.{spec.family}") is not None for backend in BACKENDS]
        gaps = "; ".join(f"{what}: {why}" for what, why in spec.gaps.items())
        rows.append(f"| {link} | {forms} | {' | '.join('yes' if r else 'not yet' for r in runs)} | {gaps} |")
    return "\n".join(rows)


def classes_table() -> str:
    """The classes of layers, models and modules that can be imported."""
    layers = [name for name in public("fla.layers") if name != "TokenMixer"]
    lists = {
        "fla.layers": layers,
        "fla.models": public("fla.models", "ForCausalLM"),
        "fla.modules": public("fla.modules"),
    }
    rows = ["| import from | classes |", "| --- | --- |"]
    rows += [f"| `{package}` | {', '.join(f'`{name}`' for name in names)} |" for package, names in lists.items()]
    return "\n".join(rows)


def demo_block() -> str:
    return f"````text\n{(ROOT / 'docs' / 'demo.txt').read_text(encoding='utf-8').rstrip()}\n````"


def filled(text: str) -> str:
    """The text of README.md with every generated part written anew."""
    parts = {"what works": f"{ops_table()}\n\n{classes_table()}", "demo": demo_block()}
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must have one part '<!-- {name} -->' to '<!-- end {name} -->'")
        text = text[: text.index(begin) + len(begin)] + content + text[text.index(end) :]
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="the --out folder of a run of examples/train_and_generate.py")
    parser.add_argument("--check", action="store_true", help="only check whether README.md is current")
    args = parser.parse_args(argv)
    if args.run:
        shutil.copy(args.run / "report.txt", ROOT / "docs" / "demo.txt")
        shutil.copy(args.run / "loss.png", ROOT / "docs" / "loss.png")
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before)
    if args.check:
        if before != after:
            print("README.md is not current: python tools/readme.py", file=sys.stderr)
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
