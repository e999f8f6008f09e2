"""The scripts of examples/vit_finetune: the paper's runs by their plans, and the smoke run."""

import json
import re
import subprocess

import pytest

from tests.commands.test_plan_command import command as plan
from tests.parallel import ROOT
from tests.scripts.gpt3_scripts import LIB, environment, settings_of

FOLDER = ROOT / "examples" / "vit_finetune"
SETTINGS = settings_of(FOLDER / "finetune.sh", LIB / "settings.sh")


def bash(script, **settings):
    """Run a script to its end; return exit status and output."""
    kept = {k: v for k, v in environment(**settings).items() if k in settings or k not in SETTINGS}
    result = subprocess.run(
        ["bash", str(FOLDER / f"{script}.sh")],
        env={"PYTHON": environment()["PYTHON"], **kept},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return result.returncode, result.stdout


# {script: (iterations, LayerTokens as a share of dense, the paper's figure)}
PUBLISHED = {"cifar_ltd": (5_468, 0.738), "imagenet_ltd": (70_063, 0.777)}


@pytest.mark.parametrize("script", PUBLISHED)
def test_plans_are_those_of_the_paper(script):
    status, output = plan(["--json", "--gpus", "1", "--from", str(FOLDER / f"{script}.sh")])
    assert status == 0, output
    runs = json.loads(output)["runs"]
    iterations, share = PUBLISHED[script]
    assert runs["run"]["iterations"] == iterations
    dense = runs["same_samples"]["layer_tokens"]
    assert runs["run"]["layer_tokens"] / dense == pytest.approx(share, abs=5e-4)


def test_dense_and_random_ltd_differ_in_nothing_else():
    for task in ("cifar", "imagenet"):
        dense, ltd = (
            bash(f"{task}_{method}", DRY_RUN="1", RUN_DIR="/runs/vit")[1].splitlines()[-1].split()
            for method in ("dense", "ltd")
        )
        more = [word for word in ltd if word.startswith("--") and word not in dense]
        assert more and all(word.startswith("--random-ltd") for word in more)
        first = ltd.index(more[0])
        assert ltd[:first] == dense[:first]
        assert dense[first:] == ltd[len(ltd) - len(dense[first:]) :]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PP": "2"}, "a ViT has no pipeline stages"),
        ({"TASK": "mnist"}, "TASK=mnist is not cifar10, cifar100 or imagenet"),
        ({"START_FROM": "none"}, "DATA is not set"),
        ({"DATA": "/nowhere"}, "DATA=/nowhere is not a folder"),
        ({"DATA": "/tmp"}, "START_FROM is not set: give the weights"),
        ({"WORKERS": "many"}, "WORKERS=many is not a whole number"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    status, output = bash("cifar_ltd", PROCESSES="1", **settings)
    assert status == 2 and said in output, output


def test_every_documented_setting_is_read():
    code = re.sub(r"^#.*\n", "", (FOLDER / "finetune.sh").read_text(), flags=re.MULTILINE)
    for setting in settings_of(FOLDER / "finetune.sh") - {"DRY_RUN"}:
        assert re.search(rf"\b{setting}\b", code), setting


def test_smoke_ends_with_accuracies_of_both(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    status, output = bash(
        "all", SCALE="smoke", EPOCHS="1", RUNS=tmp_path / "runs", DATA=tmp_path / "digits"
    )
    assert status == 0, output[-3000:]
    assert output.count("finished: iteration 44 of 44") == 2
    assert "1,438 images of 10 classes, and 359 for validation" in output
    heading, *rows = output[output.rindex("\nrun  ") :].strip().splitlines()[:3]
    assert heading.split("  ")[-1].strip() == "val. accuracy"
    shares = {row.split()[0]: float(row.split()[-1].rstrip("%")) for row in rows}
    assert set(shares) == {"dense", "ltd"}
    for share in shares.values():
        assert 10 < share <= 100
