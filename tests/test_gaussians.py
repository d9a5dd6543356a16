import numpy as np
import pytest
import torch

from splatedit.gaussians import PARAMETERS, SH_REST, Gaussians


def scene(n=5, degree=3, seed=0, **fields):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(n, 3), (n, 4), (n, 3), (n,), (n, 1, 3), (n, SH_REST[degree], 3)]
    return Gaussians(*(torch.randn(shape, generator=draw) for shape in shapes), **fields)


@pytest.mark.parametrize("degree", SH_REST)
def test_the_degree_follows_from_the_coefficients(degree):
    gaussians = scene(degree=degree)
    assert gaussians.sh_degree == degree
    assert gaussians.sh.shape == (5, (degree + 1) ** 2, 3)
    assert gaussians.n == 5


def test_sh_is_the_constant_term_first_and_differentiable():
    gaussians = scene()
    gaussians.sh0.requires_grad_()
    torch.testing.assert_close(gaussians.sh[:, 0], gaussians.sh0[:, 0])
    torch.testing.assert_close(gaussians.sh[:, 1:], gaussians.shN)
    gaussians.sh.sum().backward()
    assert gaussians.sh0.grad is not None and bool((gaussians.sh0.grad == 1).all())


def test_parameters_are_the_six_tensors_themselves():
    gaussians = scene()
    assert tuple(gaussians.parameters) == PARAMETERS
    assert all(value is getattr(gaussians, name) for name, value in gaussians.parameters.items())


def test_detach_copies_so_that_an_optimiser_cannot_move_the_source():
    gaussians = scene()
    gaussians.means.requires_grad_()
    kept = gaussians.detach()
    with torch.no_grad():
        gaussians.means.add_(1.0)
    assert not kept.means.requires_grad
    torch.testing.assert_close(kept.means, gaussians.means.detach() - 1.0)


@pytest.mark.parametrize(
    "index",
    [
        [4, 0, 0],
        torch.tensor([4, 0, 0]),
        np.array([4, 0, 0]),
        slice(1, None, 2),
        slice(None, None, -1),
        [],
        [True, False, False, True, True],
        torch.tensor([True, False, False, True, True]),
    ],
    ids=["list", "tensor", "array", "slice", "reversed", "none", "bools", "mask"],
)
def test_select_takes_the_same_rows_of_everything(index):
    gaussians = scene(extra={"id": np.arange(5, dtype=np.uint8)}, comments=("made here",))
    if isinstance(index, slice):
        expected = list(range(5))[index]
    else:
        expected = np.arange(5)[np.asarray(index, dtype=None if len(index) else int)].tolist()
    chosen = gaussians.select(index)
    assert chosen.extra["id"].tolist() == expected
    assert chosen.extra["id"].dtype == np.uint8
    assert chosen.comments == ("made here",)
    for name, value in chosen.parameters.items():
        assert torch.equal(value, gaussians.parameters[name][expected])


def test_select_lets_gradients_through():
    gaussians = scene()
    gaussians.means.requires_grad_()
    gaussians.select([1, 1, 3]).means.sum().backward()
    assert gaussians.means.grad is not None
    assert gaussians.means.grad[:, 0].tolist() == [0, 2, 0, 1, 0]


def test_select_refuses_a_mask_of_another_scene():
    with pytest.raises(IndexError, match=r"\(3,\).*5 Gaussians"):
        scene().select([True, False, True])


def test_to_moves_all_six_tensors():
    moved = scene(extra={"id": np.arange(5)}).to("meta")
    assert {value.device.type for value in moved.parameters.values()} == {"meta"}
    assert moved.n == 5 and "id" in moved.extra


def test_what_can_be_drawn(cloud):
    broken = cloud.detach()
    broken.means[1, 2], broken.opacities[2], broken.sh0[3, 0, 0] = float("nan"), float("inf"), float("nan")
    broken.scales[4], broken.scales[5] = 80.0, 100.0  # e^100 is no float32
    assert cloud.drawable().all()
    assert (~broken.drawable()).nonzero()[:, 0].tolist() == [1, 2, 3, 5]
