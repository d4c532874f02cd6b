"""Every Python snippet of the pages runs and prints what it says; README's generated parts are current."""

import doctest
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
SNIPPET = re.compile(r"^```(?:python|pycon)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def snippets(page: Path) -> list[tuple[int, str]]:
    """Line number and text of every Python snippet of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in SNIPPET.finditer(text)]


def run_snippets(page: Path) -> list[str]:
    """Run a page's snippets in order, in one namespace; what `>>>` prints must be what follows it. The failures."""
    namespace: dict = {"__name__": "__main__"}
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    for line, source in snippets(page):
        where = f"{page.name}:{line}"
        if ">>>" in source:
            test = doctest.DocTestParser().get_doctest(source, namespace, where, str(page), line - 1)
            runner.run(test, out=failures.append, clear_globs=False)
            namespace.update(test.globs)
        else:
            exec(compile(source, where, "exec"), namespace)
    return failures


def with_snippets() -> list[Path]:
    return [page for page in PAGES if snippets(page)]


@pytest.mark.parametrize("page", with_snippets(), ids=lambda page: page.name)
def test_snippets_run_and_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failures = run_snippets(page)
    assert not failures, "\n".join(failures)


@pytest.mark.gpu
def test_serving_on_a_gpu(tmp_path, monkeypatch):
    """The page's step is a CUDA graph there, and every request still gets what it would have got alone."""
    assert torch.cuda.is_available(), "make test runs the pages without a GPU"
    test_snippets_run_and_print_what_they_say(ROOT / "docs" / "serving.md", tmp_path, monkeypatch)


def test_readme_has_an_op_a_layer_and_a_model():
    source = "\n".join(text for _, text in snippets(ROOT / "README.md"))
    for package in ("fla.ops", "fla.layers", "fla.models"):
        assert f"from {package} import" in source


def test_a_wrong_snippet_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> 1 + 1\n3\n\n```\n")
    assert len(run_snippets(page)) == 1
    page.write_text("```python\nraise KeyError\n```\n")
    with pytest.raises(KeyError):
        run_snippets(page)


@pytest.fixture(scope="module")
def readme() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_generated_parts_are_current(readme):
    assert readme.main(["--check"]) == 0, "run python tools/readme.py"


def test_every_op_form_is_in_the_table(readme):
    from fla.ops._spec import REGISTRY

    table = readme.ops_table()
    names = [function.__name__ for spec in REGISTRY.values() for function in spec.forms.values()]
    assert len(names) >= 4
    assert not [name for name in names if f"`{name}`" not in table]


def test_a_stale_page_is_noticed(readme, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("demo", *readme.LEARNED):
        (tmp_path / "docs" / f"{name}.txt").write_text(f"one {name}\n")
    learning = tmp_path / "docs" / "learning.md"
    learning.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in readme.LEARNED))
    (tmp_path / "README.md").write_text(
        "<!-- demo -->\n<!-- end demo -->\n<!-- what works -->\nold\n<!-- end what works -->\n"
    )
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    assert "````text\none demo\n````" in (tmp_path / "README.md").read_text()
    assert all(f"````text\none {name}\n````" in learning.read_text() for name in readme.LEARNED)
    learning.write_text(learning.read_text().replace("one parity\n", "two\n"))
    assert readme.main(["--check"]) == 1


def test_links_between_pages_lead_somewhere():
    dead = []
    for page in PAGES:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                dead.append(f"{page.name}: {target}")
    assert not dead


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert len(pages) >= 2
    assert pages <= set(LINK.findall(index))


def test_make_targets_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert {"demo", "test", "check", "test-gpu", "bench"} <= named & targets
    assert named <= targets


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 80
