"""Camera files in and out: nerfstudio's transforms.json and camera paths, INRIA's cameras.json, COLMAP's models.

Every reader gives Views: world to camera in OpenCV axes, in float64, and the lens as the file states it. `fit` makes
Cameras of one picture size of them.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.formats.limits import check_count, parse_json
from splatedit.lenses import MODELS, Lens, make_lens, pinhole

RIGID = 1e-3  # by how much R R^T may miss the identity
LARGEST_JSON = 64 << 20  # bytes: of nearly 100,000 cameras
FARTHEST = 1e9  # units from the origin; float32 tells no two places apart there
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL's camera axes (x right, y up, z back) to OpenCV's and back
WORLD = "nerfstudio dataparser_transforms: scale "  # how a header comment of a converted checkpoint begins
PICTURES = ("", ".png", ".jpg", ".jpeg", ".webp")  # endings that a file may leave out of its pictures' names


class View(NamedTuple):
    """One camera of a file."""

    name: str  # of its picture, as written
    w2c: np.ndarray  # (4, 4) float64, world to camera, OpenCV axes
    lens: Lens
    picture: Path | None = None  # where it is on disk, if it is


class CameraFile(NamedTuple):
    """What a file of cameras holds."""

    path: Path  # the file, or COLMAP's folder
    kind: str  # in words: who writes such files
    views: tuple[View, ...]  # by name, in the order of the alphabet; a path's in its own order
    held_out: frozenset[str] = frozenset()  # names of the views that the file itself keeps from training
    missing: int = 0  # views left out, because their picture is not there while others are
    trained: bool = False  # in the world of the trained splats already: written by the trainer or from its viewer
    applied: np.ndarray | None = None  # (4, 4): what was done to the original world before the cameras were written
    applied_scale: float = 1.0


# ------------------------------------------------------------------------------------------------------------ finding


def read_cameras(path: str | Path) -> CameraFile:
    """Read a file of cameras, or what a folder holds of them (`inside`); raises InputError.

    The error is one line that names file, frame and key: also for a matrix that is no rotation, a number that is not
    finite, a lens that cannot be undone, a file that promises more than it holds.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            found = inside(path)
            if found is None:
                raise InputError(
                    f"{path}: no cameras in this folder; expected cameras.json (INRIA), transforms.json (nerfstudio) "
                    "or sparse/0 with cameras and images (COLMAP)."
                )
            path = found
        if not path.exists():
            raise InputError(
                f"cameras: {str(path)!r}: no such file, and not a rig; "
                "choose orbit, dome, dome:48 or a file of cameras."
            )
        if path.is_dir():
            return read_colmap(path)
        if path.suffix.lower() in (".bin", ".txt"):
            if _colmap_ending(path.parent) is None:
                raise InputError(f"{path}: no cameras; COLMAP has cameras{path.suffix} and images{path.suffix}.")
            return read_colmap(path.parent)
        if path.suffix.lower() != ".json":
            found = path.suffix or "a file without extension"
            raise InputError(f"{path}: found {found}, expected a .json file of cameras or a COLMAP folder.")
        return read_json(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def inside(folder: Path) -> Path | None:
    """The cameras in a folder, found by content: the first of what nerfstudio, INRIA and COLMAP write, or None.

    cameras.json comes first: it is in the world of the splats that were trained beside it.
    """
    for name in ("cameras.json", "transforms.json", "transforms_train.json"):
        if (folder / name).is_file():
            return folder / name
    for name in ("sparse/0", "sparse", "0", "colmap/sparse/0", "."):
        if _colmap_ending(folder / name) is not None:
            return folder / name
    return None


def beside(scene: str | Path) -> Path | None:
    """The cameras next to a splat file: in its folder, or where INRIA's trainer puts them; None if there are none.

    INRIA: MODEL/point_cloud/iteration_30000/point_cloud.ply has MODEL/cameras.json.
    """
    folder = Path(scene).expanduser().absolute().parent
    found = inside(folder)
    if found is None and folder.name.startswith("iteration_") and folder.parent.name == "point_cloud":
        found = folder.parents[1] / "cameras.json"
        found = found if found.is_file() else None
    return found


def read_json(path: Path) -> CameraFile:
    """Read a .json file of cameras by what is in it; raises InputError."""
    content = _content(path)
    if isinstance(content, list):
        return read_inria(path, content)
    for key, read in READERS.items():
        if isinstance(content, dict) and key in content:
            return read(path, content)
    raise InputError(
        f"{path}: not a file of cameras; expected a list of cameras (INRIA's cameras.json), "
        "`frames` (transforms.json) or `camera_path` (nerfstudio's viewer)."
    )


# ------------------------------------------------------------------------------------------------------------- readers


def read_inria(path: Path, content: Any) -> CameraFile:
    """INRIA's cameras.json: rotation and centre of each camera in the world, its axes OpenCV's, no distortion.

    scene/cameras.py, utils/camera_utils.py of graphdeco-inria/gaussian-splatting: the principal point is the middle.
    """
    views = []
    for index, entry in enumerate(_list(content, f"{path}: the list of cameras")):
        where = f"{path}: camera {index}"
        entry = _mapping(entry, where)
        name = _name(entry, "img_name", where, str(entry.get("id", index)))
        where = f"{where} ({name})"
        c2w = np.eye(4)
        c2w[:3, :3] = _matrix(_key(entry, "rotation", where), (3, 3), f"{where}: rotation")
        c2w[:3, 3] = _matrix(_key(entry, "position", where), (3,), f"{where}: position")
        width, height = (_pixels(entry, key, where) for key in ("width", "height"))
        values = {key: _number(_key(entry, key, where), f"{where}: {key}") for key in ("fx", "fy")}
        lens = make_lens(where, "PINHOLE", width, height, {**values, "cx": width / 2, "cy": height / 2})
        views.append(View(name, w2c_of(c2w, f"{where}: rotation"), lens))
    return _sorted(CameraFile(path, "INRIA cameras.json", tuple(views), trained=True))


def read_nerfstudio(path: Path, content: dict[str, Any]) -> CameraFile:
    """nerfstudio's transforms.json (docs.nerf.studio, Data conventions), also as instant-ngp and Blender write it.

    Lens keys stand at the top or in a frame, whose own win. A frame whose picture is not there is left out and counted
    if other pictures are there: nerfstudio did not train on it either. Without any picture all frames are taken.
    """
    named = []
    for index, frame in enumerate(_list(content["frames"], f"{path}: frames")):
        where = f"{path}: frame {index}"
        frame = _mapping(frame, where)
        name = _name(frame, "file_path", where, str(index))
        named.append((f"{where} ({name})", name, frame, _picture(path.parent, name)))
    there = sum(picture is not None for *_, picture in named)
    missing, views = len(named) - there if there else 0, []
    for where, name, frame, picture in named:
        if missing and picture is None:
            continue  # whatever else it lacks
        matrix = _matrix(_key(frame, "transform_matrix", where), (4, 4), f"{where}: transform_matrix", (3, 4))
        lens = _nerfstudio_lens({**content, **frame}, where, picture)
        views.append(View(name, w2c_of(matrix @ FLIP, f"{where}: transform_matrix"), lens, picture))
    applied = content.get("applied_transform")
    if applied is not None:
        applied = _matrix(applied, (4, 4), f"{path}: applied_transform", (3, 4))
        w2c_of(applied, f"{path}: applied_transform")  # a rotation, or the dataparser's transform means something else
    scale = _number(content.get("applied_scale", 1.0), f"{path}: applied_scale")
    if scale <= 0:
        raise InputError(f"{path}: applied_scale: found {scale}, expected a number above 0.")
    held = [content[key] for key in ("val_filenames", "test_filenames") if isinstance(content.get(key), list)]
    names = frozenset(str(name) for names in held for name in names)
    return _sorted(
        CameraFile(
            path, "nerfstudio transforms.json", tuple(views), names, missing, applied=applied, applied_scale=scale
        )
    )


def _nerfstudio_lens(values: Mapping[str, Any], where: str, picture: Path | None) -> Lens:
    """The lens of one frame from the keys of file and frame together."""
    model = values.get("camera_model", "OPENCV_FISHEYE" if values.get("is_fisheye") is True else "OPENCV")
    if not isinstance(model, str):
        raise InputError(f"{where}: camera_model: found {_short(model)}, expected text such as OPENCV.")
    if "w" in values or "h" in values or picture is None:
        width, height = (_pixels(values, key, where) for key in ("w", "h"))
    else:
        width, height = _picture_size(picture, where)
    keys = {"fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2", "camera_angle_x", "camera_angle_y"}
    given = {key: _number(values[key], f"{where}: {key}") for key in keys if values.get(key) is not None}
    for angle, focal, size in (("camera_angle_x", "fl_x", width), ("camera_angle_y", "fl_y", height)):
        if focal not in given and angle in given:
            if not 0 < given[angle] < math.pi:
                raise InputError(f"{where}: {angle}: found {given[angle]}, expected radians between 0 and pi.")
            given[focal] = size / 2 / math.tan(given[angle] / 2)
    focal = given.get("fl_x", given.get("fl_y"))
    if focal is None:
        raise InputError(f"{where}: no focal length; expected fl_x in pixels or camera_angle_x in radians.")
    if model in ("SIMPLE_PINHOLE", "PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL"):
        model = "OPENCV"  # nerfstudio reads the same keys for all of them
    if model == "OPENCV" and given.get("k4"):
        raise InputError(
            f"{where}: k4: found {given['k4']}, which no perspective camera of nerfstudio has; "
            "for a fisheye lens say camera_model OPENCV_FISHEYE."
        )
    if model == "OPENCV":
        model, given = "FULL_OPENCV", {k: v for k, v in given.items() if k != "k4"}  # k3 is the third radial one
    lens = {"fx": given.get("fl_x", focal), "fy": given.get("fl_y", focal)}
    middle = {"cx": width / 2, "cy": height / 2}
    return make_lens(where, model, width, height, {**middle, **given, **lens})


def read_path(path: Path, content: dict[str, Any]) -> CameraFile:
    """A camera path of nerfstudio's viewer: perspective, `fov` in degrees from top to bottom, OpenGL axes."""
    kind = content.get("camera_type", "perspective")
    if kind != "perspective":
        raise InputError(f"{path}: camera_type: found {_short(kind)}, expected perspective.")
    width, height = (_pixels(content, key, str(path)) for key in ("render_width", "render_height"))
    views = []
    for index, entry in enumerate(_list(content["camera_path"], f"{path}: camera_path")):
        where = f"{path}: camera {index}"
        entry = _mapping(entry, where)
        matrix = _matrix(_key(entry, "camera_to_world", where), (16,), f"{where}: camera_to_world", (4, 4))
        fov = _number(_key(entry, "fov", where), f"{where}: fov")
        if not 0 < fov < 180:
            raise InputError(f"{where}: fov: found {fov}, expected degrees between 0 and 180.")
        focal = height / 2 / math.tan(math.radians(fov) / 2)
        values = {"f": focal, "cx": width / 2, "cy": height / 2}
        lens = make_lens(where, "SIMPLE_PINHOLE", width, height, values)
        w2c = w2c_of(matrix.reshape(4, 4) @ FLIP, f"{where}: camera_to_world")
        views.append(View(f"{index:04d}", w2c, lens))
    return CameraFile(path, "nerfstudio camera path", tuple(views), trained=True)


READERS: dict[str, Callable[[Path, dict[str, Any]], CameraFile]] = {"frames": read_nerfstudio, "camera_path": read_path}


def read_colmap(folder: Path) -> CameraFile:
    """COLMAP's sparse model, text or binary (colmap.github.io/format.html); points are passed over."""
    ending = _colmap_ending(folder)
    if ending is None:
        raise InputError(f"{folder}: expected cameras.bin and images.bin (or .txt), as COLMAP writes them.")
    pictures = next(
        (up / "images" for up in (folder, *folder.absolute().parents[:3]) if (up / "images").is_dir()), None
    )
    lenses, images = (_colmap_text if ending == ".txt" else _colmap_binary)(folder)
    views = []
    for where, name, quat, position, camera in images:
        if camera not in lenses:
            raise InputError(f"{where}: camera {camera}, which {folder / ('cameras' + ending)} does not hold.")
        length = math.hypot(*quat)
        if not 0.5 < length < 2:
            raise InputError(f"{where}: the quaternion {_short(tuple(quat))} has length {length:.3g}, expected 1.")
        if not all(abs(value) < FARTHEST for value in position):
            raise InputError(f"{where}: position {_short(tuple(position))}, expected numbers below {FARTHEST:.0e}.")
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = _rotation(np.asarray(quat) / length), position
        views.append(View(name, w2c, lenses[camera], _picture(pictures, name) if pictures else None))
    if not views:
        raise InputError(f"{folder / ('images' + ending)}: no images; expected at least one.")
    kind = "COLMAP text" if ending == ".txt" else "COLMAP binary"
    return _sorted(CameraFile(folder, kind, tuple(views)))


def _colmap_ending(folder: Path) -> str | None:
    """Of COLMAP's files in a folder: binary wins, as in COLMAP; None if there are none."""
    for ending in (".bin", ".txt"):
        if all((folder / f"{name}{ending}").is_file() for name in ("cameras", "images")):
            return ending
    return None


Entry = tuple[str, str, Sequence[float], Sequence[float], int]  # where, name, wxyz, position, camera


def _colmap_text(folder: Path) -> tuple[dict[int, Lens], Iterator[Entry]]:
    """Lenses by number, and the images one by one."""
    path, lenses = folder / "cameras.txt", {}
    for number, words in _lines(path):
        where = f"{path}: line {number}"
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 5:
            raise InputError(f"{where}: found {len(words)} words, expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS.")
        names = dict(MODELS.values()).get(words[1])
        if names is None:
            raise InputError(f"{where}: camera model {words[1][:40]!r} is not known; expected one of COLMAP's.")
        camera, width, height = (_whole(word, where) for word in (words[0], words[2], words[3]))
        if len(words) - 4 != len(names):
            raise InputError(f"{where}: found {len(words) - 4} parameters, {words[1]} has {len(names)}.")
        values = {name: _number(word, f"{where}: {name}") for name, word in zip(names, words[4:], strict=True)}
        lenses[camera] = make_lens(where, words[1], width, height, values)
    return lenses, _colmap_images(folder / "images.txt")


def _colmap_images(path: Path) -> Iterator[Entry]:
    """Two lines an image: the pose, then its points, which may be none at all."""
    points = False
    for number, words in _lines(path, 9):
        where = f"{path}: line {number}"
        if points:
            points = False
            if words and len(" ".join(words).split()) % 3:
                raise InputError(f"{where}: expected points, X Y ID each, or an empty line after each image.")
            continue
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 10:
            raise InputError(f"{where}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME.")
        numbers = [_number(word, where) for word in words[1:8]]
        points = True
        yield f"{where} ({words[9]})", words[9], numbers[:4], numbers[4:], _whole(words[8], where)


def _lines(path: Path, most: int = -1) -> Iterator[tuple[int, list[str]]]:
    """Lines of a text file, counted from 1, as words; at most `most` splits."""
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.strip().split(maxsplit=most)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; COLMAP's binary files end in .bin.") from None


def _colmap_binary(folder: Path) -> tuple[dict[int, Lens], Iterator[Entry]]:
    """Lenses by number, and the images one by one; every count is held against the bytes that are there."""
    path, lenses = folder / "cameras.bin", {}
    data = path.read_bytes()
    (count,) = _unpack("<Q", data, 0, path)
    check_count(path, count, 24 + 2 * 8, len(data) - 8, "cameras")
    at = 8
    for index in range(count):
        where = f"{path}: camera {index}"
        camera, model, width, height = _unpack("<iiQQ", data, at, path)
        if model not in MODELS:
            raise InputError(f"{where}: camera model number {model}, expected one of COLMAP's, 0 to {max(MODELS)}.")
        name, names = MODELS[model]
        numbers = _unpack(f"<{len(names)}d", data, at + 24, path)
        at += 24 + 8 * len(names)
        values = {key: _number(value, f"{where}: {key}") for key, value in zip(names, numbers, strict=True)}
        lenses[camera] = make_lens(where, name, width, height, values)
    return lenses, _colmap_binary_images(folder / "images.bin")


def _colmap_binary_images(path: Path) -> Iterator[Entry]:
    """The file is mapped, not read: most of it are points, gigabytes in large captures."""
    if path.stat().st_size < 8:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected COLMAP's images; copy it again.")
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (count,) = _unpack("<Q", data, 0, path)
        check_count(path, count, 64 + 1 + 8, len(data) - 8, "images")
        at = 8
        for index in range(count):
            _, *numbers, camera = _unpack("<i7di", data, at, path)
            end = data.find(b"\0", at + 64, at + 64 + 4096)
            if end < 0:
                raise InputError(f"{path}: image {index}: the name has no end; the file is cut short or damaged.")
            name = data[at + 64 : end].decode("utf-8", "replace")
            (points,) = _unpack("<Q", data, end + 1, path)
            at = end + 9 + 24 * points
            if at > len(data):
                raise InputError(
                    f"{path}: image {index} ({name}) promises {points} points, the file ends before; copy it again."
                )
            yield f"{path}: image {index} ({name})", name, numbers[:4], numbers[4:], camera


# ----------------------------------------------------------------------------------------------------- views to cameras


def fit(views: Sequence[View], width: int, height: int) -> Cameras:
    """Pinhole cameras with pictures of `width` x `height` pixels: the largest middle part of that shape of each view.

    Distorted lenses become pinholes first (`lenses.pinhole`); the principal point stays where it is in the picture.
    """
    if width < 1 or height < 1:
        raise InputError(f"size: found {width}x{height}, expected at least 1x1 pixels.")
    w2c, K = [], []
    for view in views:
        lens = _straight(view.lens)
        scale = max(width / lens.width, height / lens.height)  # our pixels to one of the file's
        cx, cy = (lens.cx - lens.width / 2) * scale + width / 2, (lens.cy - lens.height / 2) * scale + height / 2
        w2c.append(view.w2c)
        K.append([[lens.fx * scale, 0, cx], [0, lens.fy * scale, cy], [0, 0, 1]])
    return Cameras(torch.from_numpy(np.stack(w2c)).float(), torch.tensor(K, dtype=torch.float64).float(), width, height)


def size_of(views: Sequence[View]) -> tuple[int, int]:
    """Width and height in pixels that most of the views have, once distortion is undone."""
    width, height = Counter(_straight(view.lens)[:2] for view in views).most_common(1)[0][0]
    return width, height


def read_dataparser(source: Path | str, file: CameraFile) -> tuple[np.ndarray, float]:
    """What nerfstudio's training did to the world of `file`: [R t; 0 1] (4, 4) and then a scale, as `moved` takes them.

    source: dataparser_transforms.json, or the header comment that a converted checkpoint has instead. It counts from
    the original world: applied_transform and applied_scale of transforms.json are in it and come off again
    (nerfstudio/data/dataparsers/nerfstudio_dataparser.py). Raises InputError.
    """
    if isinstance(source, Path):
        where, content = str(source), _mapping(_content(source), f"{source}: the content")
    else:
        where, (scale, rows) = f"the comment {_short(source)}", source.removeprefix(WORLD).split(" transform ", 1)
        content = {"scale": scale, "transform": [row.split() for row in rows.split(" / ")]}
    transform = _matrix(_key(content, "transform", where), (4, 4), f"{where}: transform", (3, 4))
    w2c_of(transform, f"{where}: transform")
    scale = _number(_key(content, "scale", where), f"{where}: scale")
    if scale <= 0:
        raise InputError(f"{where}: scale: found {scale}, expected a number above 0.")
    if file.applied is not None:
        transform = transform @ np.linalg.inv(file.applied)
    return transform, scale / file.applied_scale


def moved(views: Sequence[View], transform: np.ndarray, scale: float) -> tuple[View, ...]:
    """The views in another world, whose points are p' = scale (R p + t); transform: (4, 4), [R t; 0 1]."""
    inverse = w2c_of(transform, "transform")
    out = []
    for view in views:
        w2c = view.w2c @ inverse
        w2c[:3, 3] *= scale
        out.append(view._replace(w2c=w2c))
    return tuple(out)


# ------------------------------------------------------------------------------------------------------------- writers


def save_cameras(cameras: Cameras, path: str | Path, names: Sequence[str] | None = None, form: str = "auto") -> None:
    """Write cameras as nerfstudio's transforms.json or, if the file is called cameras.json, as INRIA's; atomically.

    names: of the pictures, one for each camera; form: "auto" or a key of WRITERS. Raises InputError if the place cannot
    be written, and for INRIA's format, which knows no other principal point, unless it is the middle of the picture.
    """
    from splatedit.files import atomic

    path = Path(path).expanduser()
    if form == "auto":
        form = "inria" if path.name == "cameras.json" else "nerfstudio"
    if form not in WRITERS:
        raise InputError(f"form: {form!r} is not known; choose auto, {', '.join(WRITERS)}.")
    if path.suffix.lower() != ".json":
        raise InputError(f"{path}: cameras are written as .json; rename the target.")
    names = [f"{index:05d}.png" for index in range(cameras.n)] if names is None else list(names)
    if len(names) != cameras.n:
        raise InputError(f"names: found {len(names)}, expected one for each of {cameras.n} cameras.")
    text = json.dumps(WRITERS[form](cameras, names), indent=1, allow_nan=False, ensure_ascii=False)
    with atomic(path) as stream:
        stream.write(text.encode("utf-8"))


def _c2w(cameras: Cameras) -> np.ndarray:
    """Camera to world (c, 4, 4) float64; the rotations are made exact."""
    matrices = cameras.w2c.detach().cpu().double().numpy()
    return np.stack([w2c_of(w2c, f"camera {index}: w2c") for index, w2c in enumerate(matrices)])


def _as_nerfstudio(cameras: Cameras, names: Sequence[str]) -> dict[str, Any]:
    frames = []
    for name, c2w, K in zip(names, _c2w(cameras), cameras.K.detach().cpu().tolist(), strict=True):
        lens = {"fl_x": K[0][0], "fl_y": K[1][1], "cx": K[0][2], "cy": K[1][2]}
        frames.append({"file_path": name, **lens, "transform_matrix": (c2w @ FLIP).tolist()})
    return {"camera_model": "PINHOLE", "w": cameras.width, "h": cameras.height, "frames": frames}


def _as_inria(cameras: Cameras, names: Sequence[str]) -> list[dict[str, Any]]:
    entries = []
    size = {"width": cameras.width, "height": cameras.height}
    for index, (name, c2w, K) in enumerate(zip(names, _c2w(cameras), cameras.K.detach().cpu().tolist(), strict=True)):
        if max(abs(K[0][2] - cameras.width / 2), abs(K[1][2] - cameras.height / 2)) > 1e-3:
            raise InputError(
                f"camera {index}: principal point {K[0][2]:.6g}, {K[1][2]:.6g}, which cameras.json cannot hold; "
                'write transforms.json (form="nerfstudio").'
            )
        place = {"position": c2w[:3, 3].tolist(), "rotation": c2w[:3, :3].tolist()}
        entries.append({"id": index, "img_name": name, **size, **place, "fy": K[1][1], "fx": K[0][0]})
    return entries


WRITERS: dict[str, Callable[[Cameras, Sequence[str]], Any]] = {"nerfstudio": _as_nerfstudio, "inria": _as_inria}


# --------------------------------------------------------------------------------------------------------- small parts


def w2c_of(c2w: np.ndarray, where: str) -> np.ndarray:
    """World to camera (4, 4) of a camera-to-world matrix (4, 4); raises InputError unless it is a rotation and a shift.

    The rotation is made exact: what is left of a text file's rounding would be a stretched picture otherwise.
    """
    rotation = c2w[:3, :3]
    if np.abs(rotation).max() > 1e6 or not np.abs(c2w[:3, 3]).max() < FARTHEST:
        raise InputError(f"{where}: holds numbers up to {np.abs(c2w).max():.2g}, expected a rotation and a place.")
    miss = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if not miss < RIGID or np.linalg.det(rotation) < 0:
        found = "a mirrored one" if miss < RIGID else f"R R^T misses the identity by {miss:.2g}"
        raise InputError(f"{where}: its 3x3 part is no rotation ({found}); expected one, without scale or shear.")
    u, _, v = np.linalg.svd(rotation)
    w2c = np.eye(4)
    w2c[:3, :3] = (u @ v).T
    w2c[:3, 3] = -w2c[:3, :3] @ c2w[:3, 3]
    return w2c


def _rotation(quat: np.ndarray) -> np.ndarray:
    """(3, 3) of a unit quaternion wxyz."""
    w, x, y, z = quat
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _sorted(file: CameraFile) -> CameraFile:
    """By name, as the trainers sort them: every eighth is then the same camera everywhere. All lenses can be undone."""
    for lens, name in {view.lens: view.name for view in file.views if view.lens.kind != "pinhole"}.items():
        try:
            _straight(lens)
        except InputError:
            pinhole(lens, f"{file.path}: {name}")  # the same error, with its place
    return file._replace(views=tuple(sorted(file.views, key=lambda view: view.name)))


def _content(path: Path) -> Any:
    """What a JSON file holds."""
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path}: {path.stat().st_size >> 20} MiB, expected at most {LARGEST_JSON >> 20} of cameras.")
    return parse_json(path, path.read_bytes())


@functools.lru_cache(maxsize=1 << 12)
def _straight(lens: Lens) -> Lens:
    """`lenses.pinhole`, worked out once for each lens."""
    return pinhole(lens)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: found {_short(value)}, expected a list of at least one camera.")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {_short(value)}, expected keys and values in braces.")
    return value


def _key(values: Mapping[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise InputError(f"{where}: {key} is missing.")
    return values[key]


def _name(values: Mapping[str, Any], key: str, where: str, other: str) -> str:
    name = values.get(key, other)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise InputError(f"{where}: {key}: found {_short(name)}, expected the name of a picture.")
    return " ".join(str(name).split()) or other


def _number(value: Any, where: str) -> float:
    """A finite number, from JSON or as a word."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: found {_short(value)}, expected a finite number.")
    return number


def _whole(word: str, where: str) -> int:
    if not (word.isascii() and word.removeprefix("-").isdigit() and len(word) < 20):
        raise InputError(f"{where}: found {_short(word)}, expected a whole number.")
    return int(word)


def _pixels(values: Mapping[str, Any], key: str, where: str) -> int:
    number = _number(_key(values, key, where), f"{where}: {key}")
    if number != int(number):  # some write 512.0
        raise InputError(f"{where}: {key}: found {number}, expected a whole number of pixels.")
    return int(number)


def _matrix(value: Any, shape: tuple[int, ...], where: str, other: tuple[int, ...] | None = None) -> np.ndarray:
    """Finite numbers of a shape, or of the `other`: three rows get the fourth, 0 0 0 1."""
    try:
        matrix = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: found {_short(value)}, expected {_shape(shape)} numbers.") from None
    if matrix.shape == other == (3, 4):
        matrix = np.concatenate([matrix, [[0.0, 0.0, 0.0, 1.0]]])
    if matrix.shape not in (shape, other, (4, 4) if other == (3, 4) else shape):
        raise InputError(f"{where}: found {_shape(matrix.shape)} numbers, expected {_shape(shape)}.")
    if not np.isfinite(matrix).all():
        raise InputError(f"{where}: holds NaN or infinity, expected {_shape(shape)} finite numbers.")
    return matrix


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one"


def _short(value: Any) -> str:
    """What was found, on one short line."""
    if isinstance(value, (dict, list)):
        kind = "keys and values" if isinstance(value, dict) else "a list"
        return f"{kind} ({len(value)})"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unpack(layout: str, data: bytes | mmap.mmap, at: int, path: Path) -> tuple:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error:
        raise InputError(f"{path}: ends at byte {len(data)}, in the middle of an entry; copy it again.") from None


def _picture(folder: Path, name: str) -> Path | None:
    """Where the picture of a frame is, if it is there."""
    for ending in PICTURES:
        path = os.path.join(folder, name + ending)
        if os.path.isfile(path):
            return Path(path)
    return None


def _picture_size(path: Path, where: str) -> tuple[int, int]:
    """Width and height from the head of a picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow's readers raise whatever they like
        raise InputError(f"{where}: w and h are missing, and {path} is no picture that says them.") from error
