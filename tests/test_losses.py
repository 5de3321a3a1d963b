import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import FAMILY, wave_input
from scipy import special

from mtseg import losses

A, B = wave_input((2, 3, 5, 4, 6), 0.37), 2 * wave_input((2, 3, 5, 4, 6), 0.59)
TARGET = wave_input((2, 5, 4, 6), 0.91) > 0


def test_the_familys_values():
    expected = FAMILY["losses"]
    assert losses.softmax_mse_loss(A, B).item() == pytest.approx(expected["softmax_mse_loss(a, b)"], rel=1e-4)
    assert losses.softmax_kl_loss(A, B).item() == pytest.approx(expected["softmax_kl_loss(a, b)"], rel=1e-4)
    value = losses.dice_loss(torch.softmax(A, 1)[:, 1], TARGET).item()
    assert value == pytest.approx(expected["dice_loss(softmax(a, 1)[:, 1], t)"], rel=1e-4)


def test_kl_is_scipys_relative_entropy():
    terms = special.rel_entr(special.softmax(B.numpy(), axis=1), special.softmax(A.numpy(), axis=1))
    np.testing.assert_allclose(losses.softmax_kl_loss(A, B, reduction="none").numpy(), terms, atol=1e-6)
    assert losses.softmax_kl_loss(A, B, reduction="sum").item() == pytest.approx(terms.sum(), rel=1e-5)


def test_mse_reductions():
    terms = (special.softmax(A.numpy(), axis=1) - special.softmax(B.numpy(), axis=1)) ** 2
    np.testing.assert_allclose(losses.softmax_mse_loss(A, B, reduction="none").numpy(), terms, atol=1e-6)
    assert losses.softmax_mse_loss(A, B, reduction="sum").item() == pytest.approx(terms.sum(), rel=1e-5)


@pytest.mark.parametrize("loss", [losses.softmax_mse_loss, losses.softmax_kl_loss])
def test_gradients_flow_to_the_first_argument_only(loss):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad is None


def test_soft_dice_target_gets_no_gradient():
    score, target = torch.rand(4, 4, requires_grad=True), torch.rand(4, 4, requires_grad=True)
    losses.dice_loss(score, target).backward()
    assert score.grad is not None
    assert target.grad is None


def test_dice_loss_by_hand():
    score, target = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 1, 0])
    assert losses.dice_loss(score, target).item() == pytest.approx(1 - (2 * 1.5 + 1e-5) / (1.25 + 2 + 1e-5))
    assert losses.dice_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(0)


def test_multiclass_dice_is_the_mean_over_classes():
    labels = torch.randint(0, 3, (2, 5, 4, 6), generator=torch.Generator().manual_seed(0))
    probabilities = torch.softmax(A, dim=1)
    each = [losses.dice_loss(probabilities[:, c], labels == c).item() for c in range(3)]
    assert losses.multiclass_dice_loss(A, labels).item() == pytest.approx(sum(each[1:]) / 2)
    assert losses.multiclass_dice_loss(A, labels, include_background=True).item() == pytest.approx(sum(each) / 3)
    half = 0.5 * (F.cross_entropy(A, labels).item() + sum(each[1:]) / 2)
    assert losses.dice_ce_loss(A, labels).item() == pytest.approx(half)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="against"):
        losses.softmax_mse_loss(A, B[:1])
