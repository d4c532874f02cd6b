"""Write the generated parts of README.md and docs/learning.md, between `<!-- NAME -->` and `<!-- end NAME -->`.

python tools/readme.py                       write the tables of what works, from the registries, and programs' output
python tools/readme.py --run runs/demo       the same, with the output and the picture of this run of the demo
python tools/readme.py --learned runs/recall the same, with the tables and pictures of these runs of examples/recall.py
python tools/readme.py --check               write nothing; exit code 1 if a page is not current
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
PAGES = ("README.md", "docs/learning.md")
LEARNED = ("recall", "parity", "parity-full")  # what examples/recall.py draws and prints


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


def printed(name: str) -> str:
    """What a program printed, from `docs/NAME.txt`."""
    return f"````text\n{(ROOT / 'docs' / f'{name}.txt').read_text(encoding='utf-8').rstrip()}\n````"


def parts(page: str) -> dict[str, str]:
    """The generated parts of a page."""
    if page == "README.md":
        return {"what works": f"{ops_table()}\n\n{classes_table()}", "demo": printed("demo")}
    return {name: printed(name) for name in LEARNED}


def filled(page: str, text: str) -> str:
    """The text of a page with every generated part written anew."""
    for name, content in parts(page).items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} must have one part '<!-- {name} -->' to '<!-- end {name} -->'")
        text = text[: text.index(begin) + len(begin)] + content + text[text.index(end) :]
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="the --out folder of a run of examples/train_and_generate.py")
    parser.add_argument("--learned", type=Path, help="the --out folder of runs of examples/recall.py")
    parser.add_argument("--check", action="store_true", help="only check whether the pages are current")
    args = parser.parse_args(argv)
    if args.run:
        shutil.copy(args.run / "report.txt", ROOT / "docs" / "demo.txt")
        shutil.copy(args.run / "loss.png", ROOT / "docs" / "loss.png")
    if args.learned:
        for name in LEARNED:
            for file in (args.learned / f"{name}{suffix}" for suffix in (".json", ".txt", ".png")):
                if file.exists():
                    shutil.copy(file, ROOT / "docs" / file.name)
    stale = 0
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = filled(page, before)
        if args.check:
            if before != after:
                print(f"{page} is not current: python tools/readme.py", file=sys.stderr)
            stale += before != after
        else:
            (ROOT / page).write_text(after, encoding="utf-8")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
