"""Checkpoints of gsplat, nerfstudio, INRIA and splatedit: read as they are, refused in one line, never run."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from splatedit.errors import InputError
from splatedit.files import load
from splatedit.formats import format_of
from splatedit.gaussians import PARAMETERS, SH_C0

N = 7


def splats(n: int = N, k: int = 15, seed: int = 0) -> dict[str, torch.Tensor]:
    """The six parameters in gsplat's names and shapes."""
    make = torch.Generator().manual_seed(seed)
    shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3), "shN": (k, 3)}
    return {name: torch.randn(n, *shape, generator=make) for name, shape in shapes.items()}


def state_dict(parameters: dict[str, torch.Tensor]) -> OrderedDict:
    """As gsplat saves it: the state dict of a ParameterDict."""
    return torch.nn.ParameterDict({k: torch.nn.Parameter(v) for k, v in parameters.items()}).state_dict()


def nerfstudio(parameters: dict[str, torch.Tensor], prefix: str = "_model.gauss_params.") -> dict:
    """As nerfstudio's Trainer saves splatfacto, numpy scalars of its learning-rate schedulers included."""
    theirs = {"sh0": "features_dc", "shN": "features_rest"}
    state = {prefix + theirs.get(name, name): value for name, value in parameters.items()}
    state[prefix + "features_dc"] = parameters["sh0"][:, 0]
    state[prefix + "opacities"] = parameters["opacities"][:, None]
    state["_model.camera_optimizer.pose_adjustment"] = torch.zeros(3, 6)
    groups = [{"lr": np.float64(1.6e-4), "betas": (0.9, 0.999), "params": [0]}]
    moments = {0: {"step": torch.tensor(9.0), "exp_avg": parameters["means"] * 0}}
    return {
        "step": 29999,
        "pipeline": OrderedDict(state),
        "optimizers": {"means": {"state": moments, "param_groups": groups}},
        "schedulers": {"means": {"_last_lr": [np.float64(1.0)], "last_epoch": np.int64(3)}},
        "scalers": {"scale": 65536.0},
    }


def saved(path: Path, content) -> Path:
    """The path, with the content in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def same(gaussians, parameters: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(getattr(gaussians, name), parameters[name]) for name in PARAMETERS)


def refused(path: Path) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("k", [0, 3, 8, 15])
def test_gsplat(tmp_path, k):
    wanted = splats(k=k)
    path = saved(tmp_path / "ckpt_6999.pt", {"step": 6999, "splats": state_dict(wanted)})
    assert same(load(path), wanted)
    old = {("means3d" if name == "means" else name): value for name, value in wanted.items()}
    assert same(load(saved(tmp_path / "old.pt", {"step": 0, "splats": old})), wanted)


def test_all_ranks_of_gsplat_make_one_scene(tmp_path):
    parts = [splats(n, seed=n) for n in (3, 5, 4)]
    for rank, part in enumerate(parts):
        saved(tmp_path / f"ckpts/ckpt_29999_rank{rank}.pt", {"step": 29999, "splats": state_dict(part)})
    saved(tmp_path / "ckpts/ckpt_6999_rank0.pt", {"step": 6999, "splats": state_dict(splats())})
    whole = {name: torch.cat([part[name] for part in parts]) for name in PARAMETERS}
    for path in ("ckpts/ckpt_29999_rank0.pt", "ckpts/ckpt_29999_rank2.pt", ".", "ckpts"):
        assert same(load(tmp_path / path), whole)
    (tmp_path / "ckpts/ckpt_29999_rank1.pt").unlink()
    assert "ckpt_29999_rank1.pt is missing" in refused(tmp_path / "ckpts/ckpt_29999_rank0.pt")
    saved(tmp_path / "ckpts/ckpt_29999_rank1.pt", {"splats": splats(k=3)})
    assert "SH degrees [1, 3]" in refused(tmp_path)


@pytest.mark.parametrize("prefix", ["_model.gauss_params.", "_model.", "_model.module.gauss_params."])
def test_nerfstudio(tmp_path, prefix):
    wanted = splats()
    path = saved(tmp_path / "step-000029999.ckpt", nerfstudio(wanted, prefix))
    assert same(load(path), wanted)
    assert load(path).comments == ()


def test_nerfstudio_with_all_colours_in_one_tensor(tmp_path):
    wanted = splats()
    content = nerfstudio(wanted, "_model.")
    state = content["pipeline"]
    del state["_model.features_dc"], state["_model.features_rest"]
    state["_model.colors_all"] = torch.cat([wanted["sh0"], wanted["shN"]], 1)
    assert same(load(saved(tmp_path / "a.ckpt", content)), wanted)


def test_splatfacto_without_sh_holds_logits_of_colours(tmp_path):
    wanted = splats(k=0)
    read = load(saved(tmp_path / "a.ckpt", nerfstudio(wanted)))
    torch.testing.assert_close(0.5 + SH_C0 * read.sh0, wanted["sh0"].sigmoid())


@pytest.mark.parametrize("name", ["run", "run/config.yml", "run/nerfstudio_models"])
def test_a_nerfstudio_run_stands_for_its_newest_checkpoint(tmp_path, name):
    wanted = splats()
    run = tmp_path / "run"
    saved(run / "nerfstudio_models/step-000002000.ckpt", nerfstudio(splats(seed=1)))
    saved(run / "nerfstudio_models/step-000010000.ckpt", nerfstudio(wanted))
    (run / "config.yml").write_text("!!python/object/apply:os.system ['touch canary']\n")
    turn = [[0.0, 1, 0, 0.5], [1, 0, 0, 0], [0, 0, 1, -2]]
    (run / "dataparser_transforms.json").write_text(json.dumps({"transform": turn, "scale": 0.25}))
    form = format_of(tmp_path / name)
    assert form is not None and form.name == "checkpoint"
    read = load(tmp_path / name)
    assert same(read, wanted)  # in nerfstudio's own frame, as its exporter writes it
    assert read.comments == ("nerfstudio dataparser_transforms: scale 0.25 transform 0 1 0 0.5 / 1 0 0 0 / 0 0 1 -2",)


@pytest.mark.parametrize(
    "content", ["{}", '{"transform": [[1, 2], [3]], "scale": 1}', '{"transform": 1, "scale": 1}', "["]
)
def test_a_damaged_dataparser_transform_is_named(tmp_path, content):
    path = saved(tmp_path / "a.ckpt", nerfstudio(splats()))
    (tmp_path / "dataparser_transforms.json").write_text(content)
    assert "dataparser_transforms.json" in refused(path)


def test_inria(tmp_path):
    wanted = splats()
    names = ("means", "sh0", "shN", "scales", "quats")
    rest = (torch.zeros(N), torch.zeros(N, 1), torch.zeros(N, 1), {"state": {}, "param_groups": []}, np.float32(4.5))
    capture = (3, *(torch.nn.Parameter(wanted[n]) for n in names), wanted["opacities"][:, None], *rest)
    assert same(load(saved(tmp_path / "chkpnt30000.pth", (capture, 30000))), wanted)


def test_ours_and_a_bare_dictionary(tmp_path):
    wanted = splats()
    assert same(load(saved(tmp_path / "last.pt", {"step": 3, "parameters": wanted, "config": "x" * 9999})), wanted)
    assert same(load(saved(tmp_path / "bare.pt", wanted)), wanted)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path, kind):
    wanted = {name: value.to(kind) for name, value in splats().items()}
    read = load(saved(tmp_path / "a.pt", {"splats": wanted}))
    assert same(read, {name: value.float() for name, value in wanted.items()})


def test_other_pickle_protocols_make_no_noise(tmp_path):
    data = splats()
    torch.save({"splats": data}, tmp_path / "a.pt", pickle_protocol=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load(tmp_path / "a.pt"), data)


def test_what_is_read_owns_its_memory(tmp_path):
    path = saved(tmp_path / "a.pt", {"splats": splats()})
    read = load(path)
    before = read.means.clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(read.means, before)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scales": None}, ["'splats.scales' is missing, expected a tensor of shape (n, 3)"]),
        ({"means": torch.zeros(N, 2)}, ["'splats.means' has shape (7, 2), expected (n, 3)"]),
        ({"means": "x"}, ["'splats.means' is of type str"]),
        ({"quats": torch.zeros(N + 1, 4)}, ["'splats.quats' has shape (8, 4), expected (n, 4) with n = 7"]),
        ({"opacities": torch.zeros(N, 2)}, ["'splats.opacities' has shape (7, 2), expected (n) or (n, 1)"]),
        ({"sh0": torch.zeros(N, 1, 3, dtype=torch.int32)}, ["'splats.sh0' is a strided tensor of int32"]),
        ({"shN": torch.zeros(N, 5, 3)}, ["'splats.shN' has 5 rows of SH, expected one of 0, 3, 8, 15"]),
        ({"means": torch.full((N, 3), torch.nan)}, ["splats.means, row 0, component 0: found nan", "7 of 7 rows"]),
        ({"quats": torch.zeros(N, 4)}, ["splats.quats, row 0: found 0 0 0 0"]),
        ({"scales": torch.full((N, 3), 1e300, dtype=torch.float64)}, ["splats.scales, row 0", "found inf"]),
        ({"means": torch.zeros(0, 3)}, ["shape (7, 4), expected (n, 4) with n = 0"]),
    ],
)
def test_wrong_tensors_are_named_with_file_key_and_row(tmp_path, change, words):
    path = saved(tmp_path / "a.pt", {"splats": {**splats(), **change}})
    message = refused(path)
    assert all(word in message for word in [str(path), *words]), message


def test_missing_keys_and_other_files_say_what_to_do(tmp_path):
    some = splats()
    del some["shN"]
    assert "no key 'splats.shN'" in refused(saved(tmp_path / "a.pt", {"splats": some}))
    del some["sh0"]
    some |= {"features": torch.zeros(N, 32), "colors": torch.zeros(N, 3)}
    assert "app_opt" in refused(saved(tmp_path / "a.pt", {"splats": some}))
    assert "no key 'pipeline._model.gauss_params.quats'" in refused(
        saved(tmp_path / "a.ckpt", {"pipeline": {"_model.gauss_params.means": torch.zeros(3, 3)}})
    )
    assert "holds a dictionary with epoch, state_dict" in refused(
        saved(tmp_path / "a.pt", {"epoch": 1, "state_dict": {}})
    )
    assert "holds a list" in refused(saved(tmp_path / "a.pt", [1]))
    (tmp_path / "a.pt").write_bytes(b"")
    assert "an empty file" in refused(tmp_path / "a.pt")
    torch.save({"splats": splats()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert "since version 1.6" in refused(tmp_path / "a.pt")


class Run:
    """Unpickled, it would touch a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_nothing_in_a_pickle_is_run(tmp_path):
    canary = tmp_path / "canary"
    path = saved(tmp_path / "a.pt", {"splats": splats(), "step": Run(canary)})
    assert "its pickle needs __builtin__.exec" in refused(path)
    assert not canary.exists()
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Run(canary)))
    assert "a file that starts with" in refused(tmp_path / "b.pt")
    assert not canary.exists()


def archive(path: Path, data: bytes, **options) -> Path:
    """A zip as torch.save writes it, with this pickle."""
    with zipfile.ZipFile(path, "w", **options) as out:
        out.writestr("archive/data.pkl", data)
        out.writestr("archive/version", "3\n")
        out.writestr("archive/data/0", bytes(64))
    return path


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(bytearray(9), 2),  # bytearray(10 ** 10) takes ten bytes here and ten billion when run
        b"\x80\x02" + b")" + b"\x85" * 100_000 + b"}" + b"q\x000h\x00\x88s.",
        b"\x80\x02c_codecs\nencode\n(X" + struct.pack("<I", 9000) + b"x" * 9000 + b"X\x08\x00\x00\x00punycodetR.",
        b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00lstR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"\x80\x02",
        b"",
        bytes(range(256)),
    ],
)
def test_pickles_made_to_exhaust_or_to_run_are_refused(tmp_path, data):
    assert "its pickle" in refused(archive(tmp_path / "a.pt", data))


def test_tensors_larger_than_the_file_are_refused(tmp_path):
    wide = {name: value[:1].expand(10**9, *value.shape[1:]) for name, value in splats(1, 0).items()}
    assert "promises 1000000000 Gaussians, but holds only" in refused(saved(tmp_path / "a.pt", {"splats": wide}))


def test_sparse_and_meta_tensors_are_refused(tmp_path):
    for value in (torch.zeros(N, 3).to_sparse(), torch.zeros(N, 3, device="meta")):
        refused(saved(tmp_path / "a.pt", {"splats": {**splats(), "means": value}}))


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    whole = io.BytesIO()
    torch.save({"splats": splats()}, whole)
    assert "packed files" in refused(archive(tmp_path / "a.pt", b"}." * 999, compression=zipfile.ZIP_DEFLATED))
    (tmp_path / "a.pt").write_bytes(whole.getvalue()[:-30])
    assert "damaged zip archive" in refused(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as out:
        out.writestr("meta.json", "{}")
    assert "0 files data.pkl" in refused(tmp_path / "a.pt")
