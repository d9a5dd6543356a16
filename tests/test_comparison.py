"""What benchmarks/image_edits.py concludes from its runs, and the LPIPS it measures with."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import image_edits
import lpips_alex
from edits import at_score
from rich.console import Console


def test_numbers_are_read_off_where_the_score_is_first_reached():
    curve = [{"score": s, "x": x} for s, x in ((-0.2, 0.0), (0.2, 10.0), (0.6, 30.0), (0.4, 50.0), (0.9, 70.0))]
    assert at_score(curve, 0.5, "score")["x"] == pytest.approx(25)
    assert at_score(curve, -0.5, "score") == curve[0]
    assert at_score(curve, 0.95, "score") is None


def test_an_interval_is_over_edits_and_not_over_their_seeds():
    """Seeds that agree tell nothing new: four edits of 50 seeds each are as uncertain as four of one."""
    values = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}
    few = image_edits.interval(list(values.items()))
    many = image_edits.interval([pair for pair in values.items() for _ in range(50)])
    assert few == many and few[0] == 1.5 and few[1] < 0.7 and few[2] > 2.3
    assert image_edits.interval([("a", 2.0)] * 3) == (2.0, 2.0, 2.0)
    assert all(np.isnan(image_edits.interval([])))


def test_the_table_compares_the_edits_that_both_methods_bring_there(capsys):
    def run(method, source, scores, x):
        curve = [{"score": s, "source_psnr": x, "cost": 1.0} for s in scores]
        return {"method": method, "source": source, "seed": 0, "curve": curve}

    runs = [run("ids", "a", (0.1, 0.6), 20.0), run("ids", "b", (0.1, 0.7), 30.0)]
    runs += [run("dds", "a", (0.1, 0.8), 21.5), run("dds", "b", (0.1, 0.3), 50.0)]
    console = Console(width=200, record=True)
    image_edits.compare(runs, 0.5, console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    ids, dds, against = (row for row in rows if row)
    assert ids[:3] == ["ids", "2/2", "25.00 [20.00, 30.00]"] and dds[:3] == ["dds", "1/2", "21.50 [21.50, 21.50]"]
    assert against[:3] == ["dds", "1", "+1.50 [+1.50, +1.50]*"]


@pytest.fixture
def weights(tmp_path):
    """Made-up weights in the form of the published ones."""
    rng = np.random.default_rng(0)
    shapes = [(11, 11, 3, 4), (5, 5, 4, 5), (3, 3, 5, 6), (3, 3, 6, 5), (3, 3, 5, 5)]
    made = [{"kernel": rng.normal(size=s).astype(np.float32), "bias": np.zeros(s[-1], np.float32)} for s in shapes]
    lines = [np.ones((1, 1, s[-1], 1), np.float32) for s in shapes]
    content = {"AlexNet_0": {f"Conv_{k}": one for k, one in enumerate(made)}}
    content |= {f"NetLinLayer_{k}": {"Conv_0": {"kernel": line}} for k, line in enumerate(lines)}
    with open(tmp_path / "alexnet.ckpt", "wb") as stream:
        pickle.dump(content, stream)
    return tmp_path / "alexnet.ckpt"


def test_lpips_is_a_distance_of_unit_features(weights):
    measure = lpips_alex.Lpips(weights)
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(measure(a, a), torch.zeros(2))
    assert torch.equal(measure(a, b), measure(b, a)) and (measure(a, b) > 0).all()
    assert (measure(a, b) <= 5 * 4).all()  # unit vectors lie at most 2 apart, and there are five layers


def test_lpips_unpickles_arrays_alone(tmp_path):
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Path}))
    with pytest.raises(pickle.UnpicklingError, match="is no part of a numpy array"):
        lpips_alex.Lpips(tmp_path / "evil.ckpt")
