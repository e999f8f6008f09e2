"""tools/dev/check_layouts.py: what passes, what must not, and how it fails."""

import re

import check_layouts
import layout_matrix
import layout_runs
import pytest


def run(capfd, *argv):
    """Return exit status, output and errors of the command line."""
    status = check_layouts.main(list(argv))
    return status, *capfd.readouterr()


def test_rows_are_compared_and_written(capfd, tmp_path):
    page = tmp_path / "page.md"
    options = ("--steps", "2", "--models", "rope", "--markdown", str(page))
    status, out, _ = run(capfd, "--layouts", "TP2+SP", "PP2", *options)
    assert status == 0
    tensor, pipeline, summary = out.splitlines()[1:]
    names, loss, limit = tensor.split()[:4], *map(float, tensor.split()[4:6])
    assert names == ["TP2+SP", "2", "rope", "none"]
    assert loss <= limit == 1e-5
    assert tensor.endswith("equal")
    assert pipeline.split()[:5] == ["PP2", "2", "rope", "none", "0"]
    limit, norm = map(float, pipeline.split()[5:7])
    assert limit == (1e-5 if norm else 0)  # clipping by another norm rounds weights otherwise
    assert pipeline.endswith("  bit-equal")
    assert summary.startswith("2 rows: ")
    text = page.read_text()
    assert (
        f"    python tools/dev/check_layouts.py --layouts TP2+SP PP2 {' '.join(options)}\n" in text
    )
    assert re.search(r"megatron-core 0\.\d+.*, torch \d.*cores", text)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    rows = [row[1:-1] for row in rows if row[0] == "" and len(row) > 3]
    assert [row[0] for row in rows] == ["layout", "---", "TP2+SP", "PP2"]
    assert rows[3][-1] == "bit-equal"


def test_other_tokens_on_the_layout_are_noticed(capfd):
    other = "--layout-flags=--random-ltd-seed 7"
    status, out, _ = run(capfd, "--layouts", "TP2+fresh", "--steps", "1", other)
    assert status == 1
    row, summary = out.splitlines()[1:]
    assert row.endswith("OVER")
    assert summary == "1 rows: 1 OVER"
    loss, limit, _, plain, _ = map(float, row.split()[4:9])
    assert loss > 10 * limit
    assert plain < limit  # the flags are random-LTD's, so plain Megatron does not explain it


def test_what_megatron_refuses_is_no_pass(capfd):
    # 8 layers on 3 stages.
    status, out, _ = run(capfd, "--layouts", "PP3+fresh", "--steps", "1")
    assert status == 0
    row, summary = out.splitlines()[1:]
    assert "refused by Megatron: AssertionError: " in row
    assert "divisible" in row
    assert summary == "1 rows: 1 refused by Megatron"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layouts", "TP2xQP2"], "--layouts TP2xQP2: QP2 is none of TP2, PP2, VPP2, CP2, EP2"),
        (["--layouts", "TP2+"], "--layouts TP2+: an empty name is none of TP2"),
        (["--models", "ropes"], "--models ropes: choose of learned, rope, "),
        (["--features", "bf16+clips"], "--features clips: choose of none, recompute-uniform, "),
    ],
)
def test_unknown_names_are_one_clear_error(capfd, argv, message):
    status, out, err = run(capfd, *argv)
    assert (status, out) == (2, "")
    assert err.startswith(f"check_layouts: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("layout", "processes", "flags"),
    [
        ("1", 1, ""),
        ("EP2", 2, "--expert-model-parallel-size 2"),
        ("EP2xDP4", 4, "--expert-model-parallel-size 2"),
        ("DP2xCP2xTP2", 8, "--tensor-model-parallel-size 2 --context-parallel-size 2"),
        (
            "TP2+SPxPP2xVPP2+DO",
            4,
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
            "--num-virtual-stages-per-pipeline-rank 2 --sequence-parallel "
            "--use-distributed-optimizer",
        ),
    ],
)
def test_names_of_layouts(layout, processes, flags):
    assert layout_matrix.processes(layout) == processes
    assert layout_matrix.layout_flags(layout) == flags


def test_every_row_of_the_matrix_has_known_names_and_few_processes():
    rows = list(layout_matrix.blocks(layout_matrix.MATRIX))
    assert len(rows) > 100
    assert max(layout_matrix.processes(row.layout) for row in rows) == 8


def test_plain_megatron_gets_none_of_the_flags():
    line = "--lr 1 --random-ltd --random-ltd-layers 2,4 --bf16 --random-ltd-seed 7 --x y"
    assert layout_runs.without_random_ltd(line) == "--lr 1 --bf16 --x y"


@pytest.mark.parametrize(
    ("features", "numbers", "expected"),
    [
        # loss, norm, plain, plain_norm, limit
        (layout_matrix.NONE, (0.0, 0.0, None, None, 1e-5), layout_runs.EQUAL),
        (layout_matrix.NONE, (0.0, 1e-6, None, None, 1e-5), layout_runs.EQUAL),
        (layout_matrix.NONE, (1e-6, 1e-6, None, None, 1e-5), layout_runs.WITHIN),
        (layout_matrix.NONE, (1e-5, 1e-5, None, None, 1e-5), layout_runs.WITHIN),
        (layout_matrix.NONE, (1.1e-5, 0.0, None, None, 1e-5), layout_runs.OVER),
        (layout_matrix.NONE, (0.0, 1.1e-5, None, None, 1e-5), layout_runs.OVER),
        # Plain Megatron differs too, but half as much at least.
        (layout_matrix.NONE, (1e-3, 0.0, 5e-4, 0.0, 1e-5), layout_runs.AS_PLAIN),
        (layout_matrix.NONE, (1e-3, 0.0, 4e-4, 0.0, 1e-5), layout_runs.OVER),
        (layout_matrix.NONE, (0.0, 1e-3, 1.0, 4e-4, 1e-5), layout_runs.OVER),
        (layout_matrix.NONE, (None, None, 1e-3, 1e-3, 1e-5), layout_runs.FAILED),
        # Low precision is judged by plain Megatron, and not at all without its difference.
        ("bf16", (1e-3, 9.0, 5e-4, 0.0, 1e-3), layout_runs.WITHIN),
        ("bf16", (1e-3, 0.0, None, None, None), layout_runs.FAILED),
        ("bf16", (3e-3, 0.0, 1e-3, 0.0, 2e-3), layout_runs.OVER),
        # What must differ.
        ("other-seed", (1e-3, 1e-3, None, None, None), layout_runs.DIFFERS),
        ("other-seed", (9e-5, 1.0, None, None, None), layout_runs.UNNOTICED),
        ("other-seed", (None, None, None, None, None), layout_runs.FAILED),
    ],
)
def test_verdicts(features, numbers, expected):
    row = layout_matrix.Row("TP2", "gpt", features)
    names = ("loss", "norm", "plain", "plain_norm", "limit")
    result = layout_runs.Result(row, 2, **dict(zip(names, numbers, strict=True)))
    assert layout_runs._verdict(result) == expected


def test_a_difference_is_of_all_steps():
    assert layout_runs.difference([2.0, 1.0], [2.0, 1.25], 2) == pytest.approx(0.2)
    assert layout_runs.difference([2.0, 1.25], [2.0, 1.25], 2) == 0
    with pytest.raises(RuntimeError, match="1 and 2 steps were run, not 2"):
        layout_runs.difference([2.0], [2.0, 1.25], 2)
    with pytest.raises(RuntimeError, match="not finite"):
        layout_runs.difference([1.0, float("nan")], [1.0, 1.0], 2)
