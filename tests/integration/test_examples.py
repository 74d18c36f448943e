"""Every example runs as a user would run it. Each asserts what it shows."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    path for path in (ROOT / "examples").glob("*.py") if not path.stem.startswith("_")
)
#: Those that show a function, not a training: they are quick as they are.
SMALL = ("layer_norm", "accelerate_a_model", "pre_norm_transformer")


def run(path: Path, *options: str) -> str:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(path), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} == {
        *SMALL,
        "gpt",
        "masked_autoencoder",
        "masked_language_model",
        "neural_language_model",
        "recurrent_language_model",
        "sequence_parallel",
        "text_cnn",
        "translate_recurrent",
        "translate_transformer",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    options = () if path.stem in SMALL else ("--quick", "--out", str(tmp_path))
    output = run(path, *options)
    assert "difference" in output
    if path.stem not in SMALL:  # a bar that got to its end, and the time of a step
        assert "━━━━" in output
        assert "ms a step" in output
    picture = {"translate_recurrent": "attention.png", "masked_autoencoder": "imagined.png"}
    assert [file.name for file in tmp_path.iterdir()] == [
        name for stem, name in picture.items() if stem == path.stem
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem not in SMALL], ids=lambda path: path.stem
)
def test_example_learns(path, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "difference" in run(path, "--out", str(tmp_path))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, which another's work does not lengthen.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < (80 if path.stem in SMALL else 120)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_in_the_readme(path):
    assert f"[{path.stem}]({path.name})" in (ROOT / "examples" / "README.md").read_text()
