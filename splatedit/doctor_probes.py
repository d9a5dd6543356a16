"""What `splatedit doctor` tries, each in a process of its own: `python -m splatedit.doctor_probes NAME`.

A probe prints its facts as lines of JSON that begin with {"probe"; whatever else it prints is for whoever looks for the
reason that it failed.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

LINES = 12


def tell(**facts: Any) -> None:
    """Print facts at once: the process may not live long."""
    print(json.dumps({"probe": "", **facts}), flush=True)


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as facts."""
    lines = [line for line in traceback.format_exc().splitlines() if line.strip()]
    first = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
    return {"ok": False, "error": said[:300], "lines": lines[-LINES:]}


def torch() -> None:
    """Version, CUDA and the GPUs."""
    import torch

    gpus, reason = [], ""
    try:
        if torch.version.cuda:
            torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            free, total = torch.cuda.mem_get_info(index)
            name, known = torch.cuda.get_device_name(index), supported(major, minor, torch.cuda.get_arch_list())
            gpus.append(
                {"name": name, "total": total, "free": free, "capability": f"{major}.{minor}", "supported": known}
            )
    except Exception as error:  # a driver that is not there or too old
        reason = failure(error)["error"]
    tell(
        version=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.version.cuda else None,
        threads=torch.get_num_threads(),
        architectures=torch.cuda.get_arch_list() if gpus else [],
        gpus=gpus,
        reason=reason,
    )


def supported(major: int, minor: int, architectures: list[str]) -> bool:
    """Whether code for these runs on such a GPU: binaries within a major version upwards, PTX on anything newer."""
    for one in architectures:
        kind, _, number = one.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        if not digits:
            continue
        theirs = divmod(int(digits), 10)
        if theirs <= (major, minor) and (kind == "compute" or theirs[0] == major):
            return True
    return not architectures


def libraries() -> None:
    """Import each package; those up to the one named in SPLATEDIT_DOCTOR_AFTER, where a process ended, are left out."""
    from splatedit.doctor import LIBRARIES

    names, after = list(LIBRARIES), os.environ.get("SPLATEDIT_DOCTOR_AFTER")
    for name in names[names.index(after) + 1 :] if after else names:
        try:
            module = importlib.import_module(name)
            tell(name=name, ok=True, version=version(name, module))
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            tell(name=name, missing=missing, **failure(error))


def version(name: str, module: Any) -> str:
    """Of an imported package."""
    import importlib.metadata

    from splatedit.doctor import DISTRIBUTIONS

    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def codecs() -> None:
    """Write and read a small picture and a small film."""
    for what, code in {"png": try_picture, "webp": try_picture, "h264": try_film}.items():
        try:
            code(what)
            tell(what=what, ok=True)
        except Exception as error:
            tell(what=what, **failure(error))


def try_picture(kind: str) -> None:
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.new("RGB", (16, 16), (200, 100, 50))
    picture.save(stream, format=kind, lossless=True)
    if Image.open(stream).convert("RGB").getpixel((3, 3)) != (200, 100, 50):
        raise RuntimeError("another picture is read than was written")


def try_film(kind: str) -> None:
    import av
    import numpy as np

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        film = container.add_stream("libx264", rate=10)
        film.width, film.height, film.pix_fmt = 32, 32, "yuv420p"
        for shade in (50, 100, 150):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
            container.mux(film.encode(frame))
        container.mux(film.encode())
    stream.seek(0)
    with av.open(stream) as container:
        if sum(1 for _ in container.decode(video=0)) != 3:
            raise RuntimeError("three pictures were written, not as many read")


def gsplat() -> None:
    """Build or load gsplat's CUDA extension, and say so; what the compiler says goes to stdout and stderr."""
    start = time.perf_counter()
    try:
        if importlib.import_module("gsplat.cuda._backend")._C is None:
            raise RuntimeError("no CUDA toolkit found")
        tell(ok=True, seconds=time.perf_counter() - start)
    except Exception as error:
        traceback.print_exc()
        tell(**failure(error))


def render() -> None:
    """A small scene by every backend that can draw here, beside the plain-torch twin."""
    import torch

    for backend, device in (("cpu", "cpu"), ("gsplat", "cuda")):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        try:
            expected, slopes = draw("torch", device)
            draw(backend, device)  # compiled now
            start = time.perf_counter()
            picture, gradients = draw(backend, device)
            seconds = time.perf_counter() - start
            pairs = zip(gradients, slopes, strict=True)
            steep = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)
            close = float((picture - expected).abs().max())
            tell(backend=backend, ok=True, picture=close, gradient=steep, ms=1000 * seconds)
        except Exception as error:
            tell(backend=backend, **failure(error))


def draw(backend: str, device: str) -> tuple[Any, list[Any]]:
    """Forty splats on 32x32 pixels: the picture, and the gradients of a weighed sum of it."""
    import torch

    from splatedit.render import rasterization

    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Any:
        return torch.rand(shape, generator=generator)

    n, size = 40, 32
    given = {
        "means": numbers(n, 3) * 2 - 1 + torch.tensor([0.0, 0.0, 4.0]),
        "quats": numbers(n, 4) + 0.1,
        "scales": numbers(n, 3) * 0.3 + 0.05,
        "opacities": numbers(n) * 0.8 + 0.1,
        "colors": numbers(n, 4, 3) - 0.5,
    }
    weights = numbers(1, size, size, 3)
    given = {name: tensor.to(device).requires_grad_() for name, tensor in given.items()}
    K = torch.tensor([[[40.0, 0.0, 16.0], [0.0, 40.0, 16.0], [0.0, 0.0, 1.0]]], device=device)
    view = torch.eye(4, device=device)[None]
    more: dict[str, Any] = {"viewmats": view, "Ks": K, "width": size, "height": size, "sh_degree": 1}
    image, _, _ = rasterization(**given, **more, backend=backend)
    (image * weights.to(device)).sum().backward()
    return image.detach(), [tensor.grad for tensor in given.values()]


def model() -> None:
    """Whether the bundled model answers, and how fast."""
    try:
        import torch

        from splatedit.priors import load_prior

        prior = load_prior("pocket", offline=True)
        side = prior.image_size
        with torch.no_grad():
            z = prior.encode(torch.full((1, 3, side, side), 0.5))
            text, step = prior.text(["a cat"]), torch.tensor([500])
            prior.denoise(z, step, text)
            start = time.perf_counter()
            answer = prior.denoise(z, step, text)
            seconds = time.perf_counter() - start
        if not bool(answer.isfinite().all()) or answer.shape != z.shape:
            raise RuntimeError("its answer is not finite, or of another shape than asked")
        tell(ok=True, ms=1000 * seconds)
    except Exception as error:
        tell(**failure(error))


PROBES: dict[str, Callable[[], None]] = {
    "torch": torch,
    "libraries": libraries,
    "codecs": codecs,
    "gsplat": gsplat,
    "render": render,
    "model": model,
}

if __name__ == "__main__":
    PROBES[sys.argv[1]]()
