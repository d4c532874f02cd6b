"""Kernels are written in what Triton 3.3 has, which PyTorch 2.7 comes with: it looks up every name of a kernel, also in
branches that are not compiled, and knows no chains of `and` or `or`.

The suite compiles with the pinned Triton alone, which would not notice.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = set((ROOT / "tests" / "snapshots" / "triton-language-3.3.txt").read_text().splitlines()[1:])
FILES = sorted((ROOT / "fla" / "backends" / "triton").rglob("*.py"))


def kernels(source: str) -> list[tuple[ast.FunctionDef, set[str]]]:
    """Every function under `@triton.jit`, and the names of `tl` that are there where it is defined: `if hasattr(tl,
    name):` around it says so."""
    found = []

    def visit(node: ast.AST, names: set[str]) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("hasattr(tl, "):
            for child in node.body:
                visit(child, names | {ast.literal_eval(node.test.args[1])})
            for child in node.orelse:
                visit(child, names)
            return
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
            found.append((node, names))
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(ast.parse(source), KNOWN)
    return found


def complaints(source: str) -> list[str]:
    said = []
    for kernel, names in kernels(source):
        for node in ast.walk(kernel):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tl" and node.attr not in names:
                said.append(f"{kernel.name}, line {node.lineno}: Triton 3.3 has no tl.{node.attr}")
            if isinstance(node, ast.BoolOp) and len(node.values) > 2:
                said.append(f"{kernel.name}, line {node.lineno}: Triton 3.3 wants parentheses: {ast.unparse(node)}")
    return said


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_use_what_the_oldest_triton_has(path):
    assert not complaints(path.read_text())


def test_what_it_lacks_is_found():
    body = "@triton.jit\ndef f(x, A, B, C):\n    if A and B and C:\n        return tl.make_tensor_descriptor(x)\n"
    assert len(complaints(body)) == 2
    guarded = "if hasattr(tl, 'make_tensor_descriptor'):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    assert len(complaints(guarded)) == 1
