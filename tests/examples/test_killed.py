"""A run that is killed and started again ends as one that was left alone, bit for bit."""

import signal
from pathlib import Path

from forked import exit_codes
from killed_run import CONFIG, main

from mumoe_fast.examples._checkpoints import complete_checkpoints
from mumoe_fast.examples._run import LOG, read_log


def run(folder: Path, place: str) -> int | None:
    """The exit code of a process of its own."""
    (code,) = exit_codes(main, [(folder, place)])
    return code


def done(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(folder)]


def test_losses_are_those_of_a_run_that_was_left_alone(tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert run(alone, "nowhere") == 0
    # In the middle of a step, of a file of the checkpoint after step 8, before its renaming, and of a step again.
    for place, steps, left in (("6", 6, [4]), ("writing", 8, [4]), ("renaming", 8, [4]), ("10", 10, [4, 8])):
        assert run(killed, place) == -signal.SIGKILL
        assert len(read_log(killed)) == steps
        assert done(killed) == left
    assert run(killed, "nowhere") == 0
    expected, actual = read_log(alone), read_log(killed)
    assert [record.step for record in actual] == list(range(1, CONFIG.steps + 1))
    assert [record.loss for record in actual] == [record.loss for record in expected]
    assert [record.figures for record in actual] == [record.figures for record in expected]
    assert len({record.loss for record in actual}) == CONFIG.steps
    assert {path.name for path in killed.iterdir()} - {"whole"} == {LOG, "step-00000016", "step-00000020"}
