"""The splats in `scenes/` and the script that makes them, on a box of a few triangles."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from splatedit.cameras import bounds, guess_up, orbit
from splatedit.errors import InputError
from splatedit.files import load, sidecar
from splatedit.metrics import psnr
from splatedit.pocket import scenes
from splatedit.pocket.meshes import Mesh
from splatedit.render import render

FOLDER = Path(__file__).parents[1] / "scenes"
FILES = sorted(FOLDER.glob("*.ply"))
FACE, TOP, REST = (0.9, 0.3, 0.1), (0.2, 0.7, 0.3), (0.4, 0.4, 0.5)


def box(half=(0.45, 0.5, 0.4)) -> Mesh:
    """A box in the y-up frame of the meshes: an orange face towards +z, a green top, the rest grey."""
    corners, normals, colors = [], [], []
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for sign in (1.0, -1.0):
            normal = np.eye(3)[axis] * sign
            color = FACE if (axis, sign) == (2, 1.0) else TOP if (axis, sign) == (1, 1.0) else REST
            ring = [normal + a * np.eye(3)[u] + b * np.eye(3)[v] for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            for k in ((0, 1, 2), (0, 2, 3)):
                corners.append([ring[i] * half for i in k])
                normals.append([normal] * 3)
                colors.append([color] * 3)
    return Mesh(*(np.array(part, np.float32) for part in (corners, normals, colors)))


@pytest.fixture(scope="module")
def surface():
    return scenes.visible_surface(box(), 6000, np.random.default_rng(0), views=24, size=96)


def hue(image):
    """Which of the three colours of the box the middle of a picture (3, h, w) shows, whatever the light."""
    middle = image[:, image.shape[1] // 2, image.shape[2] // 2]
    named = torch.tensor([FACE, TOP, REST])
    return ("face", "top", "rest")[int(torch.cosine_similarity(named, middle[None]).argmax())]


# ------------------------------------------------------------------------------------------------- what is in scenes/
def test_the_scenes_of_the_readme_are_there():
    assert {"cat", "dog", "fox", "penguin", "bear"} <= {path.stem for path in FILES}
    assert "CC0" in (FOLDER / "SOURCES.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scene_is_light_even_and_opaque(path):
    scene = load(path)
    assert 10_000 <= scene.n <= 20_000 and scene.sh_degree == 0
    assert path.stat().st_size < 1.5 * 2**20
    flat, thin = scene.scales.exp()[:, :2], scene.scales.exp()[:, 2]
    assert flat.max() < 0.03 and flat.max() / flat.min() < 10  # the animal is about 1.3 high
    assert (flat.amax(1) / flat.amin(1)).max() < 4.01  # no needles
    assert (thin < flat.amin(1)).float().mean() > 0.99
    assert 0.85 < scene.opacities.sigmoid().min() and scene.opacities.sigmoid().max() < 0.98
    assert any("Kenney Cube Pets (CC0)" in line for line in scene.comments)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scene_says_what_it_shows_and_which_way_is_up(path):
    scene = load(path)
    assert sidecar(path) == (f"a {path.stem}", "-y")
    assert guess_up(scene) == "-y"
    assert guess_up(scene._replace(comments=())) == "-y"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scene_has_no_holes_and_no_halo(path):
    drawn = render(load(path), orbit(load(path), n=4, size=128, azimuth=20.0, up="-y"), (0.0, 1.0, 0.0))
    inside = 1 - torch.nn.functional.max_pool2d(1 - (drawn.alpha > 0.5).float(), 5, 1, 2)
    assert inside.mean() > 0.08
    thin = drawn.alpha[inside > 0] < 0.95  # a few such pixels lie in true gaps: behind the tail, between the legs
    assert thin.float().mean() < 5e-4
    near = torch.nn.functional.max_pool2d((drawn.alpha > 0.5).float(), 5, 1, 2)
    assert drawn.alpha[near == 0].max() < 0.05


def test_the_cat_stands_upright_and_looks_at_the_camera_of_azimuth_zero():
    cat = load(FOLDER / "cat.ply")
    front, back = render(cat, orbit(cat, n=2, size=128, elevation=0.0, up="-y")).rgb
    eyes = [(image[0] - image[2] > 0.3) for image in (front, back)]  # yellow
    assert eyes[0].sum() > 100 and eyes[1].sum() < 5
    assert eyes[0].nonzero()[:, 0].float().mean() < 64  # in the upper half of the picture


# ------------------------------------------------------------------------------------------------------- ground truth
def test_the_ground_truth_is_upright_and_faces_azimuth_zero():
    scene = scenes.discs(*sampled())
    seen = {
        (azimuth, elevation): hue(
            scenes.ground_truth(box(), orbit(scene, n=1, azimuth=azimuth, elevation=elevation, size=32, up="-y"))[0][0]
        )
        for azimuth, elevation in [(0.0, 0.0), (180.0, 0.0), (0.0, 80.0), (0.0, -80.0)]
    }
    assert seen == {(0.0, 0.0): "face", (180.0, 0.0): "rest", (0.0, 80.0): "top", (0.0, -80.0): "rest"}


def test_the_ground_truth_mask_says_where_the_background_shows():
    cameras = scenes.even_cameras(2, 40)
    colors = [(0.0, 0.0, 0.0), (1.0, 0.5, 0.25)]
    images, masks = scenes.ground_truth(box(), cameras, colors)
    black, same = scenes.ground_truth(box(), cameras, colors[0])
    assert images.shape == (2, 3, 40, 40) and masks.shape == (2, 1, 40, 40)
    assert torch.equal(masks, same) and 0.1 < masks.mean() < 0.5
    torch.testing.assert_close(images, black + (1 - masks) * torch.tensor(colors)[:, :, None, None], atol=1e-5, rtol=0)


def test_the_ground_truth_of_a_wide_picture_is_its_part_of_the_square_one():
    square = scenes.even_cameras(1, 48)
    wide = square._replace(height=30)
    images, masks = scenes.ground_truth(box(), wide)
    full, _ = scenes.ground_truth(box(), square)
    assert masks.shape == (1, 1, 30, 48)
    assert torch.equal(images, full[:, :, :30])


def test_stretched_pixels_are_refused():
    with pytest.raises(InputError, match="square pixels"):
        scenes.ground_truth(box(), scenes.even_cameras(1, 32).resized(32, 48))


# ----------------------------------------------------------------------------------------------------------- sampling
def sampled(count=500):
    surface = scenes.visible_surface(box(), 4000, np.random.default_rng(0), views=16, size=64)
    return surface, *scenes.spread(surface, count)


def test_samples_lie_on_the_surface_with_its_normals_and_colours(surface):
    half = np.array([0.45, 0.5, 0.4])
    axis = np.abs(surface.normals).argmax(1)
    rows = np.arange(len(axis))
    assert len(rows) == 6000
    np.testing.assert_allclose(surface.points[rows, axis], np.sign(surface.normals[rows, axis]) * half[axis], atol=1e-4)
    assert (np.abs(surface.points) <= half + 1e-4).all()
    scene = scenes.to_scene(box())
    palette = {tuple(n.round(3)): c for n, c in zip(scene.normals[:, 0], scene.colors[:, 0], strict=True)}
    expected = np.array([palette[tuple(n)] for n in surface.normals.round(3) + 0.0])
    np.testing.assert_allclose(surface.colors, expected, atol=1e-4)


def test_what_is_hidden_is_not_sampled():
    both = Mesh(*(np.concatenate(parts) for parts in zip(box(), box((0.3, 0.3, 0.3)), strict=True)))
    surface = scenes.visible_surface(both, 4000, np.random.default_rng(0), views=16, size=64)
    assert np.abs(surface.points / np.array([0.45, 0.5, 0.4])).max(1).min() > 0.99


def test_edges_and_creases_are_where_the_detail_is(surface):
    to_edge = np.sort(1 - np.abs(surface.points) / np.array([0.45, 0.5, 0.4]), 1)[:, 1]  # 0 at an edge, 1 at a centre
    near, far = to_edge < 0.03, to_edge > 0.15
    assert surface.detailed[near].mean() > 0.15  # a crease is found only where both of its faces show
    assert not surface.detailed[far].any()


def test_spreading_keeps_the_distance_and_the_count(surface):
    chosen, spacing = scenes.spread(surface, 400)
    assert len(chosen) == pytest.approx(400, rel=0.02) and len(set(chosen.tolist())) == len(chosen)
    points, normals = surface.points[chosen], surface.normals[chosen]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    same_side = (normals[:, None] * normals[None]).sum(-1) > 0.99
    np.fill_diagonal(same_side, False)
    assert (distance[same_side] >= spacing.min() - 1e-6).all()
    # and no place is left bare: every sample has a chosen one nearby
    gaps = np.linalg.norm(surface.points[:, None] - points[None], axis=-1).min(1)
    assert gaps.max() <= spacing.max() + 1e-6


def test_discs_turn_their_thin_axis_to_the_normal():
    normals = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    normals = torch.cat([normals, torch.eye(3), -torch.eye(3)])
    w, x, y, z = scenes.quats_along(normals).unbind(1)
    third = torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], 1)
    torch.testing.assert_close(third, normals, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ refining
def test_refinement_improves_the_picture_and_the_same_seed_gives_the_same_scene():
    def make(seed):
        surface, chosen, spacing = sampled(300)
        start, near = scenes.discs(surface, chosen, spacing), torch.from_numpy(spacing.astype(np.float32))
        rng = np.random.default_rng(seed)
        return start, scenes.refine(start, box(), near, rng, steps=20, sizes=((64, 2), (48, 2)))

    (raw, made), (_, again), (_, other) = make(3), make(3), make(4)
    assert all(torch.equal(made.parameters[k], again.parameters[k]) for k in made.parameters)
    assert not torch.equal(made.means, other.means)
    assert scenes.score(made, box(), 64, 6) > scenes.score(raw, box(), 64, 6) + 1
    assert (made.scales[:, :2] - raw.scales[:, :2]).abs().max() < 1
    assert (made.sh0 - raw.sh0).abs().max() <= 0.1 / scenes.SH_C0 + 1e-5


def test_the_scene_lies_in_the_frame_of_the_mesh():
    scene = scenes.discs(*sampled(1200))
    centre, radius = bounds(scene)
    torch.testing.assert_close(centre, torch.zeros(3), atol=0.03, rtol=0)
    assert radius == pytest.approx(np.linalg.norm([0.45, 0.5, 0.4]), rel=0.1)
    face = scene.sh0[scene.means[:, 2] < -0.39].mean(0) * scenes.SH_C0 + 0.5  # towards -z
    assert face[0, 0] > 2 * face[0, 2]
    cameras = scenes.even_cameras(2, 48)
    upright = box()
    fallen = upright._replace(corners=upright.corners * (1, -1, 1), normals=upright.normals * (1, -1, 1))
    drawn = render(scene, cameras).rgb
    right, wrong = (psnr(drawn, scenes.ground_truth(mesh, cameras)[0]) for mesh in (upright, fallen))
    assert right > 18 and right > wrong + 0.5  # most of the box is of one colour


# ------------------------------------------------------------------------------------------------------------- command
def test_pairs_are_the_target_in_the_frame_of_the_source():
    assert scenes.wanted(["cat"], ["cat:pig"], ["cat", "pig"]) == {"cat": "cat", "cat-pig": "pig"}


@pytest.mark.parametrize(
    "names, pairs, message",
    [
        (["cta"], [], "no mesh cta.glb .* did you mean cat?"),
        ([], ["cat:pgi"], "no mesh pgi.glb .* did you mean pig?"),
        ([], ["catpig"], "expected SOURCE:TARGET"),
        ([], ["cow:pig"], "expected SOURCE:TARGET"),
        ([], [], "nothing to make"),
    ],
)
def test_a_wrong_word_is_answered_with_what_would_be_right(names, pairs, message):
    with pytest.raises(InputError, match=message):
        scenes.wanted(names, pairs, ["cat", "pig"])


def test_the_command_writes_scene_sidecar_and_preview(tmp_path, monkeypatch, capsys):
    (tmp_path / "pig.glb").touch()
    (tmp_path / "cat.glb").touch()
    monkeypatch.setattr(scenes, "load_mesh", lambda path: box())
    words = f"--meshes {tmp_path} --output {tmp_path}/out --preview {tmp_path}/all.png --count 200 --steps 1"
    monkeypatch.setattr(sys, "argv", ["scenes", *words.split(), "--pair", "cat:pig"])
    scenes.main()
    assert "Gaussians" in capsys.readouterr().out
    path = tmp_path / "out" / "cat-pig.ply"
    assert 150 < load(path).n < 250
    assert sidecar(path) == ("a pig", "-y")
    assert (tmp_path / "all.png").stat().st_size > 1000
