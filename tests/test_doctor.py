import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splatedit import doctor as module
from splatedit.doctor import FAILS, LIBRARIES, OK, WARNING, Answer, Check, doctor
from splatedit.doctor_probes import supported
from splatedit.model_files import changed_files, write_checksums
from splatedit.pocket import FOLDER

ROOT = Path(__file__).parent.parent
# What ninja prints when a host compiler is too new for nvcc, shortened; the last lines are torch's, and say nothing.
NINJA = """\
[1/3] /usr/local/cuda/bin/nvcc -DTORCH_EXTENSION_NAME=gsplat_cuda -c /x/csrc/ProjectionUT.cu -o ProjectionUT.cuda.o
FAILED: ProjectionUT.cuda.o
/usr/local/cuda/bin/nvcc -DTORCH_EXTENSION_NAME=gsplat_cuda -c /x/csrc/ProjectionUT.cu -o ProjectionUT.cuda.o
In file included from /usr/local/cuda/include/cuda_runtime.h:82,
/usr/local/cuda/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 12
  143 | #error -- unsupported GNU version! gcc versions later than 12
      |  ^~~~~
ninja: build stopped: subcommand failed.
"""
GPU = {"name": "NVIDIA T", "total": 12e9, "free": 11e9, "capability": "8.6", "supported": True}
TORCH = {"version": "2.7.0", "cuda": "12.6", "cudnn": 90500, "threads": 4, "architectures": ["sm_86"], "reason": ""}


@pytest.fixture(autouse=True)
def ask_again():
    module.about_torch.cache_clear()
    yield
    module.about_torch.cache_clear()


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Packages that take the place of the real ones, as text; those that are not named are harmless."""

    def stub(**packages: str) -> Path:
        folder = tmp_path / "stubs"
        for name in {*LIBRARIES, "torch", *packages}:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "__init__.py").write_text(packages.get(name, "__version__ = '1'\n"))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        return folder

    return stub


# ----------------------------------------------------------------------------------------------- broken installations
def test_packages_that_are_broken_missing_or_crash_are_lines(stubs):
    stubs(
        numba="raise ImportError('Numba needs NumPy 2.2 or less. Got NumPy 2.9.')",
        diffusers="import nothing_of_that_name",
        transformers="import os; os.abort()",
        safetensors="raise SystemExit(5)",
        matplotlib="raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')",
        peft="raise OSError('libcudart.so.12: cannot open shared object file')",
    )
    found = {check.name: check for check in module.check_libraries()}
    assert len(found) == len(LIBRARIES)
    assert found["numba"].state == FAILS and "Numba needs NumPy 2.2 or less" in found["numba"].found
    assert "pip install" in found["numba"].advice and "stubs/numba/__init__.py" in "\n".join(found["numba"].details)
    assert found["diffusers"].state == FAILS and "nothing_of_that_name" in found["diffusers"].found
    assert found["transformers"].state == FAILS and "it crashed (SIGABRT)" in found["transformers"].found
    assert found["safetensors"].state == FAILS and "it ended with status 5" in found["safetensors"].found
    advice = 'not installed; for splatedit diagnose: pip install "splatedit[notebook]"'
    assert found["matplotlib"] == Check("matplotlib", OK, advice)
    assert found["peft"].state == WARNING and "libcudart.so.12" in found["peft"].found
    for name in ("numpy", "pyyaml", "pillow", "rich", "zstandard"):
        assert found[name].state == OK, "those after a crash are looked at, too"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise OSError('libtorch_cuda.so: cannot open shared object file')", ["status 1", "libtorch_cuda.so"]),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ["it crashed (SIGSEGV)"], marks=pytest.mark.slow
        ),
    ],
)
def test_no_torch_ends_in_lines_and_status_1(stubs, code, words, tmp_path):
    """The whole command in a process of its own, as a user with a broken torch would start it."""
    folder = stubs(torch=code, av="import torch", PIL="raise ImportError('no _imaging')")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "splatedit", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    states = {line[9:31].strip(): line for line in done.stdout.splitlines() if line[:1] in "owf"}
    assert states["torch"].startswith("fails") and states["model pocket"].startswith("fails")
    assert all(word in done.stdout for word in words)
    assert states["pillow"].startswith("fails") and states["png"].startswith("fails")
    assert states["disk: outputs"].startswith("ok")
    assert done.stdout.splitlines()[-1].startswith("splatedit cannot run here as it is: torch, ")


def test_a_probe_that_hangs_is_ended(stubs):
    stubs(torch="import time; print('loading', flush=True); time.sleep(60)")
    answer = module.ask("torch", seconds=1.0)
    assert answer.facts == [] and answer.error == "no answer after 1 s" and "loading" in answer.said


def test_a_check_that_breaks_is_a_line(monkeypatch):
    def breaks():
        yield Check("a", OK, "fine")
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(module, "CHECKS", {"a": breaks, "b": lambda: iter([Check("b", WARNING, "hm", "look")])})
    said = []
    assert doctor(said.append) == 1
    assert [line[:5] for line in said[:3]] == ["ok   ", "fails", "warni"]
    assert "ZeroDivisionError: division by zero" in said[1] and said[3] == "splatedit cannot run here as it is: a."
    monkeypatch.setattr(module, "CHECKS", {"b": lambda: iter([Check("b", WARNING, "hm", "look")])})
    said.clear()
    assert doctor(said.append, as_json=True) == 0
    found = {"name": "b", "state": "warning", "found": "hm", "advice": "look", "details": []}
    assert json.loads(said.pop()) == {"ok": True, "checks": [found]}
    assert doctor(said.append) == 0 and said == [
        f"{'warning':<9}{'b':<22}hm; look",
        "splatedit can run here, with 1 warning.",
    ]


# ------------------------------------------------------------------------------------------------------ GPU and gsplat
def test_the_compilers_own_error_is_shown(stubs, monkeypatch):
    folder = stubs(gsplat="")
    (folder / "gsplat" / "cuda").mkdir()
    (folder / "gsplat" / "cuda" / "__init__.py").write_text("")
    code = f"import os\nassert os.environ['VERBOSE'] == '1'\nprint({NINJA!r})\n"
    code += "raise RuntimeError(\"Error building extension 'gsplat_cuda'\")\n"
    (folder / "gsplat" / "cuda" / "_backend.py").write_text(code)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "1.5.3")
    monkeypatch.setattr(module, "about_torch", lambda: Answer([{**TORCH, "gpus": [GPU]}], "", ""))
    monkeypatch.setattr(module.about_torch, "cache_clear", lambda: None, raising=False)
    (check,) = module.check_gsplat()
    assert check.state == FAILS and "does not build or load: RuntimeError: Error building extension" in check.found
    assert "unsupported GNU version! gcc versions later than 12" in check.details[0] and len(check.details) <= 12
    assert "CUDA toolkit of this torch (12.6" in check.advice and "--device cpu" in check.advice
    (folder / "gsplat" / "cuda" / "_backend.py").write_text("_C = None")
    (check,) = module.check_gsplat()
    assert check.state == FAILS and "no CUDA toolkit found" in check.found
    (folder / "gsplat" / "cuda" / "_backend.py").write_text("_C = 1")
    (check,) = module.check_gsplat()
    assert check.state == OK and "its CUDA extension loads" in check.found


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (NINJA, "/usr/local/cuda/include/crt/host_config.h:143:2: error:"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120'\nninja: stopped\n", "nvcc fatal"),
        ('x.cu(3): error: identifier "foo" is undefined\n', "x.cu(3): error:"),
        ("glm.cpp:1:10: fatal error: glm/glm.hpp: No such file or directory\n", "glm.cpp:1:10: fatal error:"),
        ("/usr/bin/ld: cannot find -lcudart: No such file\n", "/usr/bin/ld: cannot find -lcudart"),
        ("Traceback\n  File x\nImportError: DLL load failed\n", "Traceback"),
        ("", None),
    ],
)
def test_lines_that_tell(text, first):
    found = module.telling("begin\n\x1b[33mnothing\x1b[0m\n" * 20 * ("error" in text or "fatal" in text) + text)
    assert (found[0].startswith(first) if first else found == ()) and not any("\x1b" in line for line in found)


def test_what_gpus_and_torch_make_of_each_other(monkeypatch):
    def gpus(**facts):
        return list(module.check_gpus({**TORCH, "gpus": [], **facts}))

    monkeypatch.setattr(module, "driver_gpus", lambda: [])
    assert [c.state for c in gpus()] == [OK]
    (good, old) = gpus(gpus=[GPU, {**GPU, "supported": False, "capability": "12.0"}])
    assert good.state == OK and "12.0 GB, 11.0 free" in good.found
    assert old.state == FAILS and "only sm_86" in old.advice and "--device cpu" in old.advice
    monkeypatch.setattr(module, "driver_gpus", lambda: ["GPU 0: NVIDIA T"])
    (check,) = gpus(cuda=None)
    assert check.state == WARNING and "without CUDA" in check.found and "pytorch.org" in check.advice
    (check,) = gpus(reason="RuntimeError: driver too old")
    assert check.state == WARNING and "driver too old" in check.found


@pytest.mark.parametrize(
    ("capability", "architectures", "answer"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_90"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((5, 0), ["sm_70"], False),
    ],
)
def test_which_gpus_a_torch_has_code_for(capability, architectures, answer):
    assert supported(*capability, architectures) is answer


# ------------------------------------------------------------------------------------------------------ models, folders
def test_the_bundled_model_is_as_it_was_shipped(tmp_path, monkeypatch):
    assert changed_files(FOLDER) == []
    copy = tmp_path / "weights"
    shutil.copytree(FOLDER, copy)
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert changed_files(copy) == ["unet/diffusion_pytorch_model.safetensors"]
    monkeypatch.setattr(module, "FOLDER", copy)
    (check,) = module.check_bundled()
    assert check.state == FAILS and "unet/diffusion_pytorch_model.safetensors" in check.found
    write_checksums(copy)
    assert changed_files(copy) == []
    (copy / "vocabulary.json").unlink()
    assert changed_files(copy) == ["vocabulary.json"]


def test_models_in_the_cache_are_listed_with_size_and_wholeness(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (check,) = module.check_models()
    assert check.state == OK and f"none in {tmp_path} yet" in check.found
    whole = tmp_path / "models--some--model" / "snapshots" / "ab"
    shutil.copytree(tiny_model, whole)
    half = tmp_path / "models--other--one" / "snapshots" / "cd"
    shutil.copytree(tiny_model, half)
    next((half / "unet").glob("*.safetensors")).unlink()
    one, two = module.check_models()
    assert (one.name, one.state, two.name, two.state) == ("model other/one", WARNING, "model some/model", OK)
    assert "not whole: other/one: unet/ holds no weights" in one.found and " GB in " in two.found


def test_little_room_and_no_right_to_write_are_said(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1e8))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert all(c.state == WARNING and "0.1 GB free" in c.found for c in module.check_disk())
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    assert [c.state for c in module.check_disk()] == [WARNING, WARNING, FAILS]


def test_a_renderer_that_differs_or_fails_is_told(monkeypatch):
    good = {"backend": "cpu", "ok": True, "picture": 1e-7, "gradient": 1e-6, "ms": 2.0}
    bad = {**good, "backend": "gsplat", "picture": 0.5}
    monkeypatch.setattr(module, "ask", lambda name: Answer([good, bad], "", ""))
    one, two = module.check_renderer()
    assert (one.state, two.state) == (OK, FAILS) and "5.0e-01 (picture)" in two.found
    fails = {"backend": "cpu", "ok": False, "error": "InputError: needs numba", "lines": ["a", "b"]}
    monkeypatch.setattr(module, "ask", lambda name: Answer([fails], "it crashed (SIGILL)", "x"))
    one, two = module.check_renderer()
    assert one.state == WARNING and "plain torch draws instead" in one.advice and one.details == ("a", "b")
    assert two.state == FAILS and "SIGILL" in two.found


def test_versions_are_held_against_the_packages_own_wishes(monkeypatch):
    monkeypatch.setattr(module.importlib.metadata, "requires", lambda name: ["torch>=2.4", "diffusers>=0.30,<1"])
    assert module.in_range("torch", "2.13.0+cpu") == (OK, "") and module.in_range("rich", "1") == (OK, "")
    state, advice = module.in_range("diffusers", "0.20.0")
    assert state == WARNING and "0.30" in advice
    monkeypatch.setattr(module.importlib.metadata, "requires", lambda name: None)
    assert module.in_range("torch", "1.0") == (OK, "")


@pytest.mark.slow
def test_this_installation_is_sound():
    done = subprocess.run(
        [sys.executable, "-m", "splatedit", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    found = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, [c for c in found.values() if c["state"] == FAILS]
    assert found["renderer cpu"]["state"] == found["model pocket"]["state"] == found["h264"]["state"] == OK
