"""`splatedit doctor`: whether splatedit can run here, and what to do if not.

Only the standard library is imported here. What may be broken is imported by `doctor_probes` in a process of its own: a
package that raises, hangs or takes the whole process down becomes a line.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from splatedit.errors import InputError
from splatedit.folders import nearest
from splatedit.model_files import FOLDER, changed_files, check_folder, first_line

OK, WARNING, FAILS = "ok", "warning", "fails"
PATIENCE, BUILD = 180.0, 1800.0  # seconds for a probe; for building gsplat's CUDA extension
LINES = 12  # of what a compiler or a broken package said
OLDEST = (3, 10)  # Python
ROOM = {"outputs": 0.5, "models": 8.0, "temporary files": 0.5}  # GB below which a folder is warned of
CLOSE, STEEP = 1e-4, 1e-3  # largest differences from the twin: of a colour, of a gradient relative to the largest
# Import names and what they are for; those without a sentence are needed always.
LIBRARIES: dict[str, str] = {
    "numpy": "",
    "scipy": "",
    "numba": "",
    "diffusers": "",
    "transformers": "",
    "huggingface_hub": "",
    "safetensors": "",
    "omegaconf": "",
    "yaml": "",
    "PIL": "",
    "av": "",
    "rich": "",
    "peft": 'for --guidance vsd: pip install "splatedit[vsd]"',
    "viser": "",
    "zstandard": 'for .spz files of version 4: pip install "splatedit[spz]"',
    "matplotlib": 'for splatedit diagnose: pip install "splatedit[notebook]"',
}
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow"}  # where the name on PyPI is another
REINSTALL = "pip install -c constraints.txt --force-reinstall {}"


class Check(NamedTuple):
    """One line of the doctor's."""

    name: str
    state: str  # OK, WARNING or FAILS
    found: str
    advice: str = ""  # what to do; empty where all is well
    details: tuple[str, ...] = ()  # last lines of what somebody else said


class Answer(NamedTuple):
    """What a probe brought back."""

    facts: list[dict[str, Any]]  # one for each line of JSON that it printed
    error: str  # why it did not end well; empty if it did
    said: str  # everything else that it printed


# -------------------------------------------------------------------------------------------------------------- probes
def ask(probe: str, seconds: float = PATIENCE, **environment: str) -> Answer:
    """Run a probe of `doctor_probes` in a process of its own, and wait for it no longer than that."""
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "splatedit.doctor_probes", probe]
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
        out, err, error = done.stdout, done.stderr, ending(done.returncode)
    except subprocess.TimeoutExpired as late:
        out, err = (
            text.decode(errors="replace") if isinstance(text, bytes) else text or ""
            for text in (late.stdout, late.stderr)
        )
        error = f"no answer after {seconds:.0f} s"
    facts, others = [], []
    for line in out.splitlines():
        fact = read_fact(line)
        facts.append(fact) if fact is not None else others.append(line)
    return Answer(facts, error, "\n".join([*others, err]))


@functools.cache
def about_torch() -> Answer:
    """What torch is, asked once."""
    return ask("torch")


def read_fact(line: str) -> dict[str, Any] | None:
    """A line of JSON that a probe printed; None for any other."""
    try:
        fact = json.loads(line) if line.startswith('{"probe"') else None
    except ValueError:
        return None
    return fact if isinstance(fact, dict) else None


def ending(status: int) -> str:
    """How a process that did not end well ended."""
    if status >= 0:
        return "" if status == 0 else f"it ended with status {status}"
    import signal

    try:
        return f"it crashed ({signal.Signals(-status).name})"
    except ValueError:
        return f"it crashed (signal {-status})"


def telling(text: str, most: int = LINES) -> tuple[str, ...]:
    """The lines of a compiler's or an interpreter's output that say what is wrong.

    From the first that is an error of a compiler on; else the last ones.
    """
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if COMPILER.search(line)), None)
    return tuple(lines[-most:] if first is None else lines[first : first + most])


COMPILER = re.compile(r"\b(fatal )?error( C\d+)?:|: error\b|^nvcc fatal|undefined reference|cannot find -l")


# -------------------------------------------------------------------------------------------------------------- checks
def check_python() -> Iterator[Check]:
    """The interpreter, and splatedit itself."""
    found = f"{platform.python_version()} on {platform.platform()}, splatedit {own_version()}"
    if sys.version_info < OLDEST:
        yield Check("python", FAILS, found, f"splatedit needs {'.'.join(map(str, OLDEST))} or newer")
    else:
        yield Check("python", OK, found)


def own_version() -> str:
    from splatedit import __version__

    return __version__


def check_torch() -> Iterator[Check]:
    """torch, and the GPUs that it sees."""
    answer = about_torch()
    if not answer.facts:
        yield broken("torch", answer)
        return
    facts = answer.facts[-1]
    built = f"CUDA {facts['cuda']}, cuDNN {facts['cudnn']}" if facts["cuda"] else "without CUDA"
    state, advice = in_range("torch", facts["version"])
    yield Check("torch", state, f"{facts['version']}, {built}, {facts['threads']} threads", advice)
    yield from check_gpus(facts)


def check_gpus(facts: dict[str, Any]) -> Iterator[Check]:
    """The GPUs that torch sees, and those that it should."""
    for gpu in facts["gpus"]:
        found = (
            f"{gpu['name']}, {gpu['total'] / 1e9:.1f} GB, {gpu['free'] / 1e9:.1f} free, capability {gpu['capability']}"
        )
        if not gpu["supported"]:
            advice = f"this torch has no code for it (only {', '.join(facts['architectures'])}); install a newer torch"
            yield Check("gpu", FAILS, found, f"{advice}, or use --device cpu")
        else:
            yield Check("gpu", OK, found)
    if facts["gpus"]:
        return
    there = driver_gpus()
    if not there:
        yield Check("gpu", OK, "none: edits run on the CPU, for which the bundled model is made")
    elif facts["cuda"]:
        advice = "the driver may be too old for this torch; update it"
        yield Check(
            "gpu", WARNING, f"{there[0]}, but torch cannot use it ({facts['reason'] or 'no reason given'})", advice
        )
    else:
        advice = "install torch with CUDA (https://pytorch.org/get-started/locally)"
        yield Check("gpu", WARNING, f"{there[0]}, but this torch is without CUDA: edits run on the CPU", advice)


def driver_gpus() -> list[str]:
    """The GPUs that NVIDIA's driver knows."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return [re.sub(r"\s*\(UUID.*", "", line) for line in done.stdout.splitlines() if line.startswith("GPU")]


def check_libraries() -> Iterator[Check]:
    """Every package that splatedit imports, needed or optional."""
    answer = ask("libraries")
    seen = {fact["name"]: fact for fact in answer.facts if "ok" in fact}
    for name, purpose in LIBRARIES.items():
        distribution = DISTRIBUTIONS.get(name, name)
        fact = seen.get(name)
        if fact is None:  # the process ended here
            yield broken(distribution, answer._replace(facts=[]), WARNING if purpose else FAILS)
            answer = ask("libraries", SPLATEDIT_DOCTOR_AFTER=name)
            seen |= {fact["name"]: fact for fact in answer.facts if "ok" in fact}
        elif fact["ok"]:
            yield Check(distribution, *version_line(distribution, fact["version"]))
        elif fact["missing"]:
            if purpose:
                yield Check(distribution, OK, f"not installed; {purpose}")
            else:
                yield Check(distribution, FAILS, "not installed", f"pip install {distribution}")
        else:
            state = WARNING if purpose else FAILS
            advice = REINSTALL.format(distribution)
            yield Check(distribution, state, fact["error"], advice, tuple(fact["lines"]))


def version_line(distribution: str, version: str) -> tuple[str, str, str]:
    state, advice = in_range(distribution, version)
    return state, version, advice


def in_range(distribution: str, version: str) -> tuple[str, str]:
    """State and advice for a version, by what splatedit's own metadata ask for; OK where that cannot be told."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(text) for text in importlib.metadata.requires("splatedit") or ()]
        for one in asked:
            if one.name.lower() == distribution.lower() and not one.specifier.contains(version, prereleases=True):
                return WARNING, f"splatedit is made for {one.specifier}; pip install '{one.name}{one.specifier}'"
    except Exception:  # no packaging, or not installed as a package: nothing to compare with
        return OK, ""
    return OK, ""


def broken(name: str, answer: Answer, state: str = FAILS) -> Check:
    """A package whose probe did not come back."""
    found = f"cannot be imported: {answer.error or 'no answer'}"
    return Check(name, state, found, REINSTALL.format(name), telling(answer.said))


def check_codecs() -> Iterator[Check]:
    """Films and pictures that are written."""
    answer = ask("codecs")
    done = {fact["what"]: fact for fact in answer.facts}
    for what in ("png", "webp", "h264"):
        fact = done.get(what)
        if fact is None:
            yield Check(what, FAILS, f"cannot be tried: {answer.error or 'no answer'}", "", telling(answer.said))
        elif fact["ok"]:
            yield Check(what, OK, "written and read again")
        else:
            state = WARNING if what == "webp" else FAILS
            advice = "only needed for .sog files" if what == "webp" else REINSTALL.format("av pillow")
            yield Check(what, state, fact["error"], advice)


def check_gsplat() -> Iterator[Check]:
    """gsplat and its CUDA extension, which is built when it is first needed."""
    facts = about_torch().facts
    gpus = facts[-1]["gpus"] if facts else []
    try:
        version = importlib.metadata.version("gsplat")
    except importlib.metadata.PackageNotFoundError:
        if gpus:
            yield Check("gsplat", FAILS, "not installed", 'pip install "splatedit[cuda]", or use --device cpu')
        else:
            yield Check("gsplat", OK, "not installed; only needed for a CUDA GPU")
        return
    if not gpus:
        yield Check("gsplat", OK, f"{version}, not used: there is no CUDA GPU")
        return
    answer = ask("gsplat", BUILD, VERBOSE="1")
    fact = answer.facts[-1] if answer.facts else {"ok": False, "error": answer.error}
    if fact["ok"]:
        yield Check("gsplat", OK, f"{version}, its CUDA extension loads ({fact['seconds']:.0f} s)")
        return
    advice = (
        f"needs the CUDA toolkit of this torch ({facts[-1]['cuda']}; nvcc: {shutil.which('nvcc') or 'not found'}) and a"
    )
    yield Check(
        "gsplat",
        FAILS,
        f"{version}, but its CUDA extension does not build or load: {fact['error']}",
        f"{advice} compiler; CUDA_HOME says where the toolkit is; or use --device cpu",
        telling(answer.said),
    )


def check_renderer() -> Iterator[Check]:
    """A small scene drawn by each backend, pictures and gradients, beside the plain-torch definition."""
    answer = ask("render")
    for fact in answer.facts:
        name = f"renderer {fact['backend']}"
        if not fact["ok"]:
            slow = fact["backend"] == "cpu"
            advice = (
                "plain torch draws instead, which is slow; " + REINSTALL.format("numba") if slow else "--device cpu"
            )
            yield Check(name, WARNING if slow else FAILS, fact["error"], advice, tuple(fact["lines"]))
            continue
        apart = f"{fact['picture']:.1e} (picture), {fact['gradient']:.1e} (gradient)"
        found = f"differs from plain torch by {apart}, {fact['ms']:.1f} ms"
        good = fact["picture"] <= CLOSE and fact["gradient"] <= STEEP
        yield Check(
            name, OK if good else FAILS, found, "" if good else f"should be below {CLOSE:g} and {STEEP:g}; report it"
        )
    if answer.error:
        yield Check("renderer", FAILS, f"cannot be tried: {answer.error}", "", telling(answer.said))


def check_bundled() -> Iterator[Check]:
    """The files of the bundled model, and whether it answers."""
    try:
        check_folder(FOLDER, "pocket")
        spoilt = changed_files(FOLDER)
    except (InputError, OSError) as error:
        yield Check("model pocket", FAILS, str(error), "reinstall splatedit")
        return
    if spoilt:
        yield Check("model pocket", FAILS, f"not as it was shipped: {', '.join(spoilt)}", "reinstall splatedit")
        return
    answer = ask("model")
    if not answer.facts:
        yield Check("model pocket", FAILS, f"does not answer: {answer.error or 'no answer'}", "", telling(answer.said))
    elif not answer.facts[-1]["ok"]:
        fact = answer.facts[-1]
        yield Check("model pocket", FAILS, fact["error"], "", tuple(fact["lines"]))
    else:
        yield Check("model pocket", OK, f"whole, {answer.facts[-1]['ms']:.0f} ms for an evaluation of one picture")


def hub_folder() -> Path:
    """Where models from the hub are kept, as huggingface_hub would have it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def check_models() -> Iterator[Check]:
    """Models of the hub that are in its cache."""
    folder = hub_folder()
    kept = sorted(folder.glob("models--*--*/snapshots/*/model_index.json"))
    if not kept:
        yield Check("models", OK, f"none in {folder} yet; a hub id for --model fetches one")
    for index in kept:
        name = index.parents[2].name.removeprefix("models--").replace("--", "/", 1)
        files = {path.resolve() for path in index.parent.rglob("*") if path.is_file()}
        found = f"{sum(path.stat().st_size for path in files) / 1e9:.2f} GB in {folder}"
        try:
            check_folder(index.parent, name)
            yield Check(f"model {name}", OK, found)
        except InputError as error:
            yield Check(
                f"model {name}", WARNING, f"{found}, not whole: {error}", "it is fetched again when used online"
            )


def check_disk() -> Iterator[Check]:
    """Room where results, models and temporary files go."""
    places = {"outputs": Path("outputs"), "models": hub_folder(), "temporary files": Path(tempfile.gettempdir())}
    for name, path in places.items():
        there = nearest(path)
        free = shutil.disk_usage(there).free / 1e9
        found = f"{free:.1f} GB free at {there}"
        if not os.access(there, os.W_OK):
            state = FAILS if name == "temporary files" else WARNING
            yield Check(
                f"disk: {name}", state, f"{there} cannot be written to", "choose another folder (-o, HF_HOME, TMPDIR)"
            )
        elif free < ROOM[name]:
            yield Check(f"disk: {name}", WARNING, found, f"less than {ROOM[name]:g} GB")
        else:
            yield Check(f"disk: {name}", OK, found)


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": check_python,
    "torch": check_torch,
    "libraries": check_libraries,
    "codecs": check_codecs,
    "gsplat": check_gsplat,
    "renderer": check_renderer,
    "model pocket": check_bundled,
    "models": check_models,
    "disk": check_disk,
}


def checks() -> Iterator[Check]:
    """All checks, one after the other. One that breaks is a line, too."""
    for name, check in CHECKS.items():
        try:
            yield from check()
        except Exception as error:
            yield Check(name, FAILS, f"the check itself failed ({first_line(error)})", "please report it")


# --------------------------------------------------------------------------------------------------------------- words
def line(check: Check) -> str:
    """One check as a line, its details below."""
    advice = f"; {check.advice}" if check.advice else ""
    text = " ".join(f"{check.found}{advice}".split())
    return "\n".join(
        [f"{check.state:<9}{check.name:<22}{text}", *(f"           | {detail}" for detail in check.details)]
    )


def summary(found: Sequence[Check]) -> str:
    """The last line."""
    failing = [check.name for check in found if check.state == FAILS]
    if failing:
        return f"splatedit cannot run here as it is: {', '.join(failing)}."
    warned = sum(check.state == WARNING for check in found)
    return "splatedit can run here" + (f", with {warned} warning{'s' * (warned > 1)}." if warned else ".")


def doctor(tell: Callable[[str], None], as_json: bool = False) -> int:
    """Tell what all checks found, line by line as they end, or as JSON; exit status 0, or 1 if splatedit cannot run."""
    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            tell(line(check))
    good = not any(check.state == FAILS for check in found)
    tell(json.dumps({"ok": good, "checks": [c._asdict() for c in found]}, indent=1) if as_json else summary(found))
    return 0 if good else 1
