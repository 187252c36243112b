"""What a user reads of an error in a cell and of a disk: one sentence, never an empty one."""

import errno

import pytest
from IPython.core.ultratb import AutoFormattedTB
from papermill.exceptions import PapermillExecutionError

from mig_kit.pipeline.failures import describe_exit, describe_os_error, failure_sentence


def fail_in_cell(error: Exception, folder) -> str:
    """The sentence about a cell that raised `error`, which the executed notebook holds."""
    try:
        raise error
    except type(error) as raised:
        traceback = AutoFormattedTB(mode="Context").structured_traceback(
            type(raised), raised, raised.__traceback__)
    failure = PapermillExecutionError(0, 1, "", type(error).__name__, str(error), traceback)
    return failure_sentence(failure, folder / "x.ipynb")


def test_an_error_has_a_sentence_whatever_it_says(tmp_path):
    assert fail_in_cell(ValueError("too few"), tmp_path) == "ValueError: too few"
    assert fail_in_cell(AssertionError(), tmp_path) == "AssertionError at: raise error"
    # a cell whose error is not among its outputs
    silent = PapermillExecutionError(0, 7, "", "CellExecutionError", "", [])
    assert failure_sentence(silent, tmp_path / "x.ipynb") == (
        "cell 7 ended without a word; look at it")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")])
def test_a_full_disk_says_how_much_is_free_and_that_work_goes_on(tmp_path, error):
    sentence = fail_in_cell(error, tmp_path)
    assert sentence.startswith(f"the disk of {tmp_path} is full, ")
    assert " MB are free; make room and give the same command, which goes on" in sentence
    assert str(error) in sentence


def test_other_errors_stay_as_they_are(tmp_path):
    quoted = RuntimeError("the server ended with status 126; its log:\nPermission denied")
    assert fail_in_cell(quoted, tmp_path) == f"RuntimeError: {quoted}"
    full = OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/a")
    assert describe_os_error(full).startswith(f"the disk of {tmp_path} is full, ")
    assert describe_os_error(FileNotFoundError("no run 'a'; see status")) == (
        "no run 'a'; see status")


@pytest.mark.parametrize(("status", "sentence"), [
    (-9, "was ended by signal 9 (Killed); the system ends so what takes too much memory"),
    (137, "was ended by signal 9 (Killed); the system ends"), (-11, "was ended by signal 11 (Seg"),
    (3, "ended with status 3"), (None, "ended with status unknown"),
    (255, "ended with status 255")])
def test_a_process_that_ended_names_its_signal(status, sentence):
    assert describe_exit(status).startswith(sentence)
