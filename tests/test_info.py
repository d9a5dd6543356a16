import json
import math

import numpy as np
import pytest
import torch

from splatedit.errors import InputError
from splatedit.files import save
from splatedit.gaussians import Gaussians
from splatedit.info import PERCENTILES, describe, format


@pytest.fixture
def path(tmp_path):
    """101 Gaussians on a line along x, opacity and size growing along it, with everything a file can carry."""
    n = 101
    ramp = torch.linspace(0, 1, n)
    scene = Gaussians(
        means=torch.stack([10 * ramp, torch.zeros(n), -ramp], 1),
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1),
        scales=torch.stack([torch.full((n,), -9.0), (1 + ramp).log(), torch.full((n,), -9.0)], 1),
        opacities=torch.logit(0.1 + 0.8 * ramp),
        sh0=torch.zeros(n, 1, 3),
        shN=torch.zeros(n, 8, 3),
        extra={"label": np.arange(n, dtype=np.uint8)},
        comments=("Vertical Axis: z",),
        obj_info=("scanned",),
        elements={"frame": np.zeros(3, [("t", "f8")])},
    )
    save(scene, tmp_path / "line.ply")
    return tmp_path / "line.ply"


def test_the_facts_are_right_and_fit_json(path):
    facts = describe(path)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["gaussians"] == 101 and facts["sh_degree"] == 2
    assert facts["bytes"] == path.stat().st_size
    assert facts["box"] == {"low": [0, 0, -1], "high": [10, 0, 0]}
    assert facts["bounds"]["centre"] == pytest.approx([5, 0, -0.5], abs=0.2)
    assert facts["bounds"]["radius"] == pytest.approx(math.hypot(5, 0.5), rel=0.05)
    assert (facts["up"], facts["up_because"]) == ("+z", "the header says 'Vertical Axis: z'")
    for q in PERCENTILES:
        assert facts["opacity"][str(q)] == pytest.approx(0.1 + 0.8 * q / 100, abs=1e-5)
        assert facts["scale"][str(q)] == pytest.approx(1 + q / 100, abs=1e-5)
    assert facts["extra"] == {"label": "uint8"} and facts["elements"] == {"frame": 3}
    assert facts["comments"] == ["Vertical Axis: z"] and facts["obj_info"] == ["scanned"]
    assert facts["source_prompt"] is None


def test_the_text_says_it_all(path):
    (path.parent / "line.yaml").write_text("source_prompt: a line\nup: +x\n")
    text = format(describe(path))
    lines = dict(line.split(None, 1) for line in text.splitlines())
    assert lines["Gaussians"] == "101"
    assert lines["up"] == "+x (the sidecar says so)"
    assert lines["extra"] == "label uint8" and lines["element"] == "frame, 3 rows"
    assert lines["comment"] == "Vertical Axis: z" and lines["obj_info"] == "scanned" and lines["shows"] == "a line"
    assert "1 % 0.108, 25 % 0.3, 50 % 0.5" in lines["opacity"]
    assert str(path) in lines["file"]
    assert max(map(len, text.splitlines())) < 200


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        describe(tmp_path / "none.ply")
