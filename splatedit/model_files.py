"""Where a model's files are, and whether they are all there: names, diffusers folders, the cache of the hub.

No torch here: a model that is missing, or half downloaded, is told before anything slow begins.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from splatedit.errors import InputError
from splatedit.pocket import FOLDER

NAMES = {"pocket": FOLDER}
EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FAMILY = "Stable Diffusion 1.x, 2.x or XL, or a model built like them"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that no edit needs
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # components with weights
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKSUMS = "SHA256SUMS"  # a file of the bundled model
PATIENCE = 10.0  # seconds the hub has for its first answer


def locate(model: str, offline: bool = False) -> Path | None:
    """The folder of a model by name, path, or hub id with a copy in the cache; None for a hub id without one.

    A copy in the cache that is not whole counts only if `offline`, when there is nothing better. Raises InputError if
    `model` can be none of these.
    """
    if model in NAMES:
        return NAMES[model]
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.is_file():
        raise InputError(
            f"{model}: a file; expected a diffusers folder (diffusers' from_single_file and save_pretrained make one)."
        )
    looks_like_path = model.startswith((".", "~", "/", "\\")) or model.count("/") > 1 or "\\" in model
    if looks_like_path or model.endswith("/"):
        raise InputError(f"{model}: no such folder; expected a diffusers folder, which holds model_index.json.")
    if "/" not in model:
        near = difflib.get_close_matches(model.lower(), NAMES, n=1)
        choices = f"choose {', '.join(NAMES)}, a folder, or a hub id ({EXAMPLE})."
        hint = f"did you mean {near[0]!r}?" if near else choices
        raise InputError(f"model: {model!r} is neither a known name nor a folder; {hint}")
    if not HUB_ID.fullmatch(model) or "--" in model or ".." in model:
        raise InputError(f"model: {model!r} is no folder, and no hub id either; expected owner/name, as in {EXAMPLE}.")
    return cached(model, offline)


def cached(model: str, offline: bool) -> Path | None:
    """The snapshot of a hub model in the cache, if any; unless `offline` it must have all that loading needs."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(model, "model_index.json")
    if not isinstance(index, str):  # None, or a mark that the hub is known not to have it
        return None
    folder = Path(index).parent
    try:
        check_folder(folder, model)
    except InputError:
        return folder if offline or hub_is_off() else None
    return folder


def hub_is_off() -> bool:
    """Whether the environment (HF_HUB_OFFLINE) forbids asking the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def check_folder(folder: Path, model: str) -> None:
    """Raise InputError naming the first thing a diffusers folder lacks: an index, a component, a weight file."""
    place = folder if model in NAMES or folder == Path(model).expanduser() else model
    if not (folder / "model_index.json").is_file():
        if model in NAMES:
            raise InputError(f"model {model!r}: {folder} holds no weights; reinstall splatedit.")
        raise InputError(f"{place}: model_index.json is missing; expected a diffusers folder.")
    index = read_json(folder / "model_index.json")
    parts = components(index)
    for part in ("unet", "vae", "scheduler"):
        if part not in parts:
            raise InputError(f"{place}: a {index.get('_class_name')} without {part}; expected {FAMILY}.")
    for part in parts:
        check_component(folder / part, part, str(place))


def components(index: dict[str, Any]) -> list[str]:
    """Names of the components that a model_index.json promises and an edit needs."""
    entries = ((k, v) for k, v in index.items() if isinstance(v, list) and len(v) == 2 and k not in UNUSED)
    return [name for name, (library, _) in entries if library is not None]


def check_component(folder: Path, part: str, place: str) -> None:
    """Raise InputError naming what one component lacks."""
    if not folder.is_dir():
        raise InputError(f"{place}: the folder {part}/ is missing; expected the model's {part} there.")
    wanted = {"scheduler": ["scheduler_config.json"]}.get(part, ["config.json"] if part in NETWORKS else [])
    for file in wanted:
        if not (folder / file).is_file():
            raise InputError(f"{place}: {part}/{file} is missing.")
    if part.startswith("tokenizer"):
        if not any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json")):
            raise InputError(f"{place}: {part}/tokenizer.json or {part}/vocab.json is missing.")
    if part in NETWORKS:
        files = weights(folder)
        if not files:
            raise InputError(f"{place}: {part}/ holds no weights; expected {part}/{weight_name(part)}.")
        for file in files:
            check_weights(file, f"{place}: {part}/{file.name}")


def weight_name(part: str) -> str:
    """The file name under which diffusers and transformers keep weights."""
    return f"{'model' if part.startswith('text') else 'diffusion_pytorch_model'}.safetensors"


def weights(folder: Path, kind: str | None = None) -> list[Path]:
    """Weight files of a component that loading would read: "plain" ones, "fp16" ones, or (None) whichever there are.

    A large network is kept in pieces, which an index lists: then all pieces, whether they are there or not.
    """
    name = r"(?:diffusion_pytorch_model|model|pytorch_model)"
    found: dict[str, list[Path]] = {"plain": [], "fp16": []}
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(name + r"(\.fp16)?\.(?:safetensors|bin)", path.name):
            found["fp16" if match[1] else "plain"].append(path)
        elif match := re.fullmatch(name + r"\.(?:safetensors|bin)\.index(\.fp16)?\.json", path.name):
            pieces = sorted(set(read_json(path).get("weight_map", {}).values()))
            found["fp16" if match[1] else "plain"] += [folder / piece for piece in pieces]
    return found[kind] if kind else found["plain"] or found["fp16"]


def check_weights(path: Path, place: str) -> None:
    """Raise InputError unless a weight file is there and as long as its own header says."""
    if not path.is_file():
        raise InputError(f"{place} is missing.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{place} is a git-lfs pointer, not the weights; run `git lfs pull` there.")
        if path.suffix != ".safetensors":
            return
        length = int.from_bytes(start[:8], "little")
        try:
            file.seek(8)
            header = json.loads(file.read(min(length, size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{place} is damaged: its header cannot be read; fetch it again.") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise InputError(f"{place} is {size:,} bytes long, expected {expected:,}; fetch it again.")


def checksums(folder: Path) -> dict[str, str]:
    """sha256 by path of what loading reads of a diffusers folder."""
    chosen = [folder / "model_index.json", folder / "vocabulary.json", *folder.glob("*/*")]
    files = sorted(path for path in chosen if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_checksums(folder: Path) -> None:
    """Write them beside the files, as `sha256sum -c` reads them."""
    lines = [f"{digest}  {name}\n" for name, digest in checksums(folder).items()]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def changed_files(folder: Path) -> list[str]:
    """Files that are not what `write_checksums` saw, or gone; raises OSError where it left nothing."""
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = checksums(folder)
    return [name for name, digest in expected.items() if found.get(name) != digest]


def variant(folder: Path, index: dict[str, Any], half: bool) -> str | None:
    """The word "fp16" if loading should read the half-precision files of a folder: if `half`, or for lack of others."""
    networks = [folder / part for part in components(index) if part in NETWORKS]
    some = any(weights(f, "fp16") for f in networks)
    plain = all(weights(f, "plain") for f in networks)
    return "fp16" if some and (half or not plain) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises InputError naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read as JSON.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object.")
    return content


def fetch(model: str, half: bool) -> Path:
    """Download a hub model into the cache, in half precision if the hub has it and `half`; raises InputError soon."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        files = {s.rfilename for s in huggingface_hub.HfApi().model_info(model, timeout=PATIENCE).siblings or []}
    except errors.GatedRepoError:
        raise InputError(f"{model}: the hub wants its licence accepted and a log-in (`hf auth login`).") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{model}: no such folder here and no such model on the hub; expected owner/name.") from None
    except Exception as error:
        raise InputError(
            f"{model}: not in the cache of the hub, and the hub does not answer ({first_line(error)}); check the "
            "network, or give a folder or `pocket`."
        ) from error
    if "model_index.json" not in files:
        raise InputError(f"{model}: on the hub, but without model_index.json: not a diffusers pipeline.")
    has_half = any(re.fullmatch(r"unet/.*\.fp16\.safetensors", f) for f in files)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        path = DiffusionPipeline.download(
            model, variant="fp16" if half and has_half else None, safety_checker=None, feature_extractor=None
        )
    except Exception as error:
        raise InputError(f"{model}: the download failed ({first_line(error)}); try again.") from error
    return Path(path)


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, short enough for one line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
