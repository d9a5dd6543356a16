"""The triangles behind `pocket` and `scenes/`: frame, light, drawing, training pictures; on tiny meshes."""

import numpy as np
import pytest

from splatedit.pocket import views
from splatedit.pocket.meshes import (
    AMBIENT,
    BACKGROUNDS,
    CENTRE,
    DIFFUSE,
    LIGHT,
    SCALE,
    Mesh,
    draw,
    load_mesh,
    look_at,
    shade,
)

RED, BLUE, GREY = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)


def square(z=0.0, side=1.0, color=GREY):
    """A square in the plane of constant z, facing +z, as two triangles."""
    h = side / 2
    a, b, c, d = (-h, -h, z), (h, -h, z), (h, h, z), (-h, h, z)
    corners = np.array([[a, b, c], [a, c, d]], np.float32)
    normals = np.broadcast_to(np.array([0, 0, 1], np.float32), (2, 3, 3)).copy()
    return Mesh(corners, normals, np.broadcast_to(np.array(color, np.float32), (2, 3, 3)).copy())


def joined(*meshes):
    return Mesh(*(np.concatenate(parts) for parts in zip(*meshes, strict=True)))


def drawn(mesh, w2c=None, size=40, background=(1.0, 1.0, 1.0), supersample=2, focal=40.0):
    w2c = look_at(0, 0, 4.0) if w2c is None else w2c
    return draw(mesh.corners, mesh.colors, w2c, focal, (size / 2, size / 2), size, background, supersample)


# --------------------------------------------------------------------------------------------------------------- light
def test_a_face_towards_the_light_is_brightest_and_one_away_from_it_gets_ambient_only():
    towards = np.array(LIGHT, np.float32) / np.linalg.norm(LIGHT)
    mesh = square(color=(0.5, 0.25, 0.125))
    facing = mesh._replace(normals=np.broadcast_to(towards, (2, 3, 3)))
    away = mesh._replace(normals=np.broadcast_to(-towards, (2, 3, 3)))
    np.testing.assert_allclose(shade(facing), mesh.colors * (AMBIENT + DIFFUSE), rtol=1e-5)
    np.testing.assert_allclose(shade(away), mesh.colors * AMBIENT, rtol=1e-5)


def test_shading_stays_within_the_gamut():
    white = square(color=(1.0, 1.0, 1.0))
    assert shade(white, (0.0, 0.0, 1.0)).max() == 1  # ambient and diffuse together exceed 1
    assert shade(white).dtype == np.float32


# ------------------------------------------------------------------------------------------------------------- cameras
@pytest.mark.parametrize("azimuth, side", [(0, (0, 0, 1)), (90, (1, 0, 0)), (180, (0, 0, -1)), (270, (-1, 0, 0))])
def test_azimuth_turns_from_the_face_towards_plus_x(azimuth, side):
    matrix = look_at(azimuth, 0, 2.5)
    position = -matrix[:3, :3].T @ matrix[:3, 3]
    np.testing.assert_allclose(position, 2.5 * np.array(side), atol=1e-5)


def test_a_camera_is_a_rotation_and_sees_the_target_in_its_middle():
    matrix = look_at(37, -20, 3.0, target=(0.1, -0.2, 0.3))
    rotation = matrix[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(rotation @ np.array([0.1, -0.2, 0.3]) + matrix[:3, 3], (0, 0, 3), atol=1e-5)


def test_positive_elevation_looks_down_and_up_is_up_in_the_picture():
    matrix = look_at(0, 30, 2.0)
    position = -matrix[:3, :3].T @ matrix[:3, 3]
    assert position[1] == pytest.approx(2.0 * np.sin(np.radians(30)), abs=1e-5)
    assert (matrix[:3, :3] @ np.array([0, 1, 0]))[1] < 0  # y grows downwards in a picture


# ------------------------------------------------------------------------------------------------------------- drawing
def test_a_square_covers_its_projection_and_nothing_else():
    image, coverage = drawn(square(color=RED))  # 1 unit at distance 4, focal 40: pixels 15 to 25
    assert coverage.sum() == pytest.approx(100)
    assert coverage[15:25, 15:25].min() == 1
    np.testing.assert_allclose(image[15:25, 15:25], np.broadcast_to(RED, (10, 10, 3)), atol=1e-6)
    np.testing.assert_allclose(image[coverage == 0], 1)


def test_edges_are_mixed_by_coverage():
    image, coverage = drawn(square(side=1.1, color=RED), supersample=4)  # half a pixel more on each side
    assert coverage[20, 14] == pytest.approx(0.5)
    np.testing.assert_allclose(image[20, 14], (1, 0.5, 0.5), atol=1e-6)


@pytest.mark.parametrize("order", [(0.0, 0.5), (0.5, 0.0)])
def test_the_nearer_surface_hides_the_other_whatever_the_order(order):
    colors = {0.0: BLUE, 0.5: RED}  # the camera is at z = 4
    image, _ = drawn(joined(*(square(z, color=colors[z]) for z in order)))
    np.testing.assert_allclose(image[20, 20], RED, atol=1e-6)


def test_both_sides_of_a_triangle_are_drawn():
    image, _ = drawn(square(color=RED), look_at(180, 0, 4.0))
    np.testing.assert_allclose(image[20, 20], RED, atol=1e-6)


def test_corner_colors_are_interpolated():
    mesh = square()
    colors = np.where(mesh.corners[..., :1] > 0, 1.0, 0.0).repeat(3, -1).astype(np.float32)
    image, _ = drawn(mesh._replace(colors=colors))
    row = image[20, 15:25, 0]
    np.testing.assert_allclose(row, (np.arange(10) + 0.5) / 10, atol=1e-5)


def test_depth_and_colours_follow_the_perspective():
    """A tilted square in front of and behind an upright one; the colour of the tilted one is its own position."""
    turn = np.array([[1, 0, 0], [0, 0.5, -0.866], [0, 0.866, 0.5]], np.float32)
    tilted = square(side=3.0)
    tilted = tilted._replace(corners=tilted.corners @ turn.T, colors=tilted.corners / 3 + np.float32(0.5))
    image, coverage = drawn(joined(square(z=0.3, side=9.0, color=BLUE), tilted), supersample=1)
    height = -((np.arange(40) + 0.5) - 20) / 40  # of the ray through a row, at unit distance
    along = 4 * height / (0.5 + 0.866 * height)  # where it meets the tilted plane, from its middle upwards
    front = (0.866 * along > 0.31) & (along < 1.49)
    hidden = 0.866 * along < 0.29
    assert front.sum() > 5 and hidden.sum() > 15 and coverage.min() == 1
    np.testing.assert_allclose(image[front, 20, 1], along[front] / 3 + 0.5, atol=1e-3)
    np.testing.assert_allclose(image[hidden, 20], np.broadcast_to(BLUE, (hidden.sum(), 3)), atol=1e-5)


def test_what_lies_behind_the_camera_or_beyond_the_picture_leaves_no_trace():
    behind, beside = square(z=6.0), square()._replace(corners=square().corners + np.array([9, 0, 0], np.float32))
    image, coverage = drawn(joined(behind, beside), background=(0.2, 0.4, 0.6))
    assert coverage.max() == 0
    np.testing.assert_allclose(image, np.broadcast_to(np.float32((0.2, 0.4, 0.6)), image.shape), atol=1e-6)


def test_a_surface_larger_than_the_picture_fills_it():
    _, coverage = drawn(square(side=50.0))
    assert coverage.min() == 1


# ------------------------------------------------------------------------------------------------------------- loading
@pytest.fixture
def glb(tmp_path):
    """A square at height 0.85 with a palette texture: its two triangles take the red and the blue swatch."""
    trimesh = pytest.importorskip("trimesh")
    from PIL import Image

    palette = np.zeros((8, 8, 3), np.uint8)
    palette[:, :4], palette[:, 4:] = (255, 0, 0), (0, 0, 255)
    corners = square().corners.reshape(-1, 3) + CENTRE
    uv = np.array([[0.1, 0.5], [0.4, 0.5], [0.4, 0.2], [0.6, 0.5], [0.9, 0.5], [0.9, 0.2]])
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(palette))
    mesh = trimesh.Trimesh(
        corners,
        np.arange(6).reshape(2, 3),
        visual=trimesh.visual.TextureVisuals(uv=uv, material=material),
        process=False,
    )
    mesh.export(tmp_path / "tile.glb")
    return tmp_path / "tile.glb"


def test_a_mesh_is_loaded_into_the_common_frame_with_its_palette(glb):
    mesh = load_mesh(glb)
    assert [part.shape for part in mesh] == [(2, 3, 3)] * 3
    assert all(part.dtype == np.float32 for part in mesh)
    np.testing.assert_allclose(np.sort(mesh.corners, None), np.sort(square(side=SCALE).corners, None), atol=1e-6)
    np.testing.assert_allclose(np.abs(mesh.normals[..., 2]), 1, atol=1e-5)
    np.testing.assert_allclose(mesh.colors[0], [RED] * 3)
    np.testing.assert_allclose(mesh.colors[1], [BLUE] * 3)


# --------------------------------------------------------------------------------------------------- training pictures
def test_captions_have_the_right_articles():
    assert views.caption("pig") == "a pig"
    assert views.caption("elephant") == "an elephant"
    assert views.caption("pig", "side", "orange") == "a pig, side view, on an orange background"


@pytest.mark.parametrize(
    "azimuth, name", [(0, "front"), (44, "front"), (-44, "front"), (359, "front"), (90, "side"), (270, "side")]
)
def test_the_view_is_named_after_the_azimuth(azimuth, name):
    assert views.view_name(azimuth) == name
    assert views.view_name(180 - azimuth) == {"front": "back", "side": "side"}[name]


def test_softening_keeps_flat_pictures_and_the_mean():
    flat = np.full((6, 7, 3), 0.3)
    np.testing.assert_allclose(views.soften(flat), flat)
    spot = np.zeros((7, 7, 3))
    spot[3, 3] = 1
    soft = views.soften(spot)
    assert soft[3, 3, 0] == pytest.approx(0.25) and soft[2, 3, 0] == pytest.approx(0.125)
    assert soft.sum() == pytest.approx(3)


def test_a_random_view_follows_its_generator_and_names_its_background():
    mesh = square(color=RED)
    image, view, color = views.random_view(mesh, 32, np.random.default_rng(3))
    again, *labels = views.random_view(mesh, 32, np.random.default_rng(3))
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert np.array_equal(image, again) and labels == [view, color]
    assert np.abs(image[0, 0] / 255 - np.array(BACKGROUNDS[views.COLORS[color]])).max() < 0.15


def test_pictures_of_every_mesh_are_labelled_by_file_and_follow_the_seed(glb, tmp_path):
    (tmp_path / "another.glb").write_bytes(glb.read_bytes())
    pictures = views.make_pictures(tmp_path, 3, 16, seed=1, workers=1)
    assert pictures.names == ("another", "tile")
    assert pictures.images.shape == (6, 16, 16, 3)
    assert pictures.labels[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    rng = np.random.default_rng([1, 1])  # the seed, then the number of the mesh
    for image, label in zip(pictures.images[3:], pictures.labels[3:], strict=True):
        expected, *attributes = views.random_view(load_mesh(glb), 16, rng)
        assert np.array_equal(image, expected) and label[1:].tolist() == attributes


def test_a_folder_without_meshes_says_so(tmp_path):
    with pytest.raises(ValueError, match="no .glb mesh here"):
        views.make_pictures(tmp_path, 1, 16, seed=0)
