"""The README's Python is run, and what it says is printed is what is printed."""

import contextlib
import io
import re
from typing import Any

from layout import ROOT

README = (ROOT / "README.md").read_text()
FENCED = r"^```{}\n(.*?)^```$"


def test_the_python_runs_and_prints_what_the_readme_shows() -> None:
    """A block of text right after a block of Python is what that prints; the blocks are one program."""
    examples = re.findall(FENCED.format("python") + r"(?:\n\n```text\n(.*?)^```$)?", README, re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {"__name__": "readme"}
    for code, shown in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        assert printed.getvalue().rstrip() == shown.rstrip()
    assert any(shown for _, shown in examples)


def test_the_two_commands_are_there() -> None:
    main_job, tests = re.findall(FENCED.format("bash"), README, re.DOTALL | re.MULTILINE)
    assert main_job.startswith("pip install -e '.[viz]' && compax train")
    assert tests == "pip install -e '.[test,dev]' && pytest\n"
