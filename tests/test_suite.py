"""How the suite itself is run: its two halves, which tests an op touches, where the seconds go, and a GPU's workers."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fla import layers
from fla.models import GLAConfig, GLAForCausalLM
from fla.ops import chunk_gla
from fla.ops._spec import REGISTRY
from fla.testing import TORCH, plain_cases
from tests import times, touching
from tests.gpu.compiling import one_at_a_time
from tests.touching import Part

ROOT = Path(__file__).resolve().parent.parent
SOME_TESTS = """
import pytest

@pytest.mark.parametrize("op", ["gla", "retention", "gla"])
def test_an_op(op):
    pass

def test_of_no_op():
    pass

@pytest.mark.touches("decay")
def test_of_a_family():
    pass
"""


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("suite", ROOT / "tools" / "suite.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["suite"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["suite"]


@pytest.fixture
def folder(tmp_path):
    """A small suite of its own, with this one's settings."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    return tmp_path


def run_pytest(suite, folder: Path, jobs: int, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """pytest as the suite runs it, on another folder."""
    given = [sys.executable, "-m", "pytest", *suite.in_processes(jobs), "-p", "no:cacheprovider", *words, "."]
    environment = suite.environment(suite.Half("some", [], {"PYTHONPATH": str(ROOT), **variables}))
    return subprocess.run(given, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


# ---- the halves


def test_the_two_halves_are_the_whole_suite(suite):
    compiled, interpreted = suite.halves(gpu=False, everything=False)
    assert compiled.arguments[-2:] == ["--ignore=tests/triton_interpreter", "tests"] and not compiled.environment
    assert interpreted.arguments[-1] == "tests/triton_interpreter"
    assert suite.environment(interpreted)["TRITON_INTERPRET"] == "1"
    for half in (compiled, interpreted):
        assert half.arguments[:2] == ["-m", "not gpu and not exhaustive"]
    assert [half.arguments[:2] for half in suite.halves(False, True)] == [["-m", "not gpu"]] * 2


def test_a_half_runs_without_what_only_the_other_one_needs(suite, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in suite.environment(suite.halves(False, False)[0])


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([1, 0], 1), ([0, 1], 1), ([2, 0], 1), ([0, -11], 1), ([5, 0], 1)],
    ids=str,
)
def test_both_halves_run_and_the_exit_code_is_of_both(suite, monkeypatch, capsys, codes, expected):
    """The second half runs whatever the first one ends with: a failure, an error of collection, a crash, no test."""
    ran = []

    def run(command, **keywords):
        ran.append(command)
        return SimpleNamespace(returncode=codes[len(ran) - 1])

    monkeypatch.setattr(suite.subprocess, "run", run)
    assert suite.run(suite.halves(False, False), 2, "", []) == expected
    assert len(ran) == 2 and "tests/triton_interpreter" in ran[1]
    assert ("FAILED" in capsys.readouterr().out) == bool(expected)


@pytest.mark.parametrize(("codes", "expected"), [([0, 5], 0), ([5, 5], 1)], ids=str)
def test_an_op_may_touch_nothing_in_one_half(suite, monkeypatch, codes, expected):
    ran = iter(codes)
    monkeypatch.setattr(suite.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=next(ran)))
    assert suite.run(suite.halves(False, False), 2, "gla", []) == expected


def test_ctrl_c_stops_both(suite, monkeypatch, capsys):
    def run(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite.subprocess, "run", run)
    assert suite.main([]) == 130


@pytest.mark.parametrize("words", ([], ["--all"], ["--gpu"]), ids=str)
def test_an_unknown_op_is_told_before_anything_runs(suite, monkeypatch, capsys, words):
    monkeypatch.setattr(suite, "run", lambda *_: pytest.fail("it ran"))
    assert suite.main([*words, "--ops", "gla,glaa"]) == 2
    said = capsys.readouterr().err
    assert "got glaa" in said and all(op in said for op in REGISTRY)


def test_make_targets_reach_the_suite():
    def commands(*words: str) -> str:
        given = ["make", "-n", *words]
        said = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return " ".join(said.split())

    assert "tools/suite.py" in commands("test")
    assert '--ops "gla,retention"' in commands("test", "OPS=gla,retention")
    assert '--ops "gla" --all' in commands("test-all", "OPS=gla")
    assert '--ops "gla" --gpu -x' in commands("test-gpu", "OPS=gla", "ARGS=-x")
    assert "--jobs 3" in commands("test", "JOBS=3")


# ---- what touches an op


def test_layers_and_models_hang_on_ops_by_registration():
    assert touching.ops_of(Part("layer", "GatedLinearAttention")) == {"gla"}
    assert touching.ops_of(Part("layer", "Attention")) == set()
    assert touching.ops_of(Part("model", "retnet")) == {"retention"}
    assert touching.ops_of(Part("model", "transformer")) == set()
    assert {"gla", "retention"} <= touching.ops_of(Part("family", "decay"))
    reached = {op for name in touching.layers() for op in touching.ops_of(Part("layer", name))}
    assert reached == set(REGISTRY) - {"dplr", "iplr"}, (
        "an op without a layer, or a layer whose `forms` hold other functions"
    )


CASE = plain_cases(REGISTRY["gla"], TORCH)[0]


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("case", CASE, ("op", "gla")),
        ("bad", SimpleNamespace(case=CASE), ("op", "gla")),
        ("spec", REGISTRY["gla"], ("op", "gla")),
        ("function", chunk_gla, ("op", "gla")),
        ("op", "gla", ("op", "gla")),
        ("model_type", "gla", ("model", "gla")),
        ("model", "gla", ("model", "gla")),
        ("layer", "GatedLinearAttention", ("layer", "GatedLinearAttention")),
        ("case", SimpleNamespace(cls=layers.GatedLinearAttention), ("layer", "GatedLinearAttention")),
        ("model_class", GLAForCausalLM, ("model", "gla")),
        ("config_class", GLAConfig, ("model", "gla")),
        ("variant", SimpleNamespace(family="decay"), ("family", "decay")),
        ("gates", "gla", None),
        ("tokens", 65, None),
        ("kernel", len, None),
    ],
)
def test_what_a_parameter_names(argument, value, expected):
    assert touching.of_value(argument, value) == ({Part(*expected)} if expected else set())


def a_test_without_parameters():
    assert [chunk_gla for _ in "1"]


def test_what_a_body_names():
    item = SimpleNamespace(
        iter_markers=lambda name: [], module=sys.modules[__name__], function=a_test_without_parameters
    )
    assert not touching.said_of(item) and touching.used_by(item) == {Part("op", "gla")}


def test_a_key_of_the_file_s_cases_stands_for_its_case():
    module = SimpleNamespace(CASES={"wide": SimpleNamespace(cls=layers.GatedLinearAttention)})
    item = SimpleNamespace(iter_markers=lambda name: [], module=module, callspec=SimpleNamespace(params={"x": "wide"}))
    assert touching.said_of(item) == {Part("layer", "GatedLinearAttention")}


def test_a_test_is_counted_once():
    parts = {Part("op", "gla"), Part("model", "gla"), Part("layer", "Attention")}
    assert touching.counted_under(parts) == [Part("model", "gla")]
    assert touching.counted_under([]) == []
    assert times.place("tests/ops/test_step.py::test_pool[x/y]") == "tests/ops"
    assert times.place("tests/test_host.py::test_x") == "tests/test_host.py"


# ---- seconds


def test_tests_of_chosen_ops_are_run_and_counted_over_workers(suite, folder):
    done = run_pytest(suite, folder, 2, "-p", "tests.times", "--times=times.json", "--ops=retention")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    found = suite.joined([folder / "times.json", folder / "missing.json"])
    assert {part: tests for part, (_, tests) in found.items()} == {("op", "retention"): 1, ("family", "decay"): 1}
    assert all(seconds > 0 for seconds, _ in found.values())


def test_an_unknown_op_ends_the_collection():
    with pytest.raises(pytest.UsageError, match=r"OPS must name ops among .*gla.*, got nothing"):
        times.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: "gla,nothing"), [])


def test_seconds_of_all_phases_are_added_up_and_shared(tmp_path):
    adding = times.Times(tmp_path / "times.json")
    two, none = [(times.PROPERTY, [("op", "gla"), ("op", "retention")])], []
    for when, properties in (("setup", two), ("call", two), ("teardown", two), ("call", none)):
        report = SimpleNamespace(nodeid="tests/a.py::test", duration=1.0, when=when, user_properties=properties)
        adding.pytest_runtest_logreport(report)
    adding.pytest_sessionfinish()
    assert json.loads((tmp_path / "times.json").read_text()) == [
        ["op", "gla", 1.5, 0.5],
        ["op", "retention", 1.5, 0.5],
        ["rest", "tests/a.py", 1.0, 1.0],
    ]


def test_the_table(suite, tmp_path):
    halves = (
        [["op", "gla", 10.0, 5], ["rest", "tests/modules", 7.0, 2]],
        [["op", "gla", 2.5, 1], ["op", "retention", 20.0, 8], ["model", "gla", 3.0, 1], ["rest", "a", 1, 1]],
    )
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, rows in zip(files, halves, strict=True):
        file.write_text(json.dumps(rows))
    lines = [line.split() for line in suite.table(suite.joined(files)).splitlines()]
    assert [line[:-4] for line in lines] == [
        ["op", "retention"], ["op", "gla"], ["model", "gla"], ["the", "rest", "tests/modules"], ["the", "rest", "a"],
        ["all"],
    ]  # fmt: skip
    assert lines[1][-4:] == ["12.5", "s", "6", "tests"] and lines[-1][-4:] == ["43.5", "s", "18", "tests"]


# ---- plugins, workers, kernels


@pytest.fixture
def loud(tmp_path_factory) -> str:
    """A folder with an installed plugin of pytest that warns as soon as it is there."""
    folder = tmp_path_factory.mktemp("loud")
    (folder / "loud_plugin.py").write_text("import warnings\ndef pytest_configure():\n    warnings.warn('loud')\n")
    (folder / "loud-1.0.dist-info").mkdir()
    (folder / "loud-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (folder / "loud-1.0.dist-info" / "entry_points.txt").write_text("[pytest11]\nloud = loud_plugin\n")
    return os.pathsep.join((str(ROOT), str(folder)))


def test_what_other_plugins_warn_of_is_not_ours(suite, folder, loud):
    """A warning of another plugin would otherwise end the run. In our own tests a warning is an error."""
    done = run_pytest(suite, folder, 1, "-k", "no_op", PYTHONPATH=loud)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    done = run_pytest(suite, folder, 1, "-k", "no_op", "-p", "loud_plugin", PYTHONPATH=loud)
    assert done.returncode > 1 and "loud" in done.stdout + done.stderr
    (folder / "test_some.py").write_text("import warnings\ndef test_warning():\n    warnings.warn('ours')\n")
    assert run_pytest(suite, folder, 1, PYTHONPATH=loud).returncode == 1


def test_without_xdist_it_says_so_and_runs_serially(suite, monkeypatch, capsys):
    assert suite.in_processes(3)[:4] == ["-p", "xdist.plugin", "-n", "3"]
    monkeypatch.setattr(suite, "has_xdist", lambda: False)
    assert suite.in_processes(3) == []
    assert "pytest-xdist is not installed" in capsys.readouterr().out
    assert suite.in_processes(1) == [] and not capsys.readouterr().out


def test_processes_follow_from_cores(suite, monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "run", lambda halves, jobs, *_: asked.append(jobs) or 0)
    monkeypatch.setattr(suite, "check_gpu", lambda: None)
    for count in (1, 2, 16, 128):
        monkeypatch.setattr(suite, "cores", lambda count=count: count)
        for words in ([], ["--gpu"], ["--jobs", "5"]):
            assert suite.main(words) == 0
    assert asked == [1, 1, 5, 2, 1, 5, 8, 14, 5, 8, 14, 5]


def test_the_gpu_suite_is_every_file_with_tests_for_a_gpu(suite):
    (half,) = suite.halves(gpu=True, everything=False)
    assert half.arguments[:3] == ["-m", "gpu and not exhaustive", "tests/gpu"]
    assert "tests/test_docs.py" in half.arguments and "tests/test_suite.py" not in half.arguments


def test_without_a_gpu_the_gpu_suite_says_so(suite, monkeypatch, capsys):
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert suite.main(["--gpu"]) == 2
    assert "sees a GPU" in capsys.readouterr().err


class Source:
    """A kernel as Triton's compiler is given it."""

    def __init__(self, name: str):
        self.name = name

    def hash(self) -> str:
        return self.name


def test_workers_compile_a_kernel_once(tmp_path):
    """Four at once: one compiles, the others wait and find it. Another kernel, and other options, wait for nobody."""
    done, made = tmp_path / "done", []
    others_are_through, begun = threading.Event(), threading.Event()

    def compile(source, target, options):
        if source.name == "slow" and not done.exists():
            begun.set()
            assert others_are_through.wait(60)
            done.touch()
            made.append(source.name)
        return source.name, options["num_warps"]

    def call(name: str, warps: int):
        return one_at_a_time(compile, tmp_path / "locks")(Source(name), target="sm_90", options={"num_warps": warps})

    workers = [threading.Thread(target=call, args=("slow", 4)) for _ in range(4)]
    workers[0].start()
    assert begun.wait(60)
    for worker in workers[1:]:
        worker.start()
    assert call("quick", 4) == ("quick", 4)
    others_are_through.set()
    for worker in workers:
        worker.join(60)
    assert made == ["slow"] and call("slow", 8) == ("slow", 8)
