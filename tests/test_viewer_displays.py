"""What reaches the browser's canvas: encoded splats, frames, and how much of them when."""

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from splatedit.cameras import Bounds, bounds
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.viewer import display, encoding, frame_display, pace, splat_display, wire
from splatedit.viewer.encoding import Place, encode, place, sample
from splatedit.viewer.frame_display import Eye, Plan, Scene, Speed, cameras_of, plan
from splatedit.viewer.stage import Stage, opened


def splats(n, seed=0, size=-3.0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    scales = size + 0.7 * draw(n, 3)
    return Gaussians(draw(n, 3), 3 * draw(n, 4), scales, draw(n), draw(n, 1, 3), torch.zeros(n, 0, 3))


# ------------------------------------------------------------------------------------------------------------ encoding
def test_encoded_splats_are_the_gaussians_of_the_scene():
    from scipy.spatial.transform import Rotation

    gaussians, at = splats(50), Place((1.0, -2.0, 0.5), 0.04)
    found = encode(gaussians, at)
    turn = Rotation.from_quat(gaussians.quats.double().numpy()[:, [1, 2, 3, 0]]).as_matrix()
    deviations = np.exp(gaussians.scales.double().numpy())
    deviations = np.maximum(deviations, deviations.max(1, keepdims=True) / 32)
    world = np.einsum("nij,nj,nkj->nik", turn, deviations**2, turn)
    np.testing.assert_allclose(found.covariances * at.scale**2, world, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.array(at.position) + at.scale * found.centers, gaussians.means.numpy(), atol=1e-6)
    rgb = (0.5 + SH_C0 * gaussians.sh0[:, 0].double()).clamp(0, 1).numpy() * 255
    assert np.abs(found.rgbs - rgb).max() <= 0.5 + 1e-4
    assert np.abs(found.opacities[:, 0] - 255 * gaussians.opacities.double().sigmoid().numpy()).max() <= 0.5 + 1e-4
    assert (found.undrawable, found.spared) == (0, 0)


@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3])
def test_covariances_survive_float16_in_scenes_of_any_size(size):
    gaussians = splats(500)
    gaussians = gaussians._replace(means=gaussians.means * size, scales=gaussians.scales + math.log(size))
    at = place(bounds(gaussians))
    sent = encode(gaussians, at).covariances.astype(np.float16).astype(np.float64)
    assert np.isfinite(sent).all()
    deviations = np.sqrt(np.linalg.eigvalsh(sent)) * at.scale
    expected = np.sort(gaussians.scales.double().exp().numpy(), axis=1)
    np.testing.assert_allclose(deviations[:, 2], expected[:, 2], rtol=0.01)  # the longest axis of each


def test_the_thinnest_and_the_largest_splats_keep_a_covariance_that_can_be_drawn():
    """Rounded to float16 a needle's covariance would have negative eigenvalues, for which the browser draws nothing."""
    gaussians = splats(2000)
    gaussians.scales[:1000, 0], gaussians.scales[:1000, 1] = -12, 2.5
    gaussians.scales[1000:] = torch.linspace(-40, 40, 1000)[:, None]
    found = encode(gaussians, place(Bounds(torch.zeros(3), 3.0))).covariances.astype(np.float16).astype(np.float64)
    assert np.isfinite(found).all() and np.linalg.eigvalsh(found).min() > 0


def test_what_cannot_be_drawn_is_left_out_and_counted(cloud):
    cloud.means[3, 1], cloud.scales[5, 0], cloud.sh0[7, 0, 0] = math.nan, 200.0, math.inf
    cloud.quats[9] = 0
    found = encode(cloud, place(Bounds(torch.zeros(3), 1.0)))
    assert (found.n, found.undrawable) == (296, 4)
    kept = torch.ones(300, dtype=torch.bool)
    kept[[3, 5, 7, 9]] = False
    np.testing.assert_allclose(found.centers / wire.RADIUS, cloud.means[kept].numpy(), atol=1e-5)


def test_no_gaussians_are_no_splats(cloud):
    found = encode(cloud.select(slice(0, 0)), Place((0, 0, 0), 1.0), budget=10)
    assert found.n == 0 and found.covariances.shape == (0, 3, 3)


def test_a_budget_takes_always_the_same_sample_the_more_visible_the_likelier():
    gaussians = splats(4000)._replace(scales=torch.zeros(4000, 3), opacities=torch.full((4000,), 9.0))
    gaussians.scales[2000:] = math.log(0.5)  # a quarter of the area
    gaussians.opacities[:1000] = -30  # cannot be seen
    kept, wider = sample(gaussians, 500)
    places = {tuple(mean): row for row, mean in enumerate(gaussians.means.tolist())}
    rows = [places[tuple(mean)] for mean in kept.means.tolist()]
    assert rows == sorted(set(rows)) and len(rows) == 500 and min(rows) >= 1000
    torch.testing.assert_close(kept.scales, gaussians.scales[rows] + math.log(wider))
    seen = encoding.visibility(gaussians).sum()
    assert encoding.visibility(kept).sum() == pytest.approx(seen, rel=1e-4) and wider > 2
    large, small = sum(row < 2000 for row in rows), sum(row >= 2000 for row in rows)
    assert 2.5 < (large / 1000) / (small / 2000) < 5  # 4, but for what is used up
    assert torch.equal(sample(gaussians, 500)[0].means, kept.means)
    assert sample(gaussians, 4000) == (gaussians, 1.0)
    found = encode(gaussians, Place((0, 0, 0), 1.0), budget=500)
    assert (found.n, found.spared) == (500, 3500)


def test_a_coarser_frame_has_larger_splats_instead_of_holes():
    draw = torch.Generator().manual_seed(0)
    wall = torch.cat([2 * torch.rand(6000, 2, generator=draw) - 1, torch.full((6000, 1), 2.0)], 1)
    one = dot((0.0, 0.0, 0.0)).select([0] * 6000)._replace(means=wall, scales=torch.full((6000, 3), -3.3))
    painter, scene = frame_display.Painter(), Scene((one,), 0.5, (1.0, 1.0, 1.0))
    inside = (slice(40, 80), slice(60, 100))
    assert painter.draw(scene, front(), Plan("still", 160 * 120, 6000))[inside].mean() < 5
    assert painter.draw(scene, front(), Plan("moving", 160 * 120, 1500))[inside].mean() < 15


def test_encoding_changes_nothing_that_it_is_given(cloud):
    before = cloud.detach()
    turned = cloud._replace(quats=cloud.quats.T.contiguous().T)  # as numpy sees it, four rows in one piece
    encode(turned, Place((0, 0, 0), 1.0))
    assert torch.equal(turned.quats, before.quats)


# ------------------------------------------------------------------------------------------- fake server, fake clock
class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Handle:
    def __init__(self, server, name, visible):
        self.server, self.name, self.shows = server, name, visible

    @property
    def visible(self):
        return self.shows

    @visible.setter
    def visible(self, value):
        self.shows = value
        self.server.log.append((value, self.name))

    def set_gaussians(self, centers, covariances, rgbs, opacities):
        self.server.log.append(("set", self.name, len(centers), rgbs[0, 0]))

    def remove(self):
        self.server.log.append(("remove", self.name))
        del self.server.nodes[self.name]


class Server:
    """Notes what viser would be told."""

    def __init__(self, clients=1):
        self.clients, self.log, self.nodes, self.scene = dict.fromkeys(range(clients)), [], {}, self

    def get_clients(self):
        return self.clients

    def atomic(self):
        return contextlib.nullcontext()

    def add_gaussian_splats(self, name, centers, rgbs, **_):
        self.log.append(("add", name, len(centers), rgbs[0, 0]))
        self.nodes[name] = Handle(self, name, True)
        return self.nodes[name]

    def bytes(self):
        return sum(32 * entry[2] for entry in self.log if entry[0] in ("add", "set"))


def on_stage(n=100, clients=1, rate=1e6, busy=False):
    server, clock, stage = Server(clients), Clock(), Stage(opened(splats(n)))
    writer = splat_display.SplatDisplay(
        server,
        stage,
        display.Pictures(),
        lambda: busy,
        clock=clock,
        rate=rate,  # type: ignore[arg-type]
    )
    return server, clock, stage, writer


def coloured(shown, value):
    """The current state in one colour, by which it is known again."""
    sh0 = torch.full_like(shown.current.sh0, (value / 255 - 0.5) / SH_C0)
    return shown.current._replace(sh0=sh0)


def run(serve, clock, seconds, step=0.01):
    """Let a display's loop run on the fake clock."""
    end, due = clock.now + seconds, clock.now
    while clock.now < end:
        if due is not None and clock.now >= due:
            wait = serve()
            due = None if wait is None else clock.now + wait
        clock.now += step


# --------------------------------------------------------------------------------------------------------------- splats
def test_what_is_sent_is_bounded_and_the_newest():
    server, clock, stage, writer = on_stage(n=1000, clients=2, rate=100_000)
    begun = clock.now
    for index in range(1000):
        stage.change(current=coloured(stage.shown, index % 250))
        writer.serve()
        clock.now += 0.01
    sent = server.bytes() * 2
    assert 800_000 < sent <= 100_000 * (clock.now - begun) + 64_000
    run(writer.serve, clock, 1.0)
    assert server.log[-1] == ("set", "/splats/after", 1000, 999 % 250)


def test_small_scenes_are_sent_a_few_times_a_second_and_less_often_beside_an_edit():
    server, clock, stage, writer = on_stage(n=10)
    for number in range(100):
        stage.change(current=coloured(stage.shown, number))
        writer.serve()
        clock.now += 0.01
    assert 4 <= len([entry for entry in server.log if entry[0] in ("add", "set")]) <= 5
    writer.busy = lambda: True
    clock.now += 10
    stage.change(current=coloured(stage.shown, 200))
    slow = encoding.encode

    def encode(*arguments):
        clock.now += 0.1
        return slow(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splat_display, "encode", encode)
        writer.serve()
    assert writer.pace.ready == pytest.approx(clock.now + splat_display.REST * 0.1)


def test_nothing_is_encoded_for_nobody_and_who_comes_gets_the_newest_once():
    server, clock, stage, writer = on_stage(clients=0)
    run(writer.serve, clock, 0.1)
    assert [entry[0] for entry in server.log] == ["add"]  # the first scene waits for the first browser
    for index in range(500):
        stage.change(current=coloured(stage.shown, index % 200))
        writer.serve()
        clock.now += 0.01
    assert [entry[0] for entry in server.log] == ["add", "remove"] and not server.nodes
    server.clients = {0: None}
    writer.serve()
    assert server.log[2:] == [("add", "/splats/after", 100, 499 % 200)]
    run(writer.serve, clock, 30)
    assert len(server.log) == 3


def test_a_scene_that_settles_while_nobody_is_there_is_kept_for_who_comes():
    server, clock, stage, writer = on_stage(clients=0)
    writer.serve()
    stage.change(current=coloured(stage.shown, 9))
    run(writer.serve, clock, 5)
    assert server.log[-1] == ("add", "/splats/after", 100, 9) and len(server.nodes) == 1


def test_after_the_last_update_the_node_is_made_anew_once():
    """viser sends who joins both the node as it was made and its update: twice the bytes."""
    server, clock, stage, writer = on_stage()
    run(writer.serve, clock, 1)
    stage.change(current=coloured(stage.shown, 7))
    run(writer.serve, clock, 20)
    assert [entry[0] for entry in server.log] == ["add", "set", "add"] and server.log[-1][3] == 7


def test_looking_back_and_forth_sends_each_state_once():
    server, clock, stage, writer = on_stage()
    stage.change(current=coloured(stage.shown, 50))
    run(writer.serve, clock, 1)
    for look in ("before", "after", "before", "after"):
        stage.change(look=look)
        run(writer.serve, clock, 0.5)
    assert [entry[0] for entry in server.log].count("add") == 2 and not any(entry[0] == "set" for entry in server.log)
    assert [node.visible for name, node in sorted(server.nodes.items())] == [True, False]
    run(writer.serve, clock, 2 * splat_display.LINGER)
    assert set(server.nodes) == {"/splats/after"}


def test_what_is_hidden_is_not_kept_up_to_date():
    server, clock, stage, writer = on_stage()
    stage.change(current=coloured(stage.shown, 50), look="before")
    run(writer.serve, clock, 1)
    sent = server.bytes()
    for index in range(10):
        stage.change(current=coloured(stage.shown, index))
        run(writer.serve, clock, 0.5)
    assert server.bytes() == sent


def test_other_settings_resend_nothing():
    server, clock, stage, writer = on_stage()
    run(writer.serve, clock, 1)
    stage.change(split=0.3, background=(0.0, 0.0, 0.0), path=None)
    run(writer.serve, clock, 5)
    assert len(server.log) == 1


def test_a_scene_that_lost_all_its_splats_leaves_no_node():
    server, clock, stage, writer = on_stage()
    run(writer.serve, clock, 1)
    stage.change(current=stage.shown.current.select(slice(0, 0)))
    run(writer.serve, clock, 5)
    assert not server.nodes


def test_another_scene_stands_elsewhere():
    server, clock, stage, writer = on_stage()
    run(writer.serve, clock, 1)
    stage.change(current=coloured(stage.shown, 3), extent=Bounds(torch.ones(3), 9.0))
    run(writer.serve, clock, 1)
    assert server.log[-1] == ("add", "/splats/after", 100, 3) and len(server.nodes) == 1


def test_above_the_budget_frames_are_drawn_and_splats_on_request_are_a_sample(monkeypatch):
    monkeypatch.setattr(display, "SPLATS", 60)
    server, clock, stage, writer = on_stage()
    told, writer.say = [], lambda line: told.append(display.words(line))
    run(writer.serve, clock, 1)
    assert not server.log and display.in_use(stage.shown, writer.pictures) == "frames"
    stage.change(display="splats")
    run(writer.serve, clock, 1)
    assert server.bytes() == 60 * 32
    assert told[-1].startswith("**60 of 100 splats**, a sample, each 1.1 times as wide · drawn by your browser")
    stage.change(look="split")  # two pictures: frames only
    run(writer.serve, clock, 2 * splat_display.LINGER)
    assert display.in_use(stage.shown, writer.pictures) == "frames" and not server.nodes


@pytest.mark.parametrize(("wish", "look", "n", "expected"), [
    ("auto", "after", 100, "splats"),
    ("auto", "after", 101, "frames"),
    ("auto", "split", 100, "frames"),
    ("auto", "ghost", 51, "frames"),  # of both states
    ("frames", "after", 1, "frames"),
    ("splats", "after", 101, "splats"),
])  # fmt: skip
def test_which_display_is_used(wish, look, n, expected, monkeypatch):
    monkeypatch.setattr(display, "SPLATS", 100)
    shown = opened(splats(n))._replace(display=wish, look=look)
    assert display.in_use(shown, display.Pictures()) == expected


def test_a_look_is_made_again_only_when_what_it_is_made_of_has_changed(monkeypatch):
    made = []
    looks = {
        "before": lambda s: (made.append("before"), s.source)[1],
        "odd": lambda s: (made.append("odd"), s.current)[1],
    }
    monkeypatch.setattr(display, "LOOKS", looks)
    pictures, shown = display.Pictures(), opened(splats(5))
    for step in ({}, {"split": 0.1}, {"current": splats(5)}, {"selection": torch.ones(5, dtype=torch.bool)}):
        shown = shown._replace(**step)
        pictures.of(shown, "before"), pictures.of(shown, "odd")
    assert made == ["before", "odd", "odd", "before", "odd"]


# -------------------------------------------------------------------------------------------------------------- cameras
def test_the_browsers_camera_sees_points_where_they_are():
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("xyz", [25, -130, 70], degrees=True)
    x, y, z, w = turn.as_quat()
    eye = Eye((w, x, y, z), (1.5, -0.7, 4.0), 0.9, 640, 360)
    right, down, ahead = turn.as_matrix().T
    focal = 180 / math.tan(0.45)
    for a, b, depth in ((0, 0, 2.0), (0.4, -0.3, 3.0), (-1.0, 0.2, 5.0)):
        point = torch.tensor(np.array(eye.position) + a * right + b * down + depth * ahead, dtype=torch.float32)
        for width, height in ((640, 360), (160, 90)):
            cameras = cameras_of(eye, width, height)
            seen = cameras.K[0] @ (cameras.w2c[0] @ torch.cat([point, torch.ones(1)]))[:3]
            expected = [(focal * a / depth + 320) * width / 640, (focal * b / depth + 180) * height / 360, 1.0]
            torch.testing.assert_close(seen / seen[2], torch.tensor(expected), rtol=0, atol=2e-3)


def front(width=160, height=120):
    """Looks along +z from the origin."""
    return Eye((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0), math.pi / 2, width, height)


def dot(colour, x=0.0, y=0.0):
    """One opaque splat of this colour two units ahead."""
    sh0 = (torch.tensor(colour).float() - 0.5)[None, None] / SH_C0
    means, quats = torch.tensor([[x, y, 2.0]]), torch.tensor([[1.0, 0, 0, 0]])
    return Gaussians(means, quats, torch.full((1, 3), -1.5), torch.full((1,), 9.0), sh0, torch.zeros(1, 0, 3))


def test_a_frame_shows_a_splat_where_the_camera_sees_it():
    scene = Scene((dot((1.0, 0.0, 0.0), x=0.5, y=-0.25),), 0.5, (0.0, 0.0, 1.0))
    picture = frame_display.Painter().draw(scene, front(), Plan("still", 160 * 120, 10))
    assert picture.shape == (120, 160, 3) and tuple(picture[-1, 0]) == (0, 0, 255)
    y, x = np.nonzero(picture[..., 0] > 100)
    assert abs(x.mean() + 0.5 - (80 + 60 * 0.25)) < 0.5 and abs(y.mean() + 0.5 - (60 - 60 * 0.125)) < 0.5
    coarse = frame_display.Painter().draw(scene, front(), Plan("moving", 160 * 120 // 4, 10))
    assert coarse.shape == (60, 80, 3)


def test_split_shows_the_source_on_the_left_and_a_line():
    scene = Scene((dot((1.0, 0.0, 0.0)), dot((0.0, 1.0, 0.0))), 0.5, (0.0, 0.0, 0.0))
    picture = frame_display.Painter().draw(scene, front(), Plan("still", 160 * 120, 10)).astype(int)
    assert picture[60, 76, 0] > 200 and picture[60, 76, 1] < 20
    assert picture[60, 83, 1] > 200 and picture[60, 83, 0] < 20
    assert (picture[:, 79:81] > 60).all() and picture[0, 77].sum() == picture[0, 82].sum() == 0


def test_a_scene_without_splats_is_its_background(cloud):
    scene = Scene((cloud.select(slice(0, 0)),), 0.5, (1.0, 0.5, 0.0))
    picture = frame_display.Painter("cpu").draw(scene, front(40, 30), Plan("still", 1200, 10))
    assert picture.shape == (30, 40, 3) and (picture == (255, 128, 0)).all()


# -------------------------------------------------------------------------------------------------------- how much work
def test_the_speed_is_learnt_from_what_frames_took():
    speed = Speed()
    rng = np.random.default_rng(0)
    for _ in range(60):
        splats, pixels = int(rng.choice([50_000, 400_000])), int(rng.choice([40_000, 900_000]))
        speed = speed.learned(splats, pixels, 6e-7 * splats + 1e-7 * pixels)
    assert speed.splat == pytest.approx(6e-7, rel=0.1) and speed.pixel == pytest.approx(1e-7, rel=0.1)


def test_plans_are_coarse_while_moving_and_sharp_when_still():
    full, speed = 1_000_000, Speed(splat=1e-7, pixel=2e-7)
    assert plan(full, 10_000, Speed(1e-9, 1e-9, 0.01), True, False, 0) == Plan("moving", full, 10_000)
    limit = frame_display.RATE * frame_display.LEAST / 2  # bytes
    assert plan(full, 10_000, Speed(1e-9, 1e-9, 0.4), True, False, 0).pixels == pytest.approx(limit / 0.4, rel=1e-3)
    how = plan(full, 10_000, speed, True, False, 0)
    assert how.splats == 10_000 and speed.seconds(*how[2:0:-1]) == pytest.approx(frame_display.MOVING, rel=1e-3)
    how = plan(full, 10_000_000, speed, True, False, 0)  # even one pixel of all would take a second
    assert how.splats < 500_000 and speed.seconds(*how[2:0:-1]) <= frame_display.MOVING * 1.1
    known, steps, speed = 0, [], Speed(splat=1e-7, pixel=1e-6)
    while known < full:
        how = plan(full, 10_000, speed, False, False, known)
        assert how.kind == "still" and how.splats == 10_000
        steps.append(known := how.pixels)
    assert 1 < len(steps) <= 3 and speed.seconds(10_000, steps[0]) <= frame_display.STILL * 1.01
    assert plan(full, 10_000, speed, False, True, 0).kind == "live"
    assert speed.seconds(10_000, plan(full, 10_000, speed, False, True, 0).pixels) <= frame_display.LIVE * 1.01


# -------------------------------------------------------------------------------------------------- frames to browsers
class Camera:
    def __init__(self):
        self.wxyz, self.position, self.fov = np.array([1.0, 0, 0, 0]), np.zeros(3), 1.0
        self.image_width, self.image_height = 640, 360


class Client:
    """Notes what its browser would be sent."""

    def __init__(self, clock, number=0):
        self.client_id, self.camera, self.scene, self._websock_interface = number, Camera(), self, self
        self.clock, self.frames, self.plain = clock, [], 0

    def queue_message(self, message):
        if message.format == "png":
            self.plain += 1
        else:
            self.frames.append((self.clock.now, message.rgb_data))

    def flush(self):
        pass

    def sizes(self):
        return [Image.open(io.BytesIO(data)).size for _, data in self.frames]


class Painter:
    """Takes time on the fake clock, and draws noise: the most bytes that a picture can have."""

    undrawable = 0

    def __init__(self, clock, pixel=1e-7):
        self.clock, self.pixel, self.eyes, self.meanwhile = clock, pixel, [], None
        self.noise = np.random.default_rng(0).integers(0, 256, (400, 640, 3), dtype=np.uint8)

    def warm(self): ...
    def forget(self, scene): ...
    def prepared(self, picture, splats): ...

    def draw(self, scene, eye, how):
        self.clock.now += self.pixel * how.pixels
        self.eyes.append((eye, how))
        if self.meanwhile:
            self.meanwhile()
        factor = math.sqrt(how.pixels / (eye.width * eye.height))
        return self.noise[: round(eye.height * factor), : round(eye.width * factor)]


def at_frames(clients=1, pixel=1e-7, busy=False):
    clock = Clock()
    stage = Stage(opened(splats(100))._replace(display="frames"))
    painter = Painter(clock, pixel)
    frames = frame_display.FrameDisplay(
        None,
        stage,
        display.Pictures(),
        lambda: busy,
        clock=clock,
        painter=painter,  # type: ignore[arg-type]
    )
    here = [Client(clock, number) for number in range(clients)]
    for client in here:
        frames.join(client)
    return frames, clock, stage, painter, here


def test_frames_are_coarse_while_the_camera_moves_and_sharp_when_it_stands():
    frames, clock, _, painter, (client,) = at_frames(pixel=1e-6)
    run(frames.serve, clock, 3)
    assert client.sizes()[-1] == (640, 360)
    begun, shown = clock.now, len(client.frames)
    while clock.now < begun + 5:
        client.camera.position = np.array([clock.now, 0.0, 0.0])
        frames.serve()
        clock.now += 0.002
    moving = client.sizes()[shown:]
    assert all(width < 400 for width, _ in moving[3:])
    assert 5 * 8 <= len(moving) <= 5 * 15 + 1
    stood = clock.now
    run(frames.serve, clock, 3)
    assert client.sizes()[-1] == (640, 360) and client.frames[-1][0] - stood < 1.5
    assert painter.eyes[-1][0].position[0] == client.camera.position[0]
    drawn = len(painter.eyes)
    run(frames.serve, clock, 5)
    assert len(painter.eyes) == drawn  # nothing changes, nothing is drawn


def test_a_browser_is_sent_no_more_than_its_bytes():
    frames, clock, _, painter, (client,) = at_frames(pixel=1e-8)
    begun = clock.now
    while clock.now < begun + 10:
        client.camera.position = np.array([clock.now, 0.0, 0.0])
        frames.serve()
        clock.now += 0.005
    sizes = [len(data) for _, data in client.frames]
    assert sum(sizes[:-1]) <= frame_display.RATE * 10
    assert len(sizes) > 60  # noise is as dear as pictures get: coarser, not fewer


def test_a_picture_of_where_nobody_looks_any_more_is_not_sent():
    frames, clock, _, painter, (client,) = at_frames()
    run(frames.serve, clock, 1)
    shown = len(client.frames)

    def move():
        client.camera.position = np.array([5.0, 0, 0])

    frames.stage.change(background=(0.0, 0.0, 0.0))
    painter.meanwhile = move
    frames.serve()
    assert len(client.frames) == shown
    painter.meanwhile = None
    frames.serve()
    assert len(client.frames) == shown + 1 and painter.eyes[-1][0].position == (5.0, 0, 0)


def test_beside_an_edit_frames_rest_unless_the_camera_moves():
    frames, clock, stage, painter, (client,) = at_frames(busy=True)
    begun = clock.now
    while clock.now < begun + 10:
        stage.change(current=coloured(stage.shown, 1))
        frames.serve()
        clock.now += 0.01
    spent = sum(painter.pixel * how.pixels for _, how in painter.eyes)
    assert 0.3 < spent < 10 / (1 + frame_display.REST) * 1.1
    drawn = len(painter.eyes)
    run(frames.serve, clock, 5)
    assert len(painter.eyes) <= drawn + 1  # the same state is not drawn again and again
    frames.busy = lambda: False
    run(frames.serve, clock, 5)
    assert painter.eyes[-1][1] == Plan("still", 640 * 360, 100)


def test_two_browsers_each_get_their_own_view_and_none_starves():
    frames, clock, stage, painter, (one, two) = at_frames(clients=2, pixel=2e-6)
    two.camera.position = np.array([9.0, 0, 0])
    run(frames.serve, clock, 4)
    shown = len(two.frames)
    assert {eye.position[0] for eye, _ in painter.eyes} == {0.0, 9.0}
    begun = clock.now
    while clock.now < begun + 4:
        one.camera.position = np.array([clock.now, 0.0, 0.0])
        stage.change(current=coloured(stage.shown, 1))
        frames.serve()
        clock.now += 0.005
    assert len(two.frames) > shown + 4
    frames.leave(two)
    stage.change(current=coloured(stage.shown, 2))
    run(frames.serve, clock, 1)
    assert len(painter.eyes) and frames.seats.keys() == {0}


def test_splats_take_the_picture_away_once():
    frames, clock, stage, _, (client,) = at_frames()
    run(frames.serve, clock, 1)
    stage.change(display="splats")
    assert frames.serve() is None and frames.serve() is None
    assert client.plain == 1
    stage.change(display="frames")
    run(frames.serve, clock, 1)
    assert client.sizes()[-1] == (640, 360)


def test_a_display_that_fails_says_so_once_and_goes_on(monkeypatch):
    import threading

    told, done, calls = [], threading.Event(), []

    def serve():
        calls.append(1)
        if len(calls) == 4:
            done.set()
            return None
        raise ValueError("no paint")

    loop = pace.Loop("test", serve, told.append)
    monkeypatch.setattr(loop.bell, "wait", lambda timeout=None: len(calls) < 4 or threading.Event().wait(timeout))
    loop.start()
    assert done.wait(10)
    loop.closed = True
    assert [str(error) for error in told] == ["no paint"]


# ----------------------------------------------------------------------------------------------------------- browser
BLUE = (0.0, 0.0, 1.0)  # a background that no splat and no panel has


def few():
    """Opaque splats of two colours about the middle, few enough for a browser without a GPU."""
    gaussians = splats(300, size=-1.6)
    left = gaussians.means[:, :1] < 0
    rgb = torch.where(left, torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.7, 0.1]))
    return gaussians._replace(
        means=0.6 * gaussians.means, sh0=((rgb - 0.5) / SH_C0)[:, None], opacities=torch.full((300,), 4.0)
    )


def centroid(picture, colour):
    """Where a colour is, (x, y) pixels, and on what share of the picture."""
    other = [channel for channel in range(3) if channel != colour]
    mask = picture[..., colour] - picture[..., other].max(-1) > 60
    y, x = np.nonzero(mask)
    return (x.mean(), y.mean(), mask.mean()) if len(x) else (0.0, 0.0, 0.0)


@pytest.fixture
def shown_app():
    from splatedit.viewer.app import App

    app = App(opened(few(), background=BLUE))
    yield app
    app.close()


def bare_page(browser, app):
    """The viewer without what lies over its canvas."""
    from screen import open_page

    page = open_page(browser, app.url)
    page.add_style_tag(content="body * { visibility: hidden !important } canvas { visibility: visible !important }")
    return page


@pytest.mark.browser
def test_a_frame_shows_what_the_browsers_splats_do(browser, shown_app):
    """The same colours at the same places, within 2 pixels."""
    from screen import keep, pixels, until

    page = bare_page(browser, shown_app)
    until(page, lambda: min(centroid(pixels(page), colour)[2] for colour in (0, 1)) > 0.02, "splats")
    past = []

    def settled():  # the first picture fades in
        past.append(pixels(page))
        return len(past) > 3 and all(np.array_equal(past[-1], other) for other in past[-4:-1])

    until(page, settled, "a picture that stands still")
    keep(page, "display-splats")
    splats = pixels(page)
    sent = shown_app.displays.frames
    shown_app.stage.change(display="frames")
    until(page, lambda: any(seat.kind == "still" and not seat.rough for seat in sent.seats.values()), "a frame")
    nodes = shown_app.displays.splats.nodes
    until(page, lambda: not any(node.visible for node in nodes.values()), "the splats are hidden")

    def alike():
        """Whether it is the frame that is seen by now, and shows the same."""
        frame = pixels(page)
        pairs = [(centroid(splats, colour), centroid(frame, colour)) for colour in (0, 1, 2)]
        near = all(math.dist(one[:2], other[:2]) < 2.0 for one, other in pairs)
        large = all(one[2] == pytest.approx(other[2], rel=0.08) and one[2] > 0.02 for one, other in pairs)
        return not np.array_equal(frame, splats) and near and large and np.abs(splats - frame).mean() < 4

    until(page, alike, "its pixels, of the same colours at the same places")
    keep(page, "display-frames")
    shown_app.stage.change(display="splats")
    until(page, lambda: np.abs(pixels(page) - splats).mean() < 0.5, "splats again, and no picture behind them")
    assert not page.errors
    page.context.close()


@pytest.mark.browser
def test_a_large_scene_comes_as_frames_coarse_while_moving_then_sharp(browser, shown_app, monkeypatch):
    from screen import keep, pixels, until

    monkeypatch.setattr(display, "SPLATS", 200)
    frames, kinds = shown_app.displays.frames, []
    send = frames.send
    monkeypatch.setattr(frames, "send", lambda seat, picture, how: (kinds.append(how), send(seat, picture, how))[1])
    shown_app.stage.change(current=shown_app.stage.shown.current.select(slice(0, 290)))
    page = bare_page(browser, shown_app)
    nodes = shown_app.displays.splats.nodes
    until(page, lambda: not any(node.visible for node in nodes.values()), "no splats")
    until(page, lambda: min(centroid(pixels(page), colour)[2] for colour in (0, 1)) > 0.02, "a frame")
    (seat,) = frames.seats.values()

    def sharp():
        return kinds and kinds[-1].kind == "still" and kinds[-1].pixels == seat.eye.width * seat.eye.height

    until(page, sharp, "a sharp frame")
    before = centroid(pixels(page), 0)
    kinds.clear()
    page.mouse.move(120, 300)
    page.mouse.down()
    way = itertools.chain(range(130, 260, 10), itertools.cycle([240, 250]))

    def moving():  # for as long as it takes to be drawn while it moves
        for x in itertools.islice(way, 13):
            page.mouse.move(x, 300)
        return any(how.kind == "moving" for how in kinds)

    until(page, moving, "a frame on the way")
    page.mouse.up()
    until(page, sharp, "a sharp frame of the new view")
    assert {how.kind for how in kinds} == {"moving", "still"}
    until(page, lambda: math.dist(centroid(pixels(page), 0)[:2], before[:2]) > 5, "the view from elsewhere")
    keep(page, "display-turned")
    assert not page.errors
    page.context.close()
