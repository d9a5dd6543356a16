import numpy as np
import pytest
import torch
from PIL import Image

from splatedit import media
from splatedit.errors import InputError


def frames(count=5, height=24, width=32):
    """A bright square that walks to the right."""
    film = np.full((count, height, width, 3), 20, np.uint8)
    for index in range(count):
        film[index, 8:16, 4 * index : 4 * index + 8] = (250, 120, 30)
    return list(film)


def read_film(path):
    import av

    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)], rate


def test_bytes_clip_and_survive_nan():
    image = torch.tensor([-1.0, 0.0, 0.5, 1.0, 7.0, float("nan")]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert media.to_bytes(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


def test_film_has_every_frame_in_order(tmp_path):
    film = frames()
    media.save_frames(film, tmp_path / "a.mp4", fps=12)
    back, rate = read_film(tmp_path / "a.mp4")
    assert len(back) == len(film) and rate == 12
    for got, sent in zip(back, film, strict=True):
        assert np.abs(got.astype(int) - sent).mean() < 6  # lossy, and colour at half resolution


def test_film_of_odd_size_is_padded(tmp_path):
    media.save_frames(frames(2, 23, 31), tmp_path / "a.mp4")
    back, _ = read_film(tmp_path / "a.mp4")
    assert back[0].shape == (24, 32, 3)


@pytest.mark.parametrize("ending", [".gif", ".apng"])
def test_animations_have_every_frame_and_repeat(ending, tmp_path):
    media.save_frames(frames(), tmp_path / f"a{ending}", fps=10)
    with Image.open(tmp_path / f"a{ending}") as image:
        assert image.n_frames == 5 and image.info["duration"] == 100 and image.info["loop"] == 0


def test_png_is_the_first_frame(tmp_path):
    film = frames()
    media.save_frames(film, tmp_path / "a.PNG")
    with Image.open(tmp_path / "a.PNG") as image:
        np.testing.assert_array_equal(np.asarray(image), film[0])


def test_folder_of_frames(tmp_path):
    film = frames()
    media.save_frames(film, tmp_path / "new" / "film")
    for index, frame in enumerate(film):
        with Image.open(tmp_path / "new" / "film" / f"{index:03d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), frame)
    with pytest.raises(InputError, match="holds .png files already"):
        media.save_frames(film[:2], tmp_path / "new" / "film")


def test_unknown_ending_and_bad_place(tmp_path):
    with pytest.raises(InputError, match=r"'\.webm'.*\.mp4"):
        media.check_target(tmp_path / "a.webm")
    with pytest.raises(InputError, match="missing"):
        media.save_frames(frames(), tmp_path / "missing" / "a.mp4")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        media.save_frames(frames(), tmp_path / "file")


def test_a_film_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield from frames(2)
        raise RuntimeError("no more")

    (tmp_path / "a.mp4").write_bytes(b"before")
    with pytest.raises(RuntimeError):
        media.save_frames(broken(), tmp_path / "a.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"before"


def test_side_by_side_and_sheet():
    film = frames(3)
    both = list(media.beside(film, film[::-1]))
    assert len(both) == 3 and both[0].shape == (24, 64, 3)
    np.testing.assert_array_equal(both[0][:, 32:], film[2])
    with pytest.raises(ValueError, match="shorter"):
        list(media.beside(film, film[:2]))
    page = media.sheet(film, columns=2, gap=2)
    assert page.shape == (2 * 24 + 2, 2 * 32 + 2, 3)
    np.testing.assert_array_equal(page[26:, :32], film[2])
    assert (page[26:, 34:] == 255).all()


def test_drawing_in_chunks_changes_nothing(cloud):
    from splatedit.cameras import orbit

    cameras = orbit(cloud, 5, size=(40, 32), up="-y", zoom=0.5)
    some, all_ = (np.stack(list(media.draw(cloud, cameras, (0.2, 0.4, 1.0), chunk=k))) for k in (2, 5))
    assert some.shape == (5, 32, 40, 3)
    np.testing.assert_array_equal(some, all_)
    assert some[0, 0, 0].tolist() == [51, 102, 255]  # the corner shows the background
    assert (some != some[0, 0, 0]).any()
