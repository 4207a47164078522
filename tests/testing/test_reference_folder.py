"""Reference data that is absent is missed aloud, and a variable that names none is a mistake."""

from __future__ import annotations

import pytest
import reference_folder

TESTS = """
def test_one(reference):
    assert reference.is_dir()

def test_two(reference):
    assert reference.is_dir()
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Two tests that need the data, which is not beside the repository."""
    monkeypatch.setattr(reference_folder, "BESIDE", pytester.path / "nowhere")
    monkeypatch.delenv(reference_folder.VARIABLE, raising=False)
    pytester.makeconftest("from reference_folder import pytest_terminal_summary, reference")
    pytester.makepyfile(TESTS)
    return pytester


def test_its_absence_is_told_at_the_end(suite: pytest.Pytester) -> None:
    result = suite.runpytest_inprocess()
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(
        ["*NO REFERENCE DATA*", "2 tests were skipped*", "Set DEEPSTACK_REFERENCE to the folder*"]
    )


def test_a_variable_that_names_no_folder_fails(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reference_folder.VARIABLE, "/no/such/folder")
    result = suite.runpytest_inprocess()
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*DEEPSTACK_REFERENCE is '/no/such/folder', and that is no folder; correct it*"])


def test_nothing_is_said_where_it_is(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reference_folder.VARIABLE, str(suite.path))
    result = suite.runpytest_inprocess()
    result.assert_outcomes(passed=2)
    assert "NO REFERENCE DATA" not in result.stdout.str()
