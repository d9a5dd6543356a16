"""The front door: what README and docs promise is what the program does."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from splatedit import __version__
from splatedit.cli import cli
from splatedit.config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
USAGE = (ROOT / "docs" / "usage.md").read_text()
COMMANDS = [line for line in README.splitlines() if line.startswith("python3 -m venv ")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_readme_opens_with_its_two_commands():
    first, second = blocks("bash")[:2]
    assert [first.strip(), second.strip()] == COMMANDS, "two blocks of one line each, and no third such line"
    assert COMMANDS[0].endswith('/splatedit run scenes/cat.ply "a pig"') and COMMANDS[1].endswith("/pytest")
    assert README.index(COMMANDS[1]) < 2500, "on the first screen"


def test_ci_runs_those_lines_and_no_copies():
    ci = (ROOT / ".ci" / "run").read_text()
    found = subprocess.run(["grep", "-E", "^python3 -m venv ", ROOT / "README.md"], capture_output=True, text=True)
    assert found.stdout.splitlines() == COMMANDS
    assert "grep -E '^python3 -m venv ' README.md" in ci
    installs = re.findall(r"pip install.*", ci)
    assert installs == ['pip install -q -c constraints.txt ".[browser]"'], "what the README's lines do not install"
    assert "splatedit run" not in ci, "it comes from README.md"
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_pins_cover_the_dependencies():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert project["version"] == __version__
    assert pins["torch"] == "2.13.0"
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
        assert name == "splatedit" or name in pinned, requirement
    environment = (ROOT / "environment.yml").read_text()
    assert "-c constraints.txt" in environment and ".[test]" in environment


@pytest.mark.parametrize("name", ["", *cli.commands])
def test_every_command_and_option_has_help_and_is_documented(name):
    command = cli.commands[name] if name else cli
    assert command.help
    if name:
        assert f"## splatedit {name} " in USAGE and f"splatedit {name} " in README
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.opts
            for option in [*parameter.opts, *parameter.secondary_opts]:
                assert f"`{option}`" in USAGE, option


def test_every_setting_is_documented_with_its_default():
    options = {p.name for p in cli.commands["run"].params}
    for key, default in vars(Config()).items():
        row = re.search(rf"^\| `{key}` \| (\S.*?) \|", USAGE, re.M)
        if row:
            assert row[1] == str(default), key
        else:
            assert key in options, f"{key} is neither an option nor in the table of docs/usage.md"


def test_shell_examples_are_understood():
    """Each `splatedit ...` line of the documents parses: names, options, settings; nothing is run."""
    import shlex

    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("splatedit ")]
    assert len(lines) >= 5
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        command = cli.commands[name]
        with command.make_context(name, words):
            pass


def test_linked_files_exist():
    for text, folder in ((README, ROOT), (USAGE, ROOT / "docs"), ((ROOT / "CONTRIBUTING.md").read_text(), ROOT)):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (folder / target).exists(), target


def test_every_module_is_in_the_architecture_table():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "splatedit").glob("*.py"):
        assert path.name.startswith("__") or f"`{path.name}`" in text, path.name


def usage_python(word):
    (code,) = [block for block in re.findall(r"^```python\n(.*?)^```", USAGE, re.M | re.S) if word in block]
    return code


def test_usage_python_runs():
    code = usage_python("range(100)")
    names: dict = {}
    exec(compile(code.replace("range(100)", "range(2)"), "usage.md", "exec"), names)
    assert names["pictures"].shape == (1, 3, 128, 128) and not names["z"].equal(names["z_source"])


def test_usage_python_of_an_edit_in_the_background_runs(scene_file, tiny_model, tmp_path, monkeypatch):
    code = usage_python("splatedit.start")
    for old, new in (
        ('"scenes/cat.ply"', repr(str(scene_file))),
        ("steps=60", f"steps=6, cameras='dome:2', model={str(tiny_model)!r}"),
        ("job.snapshot()", "assert job.wait(0.0) is False\nwhile job.last is None: pass\njob.snapshot()"),
    ):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("splatedit.work.FRAMES", 2)
    monkeypatch.setattr("splatedit.work.VIEWS", 2)
    names: dict = {}
    exec(compile(code, "usage.md", "exec"), names)
    assert names["edited"].n == 300 and names["job"].done == 6 and names["job"].outcome.edited.exists()


def test_readme_python_of_a_notebook_runs(scene_file, tiny_model, monkeypatch):
    code, _ = blocks("python")
    for old, new in (
        ('"scenes/cat.ply"', repr(str(scene_file))),
        ('source="a cat"', f'source="a cat", steps=2, views=3, model={str(tiny_model)!r}'),
    ):
        assert old in code
        code = code.replace(old, new)
    shown = []
    monkeypatch.setattr("splatedit.jobs.Job.show", lambda job: shown.append(job))  # see tests/test_notebook.py
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert shown == [names["job"]] and names["pig"].n == names["cat"].n == 300


def test_readme_python_runs(scene_file, tiny_model, tmp_path, monkeypatch):
    _, code = blocks("python")
    for old, new in (
        ('"scenes/cat.ply"', repr(str(scene_file))),
        ("steps=300", f"steps=2, views=3, model={str(tiny_model)!r}"),
    ):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["pictures"].shape == (8, 3, 256, 256)
    assert (tmp_path / "pig.ply").stat().st_size > 0
