"""The adapter, on untrained pipelines of the real classes; and what is said when a model is not there."""

import builtins
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import tiny_models as tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from splatedit.diffusion import Text, guided, repeat, sample_draw, scaled_linear, scales, to_eps_x0
from splatedit.errors import InputError
from splatedit.guidance import GUIDANCE, Request, ids
from splatedit.pocket import FOLDER
from splatedit.priors import Prior, check_prior, find_prompt, load_prior, quiet
from splatedit.tuning import bind

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
]
DIFFUSION = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers on its own settings
needs_weights = pytest.mark.skipif(
    not (FOLDER / "model_index.json").is_file(), reason="the weights of pocket are not committed yet"
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd"
    tiny.sd("v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    return tiny.pocket_folder(tmp_path_factory.mktemp("models") / "pocket")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(b=2, side=tiny.SIDE // 2, seed=0):
    return torch.randn(b, 4, side, side, generator=seeded(seed))


# -------------------------------------------------------------------------------------------------------------- denoise
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_is_turned_into_noise(kind):
    pipeline = tiny.sd(kind)
    prior, x, t = Prior(pipeline), latents(3), torch.tensor([1, 500, 999])
    text = prior.text(["a cat", "a pig", "a cat"])
    output = pipeline.unet(x, t, encoder_hidden_states=text.embeds).sample
    a, s = scales(scaled_linear(), t, x)
    found = prior.denoise(x, t, text)
    torch.testing.assert_close(found, to_eps_x0(output, x, a, s, kind)[0], rtol=1e-4, atol=1e-5)
    if kind != "epsilon":
        assert (found - output).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_scheduler_makes_no_difference(kind):
    x, t, found = latents(), torch.tensor([300, 900]), []
    for scheduler in SCHEDULERS:
        prior = Prior(tiny.sd(kind, scheduler))
        assert prior.alphas_cumprod.dtype == torch.float32 and prior.alphas_cumprod.shape == (1000,)
        found.append(prior.denoise(x, t, prior.text(["a cat", "a pig"])))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)
    assert (found[0][0] - found[0][1]).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_schedule_that_ends_in_pure_noise_stays_finite(scheduler):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    prior = Prior(tiny.sd("v_prediction", scheduler, **options))
    assert prior.alphas_cumprod[-1] < 1e-6
    z, text = latents(), prior.text(["a cat", "a pig"])
    at_the_end = prior.denoise(z, torch.tensor([999, 999]), text)
    torch.testing.assert_close(at_the_end, z, atol=1e-3, rtol=0)  # v says nothing of the noise there: all is noise
    draw = sample_draw(prior.alphas_cumprod, z, (0.98, 1.0), seeded())
    grad = ids(guided(prior.denoise, prior.null(), 7.5), z, draw, Request(text, text, z + 0.1))
    assert grad.isfinite().all()


def test_evaluations_are_counted_in_rows():
    prior = Prior(tiny.sd())
    z, texts = latents(3), [repeat(prior.text([p]), 3) for p in ("a pig", "a cat")]
    for name, rows in {"sds": 6, "dds": 12, "pds": 12, "cds": 12 + 3, "ids": 3 * 6 + 12}.items():
        before = prior.evaluations
        draw = sample_draw(prior.alphas_cumprod, z, (0.1, 0.9), seeded())
        options = bind(name, prior, seeded())
        GUIDANCE[name](guided(prior.denoise, prior.null(1), 7.5), z, draw, Request(*texts, z), **options)
        assert prior.evaluations - before == rows


def test_gradients_flow_through_the_network_and_to_no_parameter():
    prior = Prior(tiny.sd())
    x = latents().requires_grad_()
    prior.denoise(x, torch.tensor([300, 700]), prior.text(["a cat", "a pig"])).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().min()) > 0
    parameters = [p for m in (prior.unet, prior.vae, prior.pipeline.text_encoder) for p in m.parameters()]
    assert parameters and not any(p.requires_grad for p in parameters)


def test_checkpointing_saves_activations_and_changes_no_number(sd_folder):
    plain, saving = load_prior(str(sd_folder)), load_prior(str(sd_folder), checkpointing=True)
    assert saving.unet.is_gradient_checkpointing and not plain.unet.is_gradient_checkpointing
    grads, kept = [], []
    for prior in (plain, saving):
        x, sizes = latents().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, n=sizes: (n.append(v.numel()), v)[1], lambda v: v):
            out = prior.denoise(x, torch.tensor([300, 700]), prior.text(["a cat", "a pig"]))
        out.square().sum().backward()
        grads.append(x.grad)
        kept.append(sum(sizes))
    assert torch.equal(*grads)
    assert kept[1] < kept[0] / 2


# ------------------------------------------------------------------------------------------------------- encode, decode
@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_encode_is_differentiable_deterministic_and_scaled(kind):
    vae = tiny.autoencoder(kind, scaling_factor=0.5)
    prior = Prior(tiny.sd(vae=vae))
    images = torch.rand(2, 3, tiny.SIDE, tiny.SIDE, generator=seeded()).requires_grad_()
    z = prior.encode(images)
    assert z.shape == (2, 4, 8, 8) and z.dtype == torch.float32
    raw = vae.encode(images * 2 - 1)
    raw = raw.latent_dist.mode() if kind == "kl" else raw.latents
    torch.testing.assert_close(z, raw * 0.5)
    assert torch.equal(z, prior.encode(images))
    (grad,) = torch.autograd.grad(z.square().sum(), images)
    assert grad.shape == images.shape and float(grad.abs().min()) > 0
    back = prior.decode(z)
    assert back.shape == images.shape and back.dtype == torch.float32
    assert bool((back >= 0).all()) and bool((back <= 1).all())
    torch.testing.assert_close(back, (vae.decode(z / 0.5).sample / 2 + 0.5).clamp(0, 1))


def test_an_autoencoder_with_an_offset_or_with_statistics():
    images = torch.rand(1, 3, tiny.SIDE, tiny.SIDE, generator=seeded())
    vae = tiny.autoencoder("kl", scaling_factor=2.0, shift_factor=0.25)
    raw = vae.encode(images * 2 - 1).latent_dist.mode()
    prior = Prior(tiny.sd(vae=vae))
    torch.testing.assert_close(prior.encode(images), (raw - 0.25) * 2)
    torch.testing.assert_close(prior.decode(prior.encode(images)), (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1))
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae.register_to_config(shift_factor=None, latents_mean=mean, latents_std=std)
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
    torch.testing.assert_close(prior.encode(images), (raw - mean) / std * 2)
    torch.testing.assert_close(prior.decode(prior.encode(images)), (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1))


# ----------------------------------------------------------------------------------------------------------------- text
def test_text_is_what_the_pipeline_itself_would_use():
    pipeline = tiny.sd()
    prior = Prior(pipeline)
    told, null = pipeline.encode_prompt(["a cat", "a pig"], "cpu", 1, True)
    torch.testing.assert_close(prior.text(["a cat", "a pig"]).embeds, told)
    torch.testing.assert_close(prior.null(2).embeds, null)
    assert torch.equal(prior.text([""]).embeds, prior.null(1).embeds), "the empty prompt is the null text"
    assert prior.text(["a"]).pooled is None and not prior.text(["a"]).embeds.requires_grad


def test_a_prompt_too_long_for_the_text_encoder_is_told():
    with pytest.raises(InputError, match="30 tokens long, .* reads 24"):
        Prior(tiny.sd()).text(["a" * 28])


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_has_two_text_encoders_pooled_embeddings_and_sizes(zeros):
    pipeline = tiny.sdxl(force_zeros_for_empty_prompt=zeros)
    prior = Prior(pipeline)
    told, null, pooled, null_pooled = pipeline.encode_prompt(["a cat"], device="cpu")
    text, empty = prior.text(["a cat"]), prior.null(1)
    assert text.embeds.shape == (1, tiny.LONGEST, 48) and text.pooled.shape == (1, 32)
    torch.testing.assert_close(text.embeds, told)
    torch.testing.assert_close(text.pooled, pooled)
    torch.testing.assert_close(empty.embeds, null)
    torch.testing.assert_close(empty.pooled, null_pooled)
    assert text.ids.tolist() == [[16, 16, 0, 0, 16, 16]] and prior.image_size == 16
    x, t = latents(2), torch.tensor([300, 900])
    found = prior.denoise(x, t, repeat(text, 2))
    extra = {"text_embeds": pooled.expand(2, -1), "time_ids": text.ids.expand(2, -1)}
    output = pipeline.unet(x, t, encoder_hidden_states=told.expand(2, -1, -1), added_cond_kwargs=extra).sample
    torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-5)


def test_every_guidance_runs_on_sdxl():
    prior = Prior(tiny.sdxl(scheduler=EulerDiscreteScheduler))
    z, texts = latents(2), [prior.text([p] * 2) for p in ("a pig", "a cat")]
    draw = sample_draw(prior.alphas_cumprod, z, (0.1, 0.9), seeded())
    for name, guidance in GUIDANCE.items():
        options = bind(name, prior, seeded())
        grad = guidance(guided(prior.denoise, prior.null(1), 7.5), z, draw, Request(*texts, z), **options)
        assert grad.shape == z.shape and grad.isfinite().all() and float(grad.std()) > 0


# ---------------------------------------------------------------------------------------------------------------- dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_network_alone_computes_in_half_precision(dtype):
    exact, prior = Prior(tiny.sd()), Prior(tiny.sd(), dtype=dtype)
    assert {p.dtype for p in prior.unet.parameters()} == {dtype}
    images = torch.rand(2, 3, tiny.SIDE, tiny.SIDE, generator=seeded()).requires_grad_()
    z = prior.encode(images)
    text = prior.text(["a cat", "a pig"])
    ehat = prior.denoise(z, torch.tensor([300, 700]), text)
    assert {z.dtype, text.embeds.dtype, ehat.dtype, prior.decode(z).dtype} == {torch.float32}
    assert prior.alphas_cumprod.dtype == torch.float32
    ehat.sum().backward()
    assert images.grad.dtype == torch.float32 and images.grad.isfinite().all()
    reference = exact.denoise(z, torch.tensor([300, 700]), exact.text(["a cat", "a pig"]))
    assert (ehat - reference).norm() < 0.05 * reference.norm()


def test_double_precision_in_double_precision_out():
    prior = Prior(tiny.sd("v_prediction"), dtype=torch.float64)
    assert prior.denoise(latents().double(), torch.tensor([300, 700]), prior.null(2)).dtype == torch.float64


def test_an_autoencoder_that_overflows_in_half_precision_is_kept_in_single():
    prior = Prior(tiny.sdxl(), dtype=torch.float16)
    assert {p.dtype for p in prior.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in prior.unet.parameters()} == {torch.float16}
    assert {p.dtype for p in Prior(tiny.sdxl(), dtype=torch.bfloat16).vae.parameters()} == {torch.bfloat16}
    calm = Prior(tiny.sd(vae=tiny.autoencoder(force_upcast=False)), dtype=torch.float16)
    assert {p.dtype for p in calm.vae.parameters()} == {torch.float16}
    images = torch.rand(1, 3, tiny.SIDE, tiny.SIDE)
    assert prior.decode(prior.encode(images)).dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu_the_networks_are_half_precision_and_agree_with_the_cpu(sd_folder):
    prior, exact = load_prior(str(sd_folder), "cuda"), load_prior(str(sd_folder))
    assert prior.dtype == torch.float16 and prior.alphas_cumprod.device.type == "cuda"
    z = latents()
    for name, guidance in GUIDANCE.items():
        grads = []
        for p in (exact, prior):
            z_ = z.to(p.device)
            draw = sample_draw(p.alphas_cumprod, z_, (0.1, 0.9), seeded())
            request = Request(p.text(["a pig"] * 2), p.text(["a cat"] * 2), z_ * 0.9)
            options = bind(name, p, seeded())
            grads.append(guidance(guided(p.denoise, p.null(1), 7.5), z_, draw, request, **options).cpu())
        assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


# -------------------------------------------------------------------------------------------------------------- loading
def test_a_folder_loads_as_the_pipeline_it_was_saved_from(sd_folder, capfd, recwarn):
    prior = load_prior(str(sd_folder))
    assert prior.name == str(sd_folder) and prior.image_size == tiny.SIDE and prior.latent_channels == 4
    assert prior.vocabulary is None and prior.device == torch.device("cpu") and prior.dtype == torch.float32
    x, t, text = latents(), torch.tensor([300, 900]), prior.text(["a cat", "a pig"])
    assert capfd.readouterr() == ("", "") and not recwarn.list, "not a word"
    original = Prior(tiny.sd("v_prediction"))
    expected = original.denoise(x, t, original.text(["a cat", "a pig"]))
    torch.testing.assert_close(prior.denoise(x, t, text), expected, rtol=0, atol=1e-6)


def test_a_safety_checker_that_was_never_downloaded_is_not_missed(sd_folder, tmp_path):
    folder = copied(sd_folder, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    check_prior(str(folder))
    assert load_prior(str(folder)).image_size == tiny.SIDE


def test_half_precision_files_are_read_when_they_are_wanted_or_all_there_is(tmp_path):
    folder = tmp_path / "both"
    tiny.sd(seed=1).save_pretrained(folder)
    tiny.sd(seed=2).to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    first = {seed: next(tiny.sd(seed=seed).unet.parameters()) for seed in (1, 2)}
    single, half = load_prior(str(folder)), load_prior(str(folder), dtype=torch.float16)
    torch.testing.assert_close(next(single.unet.parameters()), first[1].detach())
    torch.testing.assert_close(next(half.unet.parameters()), first[2].detach().half())
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            if ".fp16." not in file.name:
                file.unlink()
    check_prior(str(folder))
    only = load_prior(str(folder))
    assert only.dtype == torch.float32
    torch.testing.assert_close(next(only.unet.parameters()), first[2].detach().half().float())


def test_loading_takes_no_torchvision_and_checking_takes_no_torch(sd_folder):
    code = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed
from splatedit.priors import check_prior, load_prior
check_prior(sys.argv[1])
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
print(load_prior(sys.argv[1]).image_size)
"""
    done = subprocess.run([sys.executable, "-c", code, sd_folder], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "16\n", "")


# ---------------------------------------------------------------------------------------------------- what is not there
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("model_index.json", "model_index.json is missing"),
        (
            "unet/diffusion_pytorch_model.safetensors",
            "unet/ holds no weights; expected unet/diffusion_pytorch_model.saf",
        ),
        ("text_encoder/model.safetensors", "text_encoder/ holds no weights; expected text_encoder/model.safetensors"),
        ("vae/config.json", "vae/config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json is missing"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json or tokenizer/vocab.json is missing"),
    ],
)
def test_a_missing_file_is_named(gone, named, sd_folder, tmp_path):
    folder = copied(sd_folder, tmp_path)
    (folder / gone).unlink()
    for call in (check_prior, load_prior):
        message = complaint(call, str(folder))
        assert str(folder) in message and named in message


def test_a_missing_component_and_a_missing_piece_are_named(sd_folder, tmp_path):
    folder = copied(sd_folder, tmp_path)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    pieces = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weights.rename(folder / "unet" / pieces[0])
    index = {"metadata": {}, "weight_map": {"a": pieces[0], "b": pieces[1]}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert f"unet/{pieces[1]} is missing" in complaint(check_prior, str(folder))
    shutil.rmtree(folder / "unet")
    assert "the folder unet/ is missing" in complaint(check_prior, str(folder))


@pytest.mark.parametrize("damage", ["cut", "pointer", "rubbish", "index"])
def test_a_damaged_file_is_named(damage, sd_folder, tmp_path):
    folder = copied(sd_folder, tmp_path)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    expected = f"{folder}: vae/{weights.name} "
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        expected += "is "
    elif damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        expected += "is a git-lfs pointer"
    elif damage == "rubbish":
        weights.write_bytes(os.urandom(1000))
        expected += "is damaged"
    else:
        (folder / "model_index.json").write_text("{")
        expected = f"{folder}/model_index.json: cannot be read as JSON"
    assert complaint(check_prior, str(folder)).startswith(expected)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("pockt", "did you mean 'pocket'?"),
        ("Pocket", "did you mean 'pocket'?"),
        ("dreamer", "choose pocket, a folder, or a hub id (stable-diffusion-v1-5/stable-diffusion-v1-5)"),
        ("", "choose pocket"),
        ("./nowhere", "no such folder"),
        ("~/no/where", "no such folder"),
        ("/no/where", "no such folder"),
        ("owner/na me", "no hub id either; expected owner/name"),
        ("owner/-name", "no hub id either; expected owner/name"),
        ("own--er/name", "no hub id either; expected owner/name"),
        ("a/b/c", "no such folder"),
        ("runwayml/stable-diffusion-v1-5", "not in the cache of the hub, which may not be asked (offline)"),
    ],
)
def test_a_model_that_is_not_there_is_told_at_once(model, named):
    start = time.perf_counter()
    assert named in complaint(check_prior, model, offline=True)
    assert named in complaint(load_prior, model, offline=True)
    assert time.perf_counter() - start < 5  # a second of it is the first import of the hub's client


def test_a_single_file_is_told_apart_from_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "a file; expected a diffusers folder" in complaint(check_prior, str(path))


def test_a_model_of_another_family_is_told(sd_folder, tmp_path):
    folder = copied(sd_folder, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = index.pop("unet")
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusion3Pipeline"}))
    assert "a StableDiffusion3Pipeline without unet; expected Stable Diff" in complaint(check_prior, str(folder))
    pipeline = tiny.sd()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert "FlowMatchEulerDiscreteScheduler has no alphas_cumprod" in complaint(Prior, pipeline)
    pipeline = tiny.sd()
    pipeline.unet = tiny.unet(in_channels=9)
    assert "maps 9 channels to 4, expected 4 to 4; inpainting" in complaint(Prior, pipeline)
    assert "without text_encoder" in complaint(Prior, no_text_encoder())


def no_text_encoder():
    pipeline = tiny.sd()
    pipeline.text_encoder = None
    return pipeline


def test_what_diffusers_cannot_read_is_one_line(sd_folder, tmp_path):
    folder = copied(sd_folder, tmp_path)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [8, 24]}))
    message = complaint(load_prior, str(folder))
    assert message.startswith(f"{folder}: cannot be loaded as a diffusers pipeline (")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client asks for when it downloads a model."""

    models: dict[str, Path]
    asked: list[str]

    def do_HEAD(self):
        path = unquote(self.path.split("?")[0])
        self.asked.append(path)
        if path.startswith("/api/models/"):
            _, _, _, owner, model, *rest = path.split("/")
            self.describe(f"{owner}/{model}", rest)
        else:
            _, owner, model, _, _, file = path.split("/", 5)
            self.send(200, (self.models[f"{owner}/{model}"] / file).read_bytes())

    do_GET = do_HEAD

    def describe(self, name, rest):
        if name == "gated/model":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if name not in self.models:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        folder = self.models[name]
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        names = [p.relative_to(folder).as_posix() for p in files]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": n}
                for n, p in zip(names, files, strict=True)
            ]
            return self.send(200, json.dumps(entries).encode())
        siblings = [{"rfilename": n} for n in names]
        return self.send(200, json.dumps({"id": name, "sha": "0" * 40, "siblings": siblings}).encode())

    def send(self, status, body, headers=None):
        self.send_response(status)
        etag = hashlib.sha256(body).hexdigest()
        for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


VISIT = """
import json, sys, time
from pathlib import Path
import torch
from splatedit.errors import InputError
from splatedit.priors import check_prior, load_prior
for line in sys.stdin:
    call, model, options = json.loads(line)
    for name in options.pop("remove", []):
        next(Path(options["home"]).rglob(name)).unlink()
    options.pop("home", None)
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    start = time.perf_counter()
    try:
        answer = str(globals()[call](model, **options) and "loaded")
    except InputError as error:
        answer = str(error)
    print(json.dumps([answer, time.perf_counter() - start]), flush=True)
"""


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine and a process that may ask it: `hub.ask(call, model, **options)` -> (answer, seconds)."""
    handler = type("Handler", (Hub,), {"models": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [sys.executable, "-c", VISIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=env
    )

    def ask(call, model, **options):
        print(json.dumps([call, model, options]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield SimpleNamespace(models=handler.models, asked=handler.asked, ask=ask, server=server, home=tmp_path / "home")
    process.stdin.close()
    process.wait(timeout=30)
    server.shutdown()


def test_a_hub_model_is_fetched_once_and_whatever_goes_wrong_is_one_line(sd_folder, hub, tmp_path):
    folder = copied(sd_folder, tmp_path)
    tiny.sd("v_prediction").to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"never asked for")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("nothing here")
    hub.models |= {"some/model": folder, "bare/model": tmp_path / "bare"}

    assert hub.ask("check_prior", "some/model")[0] == "None", "not there yet, but the hub may have it"
    assert hub.asked == []
    assert (
        "not in the cache of the hub, which may not be asked" in hub.ask("check_prior", "some/model", offline=True)[0]
    )
    assert hub.ask("load_prior", "some/model", dtype="float16")[0] == "loaded"
    weights = sorted({p.split("/", 5)[5] for p in hub.asked if p.endswith(".safetensors")})
    assert weights == [f"{part}.fp16.safetensors" for part in ("text_encoder/model", *DIFFUSION)], "half, and no more"

    hub.asked.clear()
    assert hub.ask("load_prior", "some/model", dtype="float16")[0] == "loaded"
    assert hub.asked == [], "a whole copy in the cache is asked for nothing"

    assert "the hub wants its licence accepted and a log-in" in hub.ask("load_prior", "gated/model")[0]
    assert "no such folder here and no such model on the hub" in hub.ask("load_prior", "no/model")[0]
    assert "without model_index.json: not a diffusers pipeline" in hub.ask("load_prior", "bare/model")[0]

    hub.server.shutdown()
    hub.server.server_close()
    gone = ["diffusion_pytorch_model.fp16.safetensors"]
    missing, seconds = hub.ask("check_prior", "some/model", offline=True, remove=gone, home=str(hub.home))
    assert "/ holds no weights; expected " in missing and missing.startswith("some/model: ") and seconds < 1
    answer, seconds = hub.ask("load_prior", "some/model")
    assert answer.startswith("some/model: not in the cache of the hub, and the hub does not answer (") and seconds < 20


# ----------------------------------------------------------------------------------------------------------- vocabulary
def test_pocket_is_an_ordinary_folder_with_a_vocabulary(pocket):
    prior = load_prior(str(pocket))
    assert prior.vocabulary == ("a cat", "a pig", "an elephant") and prior.image_size == 128
    assert prior.latent_channels == 4 and prior.dtype == torch.float32
    images = torch.rand(1, 3, 128, 128, generator=seeded())
    z = prior.encode(images)
    assert z.shape == (1, 4, 16, 16)
    torch.testing.assert_close(z, prior.vae.encode(images * 2 - 1).latents * 1.25)
    text = prior.text(["A cat, on a blue background!"])
    assert torch.equal(text.embeds, prior.text(["a cat on a blue background"]).embeds)
    assert not torch.equal(text.embeds, prior.text(["a cat"]).embeds)
    assert prior.denoise(z, torch.tensor([500]), text).shape == z.shape


def test_an_unknown_word_is_told_with_what_is_known(pocket):
    prior = load_prior(str(pocket))
    message = complaint(prior.text, ["a cat", "a purple elefant and a dragon"])
    assert message.startswith(
        f"prompt 'a purple elefant and a dragon': the model {str(pocket)!r} does not know 'elefant', "
    )
    assert "'dragon' (did you mean 'elephant'?)" in message and " cat, " in message and " pig, " in message
    assert "--model stable-diffusion-v1-5/stable-diffusion-v1-5" in message
    prior.text([""])


def test_the_words_of_a_prompt_are_those_its_tokenizer_sees(pocket):
    prior = load_prior(str(pocket))
    unknown = prior.pipeline.tokenizer.unk_token_id
    for prompt in ("A CAT", "a cat-pig", "ａ ｃａｔ", "a cat_pig", "a dog", "a\tcat\n", "a cat's", "naïve"):
        told = unknown not in prior.pipeline.tokenizer(prompt).input_ids
        try:
            prior.check_words(prompt)
        except InputError:
            assert not told, prompt
        else:
            assert told, prompt


def test_the_guidance_scale_comes_from_the_vocabulary_or_the_kind_of_model(pocket, tmp_path):
    small = load_prior(str(pocket))
    threes = dict.fromkeys(GUIDANCE, 3.0)
    assert {g: small.default_scale(g) for g in GUIDANCE} == {**threes, "sds": 7.5, "pds": 7.5}
    full = Prior(tiny.sd())
    assert {g: full.default_scale(g) for g in GUIDANCE} == {**dict.fromkeys(GUIDANCE, 7.5), "sds": 100.0, "pds": 100.0}
    vocabulary = {"prompts": ["a cat"], "words": ["a", "cat"], "guidance_scale": {"ids": 4}}
    told = Prior(tiny.sd(), vocabulary=vocabulary)
    assert {g: told.default_scale(g) for g in GUIDANCE} == {**threes, "sds": 7.5, "pds": 7.5, "ids": 4.0}
    assert isinstance(told.default_scale("ids"), float)


def test_a_vocabulary_without_its_lists_is_told(sd_folder, tmp_path):
    folder = copied(sd_folder, tmp_path)
    (folder / "vocabulary.json").write_text('{"prompts": []}')
    assert complaint(load_prior, str(folder)) == f"{folder}/vocabulary.json: words missing, expected lists of text."


class Classifier(Prior):
    """A prior of 24 prompts that sees number 7 everywhere: the noise it predicts for prompt k is off by |k - 7|."""

    def __init__(self):
        prompts = [f"a {chr(97 + k)}" for k in range(24)]
        super().__init__(tiny.sd(), vocabulary={"prompts": prompts, "words": ["a"]})
        self.noise = seeded(5)

    def text(self, prompts):
        return Text(torch.tensor([float(self.vocabulary.index(p)) for p in prompts]).view(-1, 1, 1))

    def denoise(self, x, t, text):
        self.evaluations += len(x)
        off = 0.02 * (text.embeds - 7).abs().view(-1, 1, 1, 1)
        return self.true_noise(x, t) + off + 0.05 * torch.randn(x.shape, generator=self.noise)

    def true_noise(self, x, t):
        a, s = scales(self.alphas_cumprod, t, x)
        return x / s  # the views are zero


def test_the_prompt_of_a_scene_is_found_in_few_evaluations():
    prior = Classifier()
    found, table = find_prompt(prior, torch.zeros(12, 4, 8, 8), seeded())
    assert found == "a h" and next(iter(table)) == "a h"
    assert set(table) == set(prior.vocabulary)
    assert prior.evaluations == 480
    assert list(table)[:3] == sorted(list(table)[:3], key=table.__getitem__)
    again, same = find_prompt(Classifier(), torch.zeros(12, 4, 8, 8), seeded())
    assert (again, same) == (found, table)
    assert find_prompt(Classifier(), torch.zeros(2, 4, 8, 8), seeded())[0] == "a h", "from two views as well"


def test_a_model_without_a_vocabulary_finds_nothing():
    prior = Prior(tiny.sd())
    assert find_prompt(prior, latents(), seeded()) == ("", {})
    assert prior.evaluations == 0


def test_pocket_loads_with_stock_diffusers(pocket):
    draws_a_picture(pocket, "a cat")


def draws_a_picture(folder, prompt):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt, num_inference_steps=2, generator=seeded(), output_type="np").images[0]
    assert image.shape == (128, 128, 3) and image.std() > 0.01


# --------------------------------------------------------------------------------------------- the bundled model itself
@needs_weights
def test_the_bundled_model_draws_with_stock_diffusers():
    draws_a_picture(FOLDER, "a cat")


@needs_weights
def test_the_bundled_model_is_whole_small_and_knows_its_words():
    check_prior("pocket")
    prior = load_prior("pocket")
    assert prior.name == "pocket" and len(prior.vocabulary) >= 24 and {"a cat", "a pig"} <= set(prior.vocabulary)
    prior.text(list(prior.vocabulary))
    with pytest.raises(InputError, match="the model 'pocket' does not know 'dragon'"):
        prior.text(["a dragon"])
    sizes = [f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()]
    assert max(sizes) <= 16 * 2**20 and sum(sizes) <= 40 * 2**20


@needs_weights
def test_the_bundled_model_tells_its_own_pictures_apart():
    """A cat that the model drew is a cat to it: sampled, decoded, encoded again, then classified."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.set_num_threads(2)
    prior = load_prior("pocket")
    pipeline = StableDiffusionPipeline(**{**prior.pipeline.components, "requires_safety_checker": False})
    pipeline.scheduler = DDIMScheduler.from_config(prior.pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a cat"] * 2, num_inference_steps=20, guidance_scale=3.0, generator=seeded(), output_type="pt")
    with torch.no_grad():
        found, table = find_prompt(prior, prior.encode(images.images), seeded())
    assert "a cat" in list(table)[:2], f"taken for {found}"


def test_what_libraries_say_when_they_are_imported_is_not_heard(monkeypatch):
    """In a notebook without ipywidgets tqdm asks for them."""
    original = builtins.__import__

    def aloud(name, *rest):
        if name.startswith(("diffusers", "transformers")):
            warnings.warn("IProgress not found", stacklevel=2)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", aloud)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            pass
