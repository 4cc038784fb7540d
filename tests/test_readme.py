"""The README's Python is run, and what it says is printed is what is printed."""

import contextlib
import io
import re

from layout import ROOT


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_runs_and_prints_what_the_readme_shows() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("".join(blocks("python")), "README.md", "exec"), {"__name__": "readme"})
    assert [printed.getvalue().rstrip()] == [text.rstrip() for text in blocks("text")]


def test_the_two_commands_are_there() -> None:
    main_job, tests = blocks("bash")
    assert main_job.startswith("pip install -e '.[viz]' && compax train")
    assert tests == "pip install -e '.[test,dev]' && pytest\n"
