import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import on, only_on_the_cpu
from reference import FAMILY, wave_input
from scipy import special

from mtseg import losses

A, B = wave_input((2, 3, 5, 4, 6), 0.37), 2 * wave_input((2, 3, 5, 4, 6), 0.59)
TARGET = wave_input((2, 5, 4, 6), 0.91) > 0
LABELS = torch.randint(0, 3, (2, 5, 4, 6), generator=torch.Generator().manual_seed(0))
IGNORED = LABELS.masked_fill(TARGET, 255)
CONSISTENCY = ("softmax_mse_loss", "softmax_kl_loss", "softmax_ce_loss")


@pytest.fixture(autouse=True)
def on_every_device(device, monkeypatch):
    for name, function in inspect.getmembers(losses, inspect.isfunction):
        if function.__module__ == losses.__name__ and not name.startswith("_"):
            monkeypatch.setattr(losses, name, on(device, function))
    monkeypatch.setattr(losses.SupervisedLoss, "forward", on(device, losses.SupervisedLoss.forward))


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


@pytest.mark.parametrize("name", CONSISTENCY)
def test_gradients_flow_to_the_first_argument_only(name):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    getattr(losses, name)(a, b).backward()
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
    labels = LABELS
    probabilities = torch.softmax(A, dim=1)
    each = [losses.dice_loss(probabilities[:, c], labels == c).item() for c in range(3)]
    assert losses.multiclass_dice_loss(A, labels).item() == pytest.approx(sum(each[1:]) / 2)
    assert losses.multiclass_dice_loss(A, labels, include_background=True).item() == pytest.approx(sum(each) / 3)
    half = 0.5 * (F.cross_entropy(A, labels).item() + sum(each[1:]) / 2)
    assert losses.dice_ce_loss(A, labels).item() == pytest.approx(half)


@pytest.mark.parametrize("loss", [losses.multiclass_dice_loss, losses.linear_dice_loss, losses.tversky_loss])
def test_labels_with_an_axis_for_channels_are_refused(loss):
    """As MONAI gives them: spread over the batch they made losses below 0."""
    logits, labels = torch.randn(3, 2, 4, 4), torch.ones(3, 1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="the target is"):
        loss(logits, labels)
    with pytest.raises(ValueError, match="one shape"):
        losses.dice_loss(logits.softmax(1)[:, 1:], labels[:, 0] == 1)


def test_logits_of_one_class_are_refused():
    """As networks with a sigmoid give them: their softmax is 1 everywhere, and the losses were constants."""
    one, label = A[:, :1], torch.zeros_like(LABELS)
    for loss in (losses.cross_entropy_loss, losses.focal_loss, losses.multiclass_dice_loss, losses.tversky_loss):
        for how in ({}, {"include_background": True}) if "dice" in loss.__name__ else ({},):
            with pytest.raises(ValueError, match="logits of one class"):
                loss(one, label, **how)
    for name in CONSISTENCY:
        with pytest.raises(ValueError, match="logits of one class"):
            getattr(losses, name)(one, one)
    with pytest.raises(ValueError, match="logits of one class"):
        losses.confidence_mask(one, 0.9)


@only_on_the_cpu  # a label out of range ends the process on a GPU
def test_no_label_is_left_out_without_being_named():
    """PyTorch leaves -100 out."""
    for loss in (losses.cross_entropy_loss, losses.focal_loss):
        with pytest.raises(IndexError, match="Target -100 is out of bounds"):
            loss(A, LABELS.masked_fill(TARGET, -100))
        assert torch.equal(
            loss(A, LABELS.masked_fill(TARGET, -100), ignore_index=-100), loss(A, IGNORED, ignore_index=255)
        )


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="against"):
        losses.softmax_mse_loss(A, B[:1])


def of_recipe(outputs, label):
    """The supervised loss as the recipes have always computed it, with every step written out."""

    def dice_loss(score, target):
        target = target.to(score.dtype)
        return 1 - (2 * (score * target).sum() + 1e-5) / ((score * score).sum() + (target * target).sum() + 1e-5)

    soft, foreground = F.softmax(outputs, dim=1), range(1, outputs.shape[1])
    return 0.5 * (
        F.cross_entropy(outputs, label) + sum(dice_loss(soft[:, c], label == c) for c in foreground) / len(foreground)
    )


@only_on_the_cpu
@pytest.mark.parametrize("shape", [(2, 2, 24, 24, 16), (2, 4, 9, 10, 11), (3, 3, 17, 19)])
def test_the_default_is_the_recipes_loss_bit_for_bit(shape):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(shape, generator=generator)
        label = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
        ours, theirs, both = (logits.clone().requires_grad_() for _ in range(3))
        loss, parts = losses.SupervisedLoss()(ours, label)
        expected = of_recipe(theirs, label)
        loss.backward(), expected.backward(), losses.dice_ce_loss(both, label).backward()
        assert torch.equal(loss, expected)
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(both.grad, theirs.grad)
        assert torch.equal(parts["loss_ce"], F.cross_entropy(logits, label))
        assert list(parts) == ["loss_ce", "loss_dice"]


def test_cross_entropy_is_pytorchs():
    weights = torch.tensor([0.2, 1.0, 3.0])
    for given in ({}, {"ignore_index": 255}):
        labels = IGNORED if given else LABELS
        expected = F.cross_entropy(A, labels, **given).item()
        assert losses.cross_entropy_loss(A, labels, **given).item() == pytest.approx(expected, rel=1e-6)
        expected = F.cross_entropy(A, labels, weight=weights, **given).item()
        assert losses.cross_entropy_loss(A, labels, class_weights=weights, **given).item() == pytest.approx(expected)
        focal = losses.focal_loss(A, labels, gamma=0, class_weights=weights.tolist(), **given).item()
        assert focal == pytest.approx(expected)


def test_focal_and_tversky_by_their_formulas():
    p = special.softmax(A.numpy().astype(np.float64), axis=1)
    t = np.moveaxis(np.eye(3)[LABELS.numpy()], -1, 1)
    of_class = (p * t).sum(1)
    expected = ((1 - of_class) ** 2 * -np.log(of_class)).mean()
    assert losses.focal_loss(A, LABELS).item() == pytest.approx(expected, rel=1e-5)

    def index(c):
        tp, fp, fn = (p * t)[:, c].sum(), (p * (1 - t))[:, c].sum(), ((1 - p) * t)[:, c].sum()
        return (tp + 1e-5) / (tp + 0.2 * fp + 0.6 * fn + 1e-5)

    expected = 1 - (index(1) + index(2)) / 2
    assert losses.tversky_loss(A, LABELS, alpha=0.2, beta=0.6).item() == pytest.approx(expected, rel=1e-5)


def test_focal_and_tversky_are_monais():
    monai = pytest.importorskip("monai.losses")
    one_hot = LABELS.unsqueeze(1)
    focal = monai.FocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True)(A, one_hot)
    # MONAI's mean runs over classes too, of which all but the voxel's own give 0.
    assert losses.focal_loss(A, LABELS).item() == pytest.approx(3 * focal.item(), rel=1e-5)
    settings = {"softmax": True, "to_onehot_y": True, "include_background": False, "batch": True}
    tversky = monai.TverskyLoss(alpha=0.3, beta=0.7, **settings)(A, one_hot)
    assert losses.tversky_loss(A, LABELS).item() == pytest.approx(tversky.item(), rel=1e-4)
    dice = monai.DiceLoss(squared_pred=True, **settings)(A, one_hot)
    assert losses.multiclass_dice_loss(A, LABELS).item() == pytest.approx(dice.item(), rel=1e-4)
    linear = monai.DiceLoss(**settings)(A, one_hot)
    assert losses.linear_dice_loss(A, LABELS).item() == pytest.approx(linear.item(), rel=1e-4)


def test_focal_keeps_the_gradient_through_its_weight():
    """For d = 1[k = c] - p_k and p of class c: dL/dz_k = (g (1 - p)^(g - 1) p log p - (1 - p)^g) d, over the voxels."""
    logits = A.double().requires_grad_()
    losses.focal_loss(logits, LABELS, gamma=2.0).backward()
    probabilities = special.softmax(A.double().numpy(), axis=1)
    hot = np.moveaxis(np.eye(3)[LABELS.numpy()], -1, 1)
    p = (probabilities * hot).sum(axis=1, keepdims=True)
    expected = (2 * (1 - p) * p * np.log(p) - (1 - p) ** 2) * (hot - probabilities) / LABELS.numel()
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", losses.TERMS)
def test_ignored_voxels_are_as_if_cut_out(name):
    whole, cut = A.clone().requires_grad_(), A.clone().requires_grad_()
    loss, _ = losses.SupervisedLoss(name, ignore_index=255)(whole, IGNORED)
    loss.backward()
    rest, _ = losses.SupervisedLoss(name)(cut.movedim(1, -1)[~TARGET].T[None], LABELS[~TARGET][None])
    rest.backward()
    assert loss.item() == pytest.approx(rest.item(), rel=1e-5)
    torch.testing.assert_close(whole.grad, cut.grad, atol=1e-8, rtol=1e-4)
    assert whole.grad.movedim(1, -1)[TARGET].abs().max() == 0


@pytest.mark.parametrize("name", losses.TERMS)
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_labels_are_integers_of_any_type(name, ignore_index):
    supervised = losses.SupervisedLoss(name, ignore_index=ignore_index)
    labels = LABELS if ignore_index is None else IGNORED
    assert torch.equal(supervised(A, labels.to(torch.uint8))[0], supervised(A, labels)[0])


@pytest.mark.parametrize("name", losses.TERMS)
def test_gradients_are_those_of_finite_differences(name):
    logits = A[:, :, :2, :2, :2].double().requires_grad_()
    supervised = losses.SupervisedLoss(name, class_weights=[0.5, 1, 2], ignore_index=255)
    assert torch.autograd.gradcheck(lambda x: supervised(x, IGNORED[:, :2, :2, :2])[0], logits)


def test_deep_supervision_compares_each_output_in_its_resolution():
    label = torch.randint(0, 3, (2, 12, 8, 16), generator=torch.Generator().manual_seed(1))
    outputs = [wave_input((2, 3, 12 // k, 8 // k, 16 // k), 0.3).requires_grad_() for k in (1, 2, 4)]
    halves = [
        label,
        *(F.interpolate(label[:, None].float(), scale_factor=1 / k, mode="nearest-exact")[:, 0].long() for k in (2, 4)),
    ]
    each = [of_recipe(output, half).item() for output, half in zip(outputs, halves, strict=True)]
    loss, parts = losses.SupervisedLoss()(outputs, label)
    assert loss.item() == pytest.approx((4 * each[0] + 2 * each[1] + each[2]) / 7, rel=1e-6)
    assert loss.item() == pytest.approx(0.5 * (parts["loss_ce"] + parts["loss_dice"]).item(), rel=1e-6)
    assert not parts["loss_ce"].requires_grad
    loss, _ = losses.SupervisedLoss(deep_supervision_weights=(3, 0, 1))(outputs, label)
    assert loss.item() == pytest.approx((3 * each[0] + each[2]) / 4, rel=1e-6)
    alone, _ = losses.SupervisedLoss()(outputs[:1], label)
    assert torch.equal(alone, losses.SupervisedLoss()(outputs[0], label)[0])


def test_nearest_labels_of_odd_sizes():
    label = torch.arange(2 * 11 * 7).view(2, 11, 7)
    for size in ((4, 3), (5, 7), (1, 2)):
        expected = F.interpolate(label[:, None].double(), size=size, mode="nearest-exact")[:, 0].long()
        assert torch.equal(losses.nearest_labels(label, size), expected)


def test_parse_loss():
    assert losses.parse_loss("ce:0.5, dice:0.5") == {"ce": 0.5, "dice": 0.5}
    assert losses.parse_loss("tversky") == {"tversky": 1.0}
    loss, parts = losses.SupervisedLoss("dice:1.0,focal:0.25,tversky:0")(A, LABELS)
    expected = losses.multiclass_dice_loss(A, LABELS) + 0.25 * losses.focal_loss(A, LABELS)
    assert loss.item() == pytest.approx(expected.item())
    assert parts["loss_tversky"].item() == pytest.approx(losses.tversky_loss(A, LABELS).item())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dise:1", "unknown term 'dise' .* ce, dice, focal, tversky, linear_dice"),
        ("", "unknown term ''"),
        ("ce:1,ce:2", "ce twice"),
        ("ce:-1", "'-1' of ce"),
        ("ce:much", "'much' of ce"),
        ("ce:inf", "'inf' of ce"),
        ("ce:", "'' of ce"),
        ("ce:0,dice:0", "all weights"),
    ],
)
def test_a_loss_that_cannot_be_read_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        losses.parse_loss(text)


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="2 class weights for 3 classes"):
        losses.SupervisedLoss(class_weights=[1, 2])(A, LABELS)
    with pytest.raises(ValueError, match=r"class weights \[1.0, -2.0"):
        losses.SupervisedLoss(class_weights=[1.0, -2.0, 1.0])
    with pytest.raises(ValueError, match="2 deep supervision weights for 1 outputs"):
        losses.SupervisedLoss(deep_supervision_weights=[1, 1])(A, LABELS)
    with pytest.raises(ValueError, match="against labels of"):
        losses.SupervisedLoss()(A, LABELS[:, None])
    with pytest.raises(ValueError, match="gamma"):
        losses.focal_loss(A, LABELS, gamma=-1)


CASES = {
    "empty": torch.zeros_like(LABELS),
    "full": torch.ones_like(LABELS),
    "one class missing": LABELS.clamp(max=1),
    "all ignored": torch.full_like(LABELS, 255),
    "some ignored": IGNORED,
}
SCALES = {
    "usual": A,
    "right by 1e4": None,
    "wrong by 1e4": None,
    "waves of 1e4": 1e4 * A.sign(),
    "all alike": 0 * A + 1e4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", CASES)
def test_supervised_losses_stay_finite(case, scale, dtype):
    target = CASES[case]
    right = 1e4 * (2 * F.one_hot(target % 5 % 3, 3).movedim(-1, 1).float() - 1)
    logits = {"right by 1e4": right, "wrong by 1e4": -right}.get(scale, SCALES[scale]).to(dtype)
    terms = [losses.SupervisedLoss(name, ignore_index=255) for name in losses.TERMS]
    terms += [losses.SupervisedLoss(name, [0, 1, 1], 255) for name in ("ce", "focal")]
    terms += [lambda x, y: (losses.focal_loss(x, y, gamma=0.5, ignore_index=255), None)]
    for term in terms:
        x = logits.clone().requires_grad_()
        loss, _ = term(x, target)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
        assert x.grad.dtype == dtype
        assert loss.dtype == torch.float32
        assert torch.equal(loss, term(logits.float(), target)[0])
        if case == "all ignored":
            assert loss == 0
            assert x.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency_losses_stay_finite(name, dtype):
    loss = getattr(losses, name)
    for a, b in ((A, B), (1e4 * A.sign(), 1e4 * B.sign()), (1e4 * A.sign(), -1e4 * A.sign()), (0 * A, 1e4 * B.sign())):
        x, target = a.clone().to(dtype).requires_grad_(), b.to(dtype)
        for mask in (None, torch.zeros_like(TARGET), torch.ones_like(TARGET), TARGET):
            x.grad = None
            value = loss(x, target) if mask is None else losses.masked_mean(loss(x, target, reduction="none"), mask)
            value.backward()
            assert value.isfinite()
            assert x.grad.isfinite().all()
            assert value.dtype == torch.float32


def test_half_precision_sums_do_not_overflow():
    # 2 x 48^3 voxels of probability 1: their sum is above float16's 65504.
    logits = torch.full((2, 2, 48, 48, 48), -8.0, dtype=torch.float16)
    logits[:, 1] = 8
    full = torch.ones(2, 48, 48, 48, dtype=torch.long)
    assert losses.multiclass_dice_loss(logits, full).item() == pytest.approx(0, abs=1e-4)
    assert losses.dice_loss(torch.softmax(logits, 1)[:, 1], full == 1).item() == pytest.approx(0, abs=1e-4)
    assert losses.tversky_loss(logits, full).item() == pytest.approx(0, abs=1e-4)
    difference = losses.softmax_mse_loss(logits, -logits, reduction="none").half()
    assert losses.masked_mean(difference, full == 1).item() == pytest.approx(1, rel=1e-3)


def test_soft_cross_entropy_is_kl_and_the_targets_entropy():
    p, q = special.softmax(B.numpy(), axis=1), special.log_softmax(A.numpy(), axis=1)
    np.testing.assert_allclose(losses.softmax_ce_loss(A, B, reduction="none").numpy(), -p * q, rtol=1e-4, atol=1e-6)
    difference = losses.softmax_ce_loss(A, B) - losses.softmax_kl_loss(A, B)
    assert difference.item() == pytest.approx(special.entr(p).mean(), rel=1e-5)
    soft = F.cross_entropy(A, torch.softmax(B, 1))
    assert losses.softmax_ce_loss(A, B).item() == pytest.approx(soft.item() / 3, rel=1e-5)
    a, b = A.clone().requires_grad_(), A.clone().requires_grad_()
    losses.softmax_ce_loss(a, B).backward(), losses.softmax_kl_loss(b, B).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_masked_mean():
    terms = losses.softmax_mse_loss(A, B, reduction="none")
    for mask in (TARGET, TARGET[:, None]):
        expected = terms.movedim(1, -1)[TARGET].mean().item()
        assert losses.masked_mean(terms, mask).item() == pytest.approx(expected, rel=1e-5)
    everywhere = losses.masked_mean(terms, torch.ones_like(TARGET)).item()
    assert everywhere == pytest.approx(losses.softmax_mse_loss(A, B).item(), rel=1e-6)
    x = A.clone().requires_grad_()
    nothing = losses.masked_mean(losses.softmax_mse_loss(x, B, reduction="none"), torch.zeros_like(TARGET))
    nothing.backward()
    assert nothing == 0
    assert x.grad.abs().max() == 0
    for wrong in (TARGET.float(), TARGET[:, :2], TARGET[:1], TARGET[:, None].expand(2, 3, -1, -1, -1)):
        with pytest.raises(ValueError, match="give a bool mask"):
            losses.masked_mean(terms, wrong)


def test_confidence_mask():
    target = B.clone().requires_grad_()
    mask = losses.confidence_mask(target, 0.7)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.from_numpy(special.softmax(B.numpy(), axis=1).max(axis=1) >= 0.7))
    assert 0 < mask.sum() < mask.numel()
    assert losses.confidence_mask(torch.zeros(1, 2, 3), 0.5).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        losses.confidence_mask(B, 80)


def test_cross_entropy_on_a_gpu_adds_up_in_a_fixed_order(monkeypatch):
    """F.cross_entropy's own mean on a GPU has no deterministic implementation (torch.use_deterministic_algorithms)."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    reductions, cross_entropy = [], F.cross_entropy

    def watched(*given, reduction="mean", **more):
        reductions.append(reduction)
        return cross_entropy(*given, reduction=reduction, **more)

    monkeypatch.setattr(F, "cross_entropy", watched)
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 32, 32, 16), torch.randint(3, (2, 32, 32, 16))
    found = [losses.cross_entropy_loss(logits.as_subclass(OnGpu), labels).as_subclass(torch.Tensor) for _ in range(3)]
    assert set(reductions) == {"none"} and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], cross_entropy(logits, labels))
