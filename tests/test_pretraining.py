"""Pretraining by reconstruction and fine-tuning of its weights, in whole runs, against equations written out again."""

import contextlib
import hashlib
import json
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, TINY_2D, killed_after_saving, make_data, make_images, make_stacks, only_on_the_cpu
from test_recipe import ROOT, column, run, same, weights

import inference
from mtseg import report
from mtseg.distributed import Ranks
from mtseg.figures.reconstructions import reconstructions
from mtseg.finetuning import names_of
from mtseg.images import read_image
from mtseg.masking import genesis, hidden_blocks, visible_only
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet
from mtseg.optim import Updater
from mtseg.samplers import IterationSampler, ShuffledBatchSampler
from mtseg.script import flags, methods
from mtseg.script import run as run_module
from mtseg.script.data import held_out_patches
from mtseg.script.runfolder import ancestry_of
from mtseg.script.sources import Source
from mtseg.seeding import seed_iteration
from mtseg.transforms import Compose, RandomCrop, RandomRot90Flip, ToTensor

pretrain_masked = methods.load_script(ROOT / "recipes/pretrain_masked.py")
NETWORKS = {"vnet": VNet, "unet": UNet}
PRETEXTS = (["--pretext", "masked"], ["--sparse"], ["--pretext", "autoencoder"], ["--pretext", "genesis"])


@pytest.fixture(autouse=True)
def on_every_device(device):
    """The scripts take the GPU where they find one."""


def pretrain(data, out, *more, **changes):
    """Pretrain for a few iterations on make_data's or make_images's data; returns the run's folder."""
    two = not (data / "data").is_dir()
    given = {**(TINY_2D if two else TINY), "dataset_name": "LA", "mask_block": 8, "batch_size": 2, "max_iterations": 4}
    given |= {"root_path": data, "output_dir": out} | changes
    if {"autoencoder", "genesis"} & {*more, given.get("pretext")}:  # these hide no blocks
        del given["mask_block"]
    words = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
    return pretrain_masked.main([*words, *more])


def config(folder):
    return json.loads((folder / "config.json").read_text())


def refused(capsys, out, function, *arguments, **changes):
    """The sentence with which a run ends that was not to begin, and that has left nothing behind."""
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **changes)
    assert stopped.value.code == 2 and not out.exists()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def set_volumes(data, cases, change):
    """Do `change(file)` with the HDF5 files of these cases."""
    for case in cases:
        with h5py.File(data / "data" / case / "mri_norm2.h5", "r+") as file:
            change(file)


@pytest.fixture(params=["volumes", "images"])
def either(request, tmp_path):
    """A tiny data set of volumes, or one of images."""
    return (make_data if request.param == "volumes" else make_images)(tmp_path / "either")


# ----------------------------------------------------------------------------------------------- the method's equations


def patches(data, batches):
    """Batches of patches as the recipe takes them, put together without the scripts' data set and loader."""
    cases = (data / "train.list").read_text().split()
    two = (data / "images").is_dir()
    transform = Compose([RandomRot90Flip(), RandomCrop((16, 16) if two else (16, 16, 16)), ToTensor()])
    for batch in IterationSampler(ShuffledBatchSampler(range(len(cases)), 2, seed=1337), 1337, 0, batches):
        images = []
        for index, seed in batch:
            if two:
                image = read_image(data / f"images/{cases[index]}.png")[0].astype(np.float64)
            else:
                with h5py.File(data / "data" / cases[index] / "mri_norm2.h5") as file:
                    image = file["image"][:].astype(np.float64)
            image = ((image - image.mean()) / image.std()).astype(np.float32)
            sample = {"image": image, "label": np.zeros(image.shape, np.uint8), "rng": np.random.default_rng(seed)}
            images.append(transform(sample)["image"])
        yield torch.stack(images)


@only_on_the_cpu
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pretext", PRETEXTS, ids=lambda words: words[-1])
def test_pretraining_computes_its_equations(either, tmp_path, network, pretext):
    iterations, dims, kind = 3, 2 if (either / "images").is_dir() else 3, pretext[-1]
    settings = {"network": network, "normalization": "groupnorm", "max_iterations": iterations}
    folder = pretrain(either, tmp_path / "runs", *pretext, **settings)
    seed_iteration(1337, -1)
    net = NETWORKS[network](1, 1, 2, "groupnorm", has_dropout=True, dims=dims)
    tokens = [torch.nn.init.trunc_normal_(torch.empty(2 * 2**level, 1), std=0.02) for level in range(5)]
    tokens = [token.requires_grad_() for token in tokens] if kind == "--sparse" else []
    parameters, losses = [*net.parameters(), *tokens], []
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9, nesterov=True, weight_decay=3e-5)
    for t, x in enumerate(patches(either, iterations)):
        seed_iteration(1337, t + 1)
        m = torch.ones_like(x, dtype=torch.bool)
        if kind == "autoencoder":
            *skips, bottom = net.encode(x, turnoff_drop=True)
            f = net.classify(net.decode([*(0 * skip for skip in skips), bottom], turnoff_drop=True))
        elif kind == "genesis":
            f = net(genesis(x), turnoff_drop=True)
        else:
            m = hidden_blocks(2, x.shape[2:], 8, 0.75)
            f = net(x * ~m, turnoff_drop=True)
        if kind == "--sparse":
            with visible_only(net, ~m[(..., *[slice(None, None, 8)] * dims)]):
                features = net.encode(x * ~m, turnoff_drop=True)
            for level, token in enumerate(tokens[:4]):  # the fifth level is coarser than a block
                hidden = m[(..., *[slice(None, None, 2**level)] * dims)].to(x)
                features[level] = features[level] * (1 - hidden) + token.view(-1, *[1] * dims) * hidden
            f = net.classify(net.decode(features, turnoff_drop=True))
        loss = ((f - x)[m] ** 2).mean()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - t / iterations) ** 0.9
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 12)
        optimizer.step()
    assert column(folder, "loss") == pytest.approx(losses, rel=1e-4)
    for name, value in weights(folder, f"iter_{iterations}.pth").items():
        torch.testing.assert_close(value, net.state_dict()[name], rtol=1e-3, atol=1e-5)


@only_on_the_cpu
def test_at_the_end_statistics_are_those_of_images_of_which_nothing_is_hidden(either, tmp_path):
    folder = pretrain(either, tmp_path / "runs", network="vnet")
    state = weights(folder)
    net = VNet(1, 1, 2, "batchnorm", has_dropout=True, dims=2 if (either / "images").is_dir() else 3)
    net.load_state_dict(state)
    for name, value in state.items():
        if name.endswith("0.weight") and name != "out_conv.weight":  # PyTorch draws from +-sqrt(1 / fan_in)
            assert value.norm().item() == pytest.approx((len(value) / 3) ** 0.5, rel=0.3)
    images = [*patches(either, 50)]
    first = torch.stack([net.block_one.conv[0](image).transpose(0, 1).flatten(1) for image in images])
    torch.testing.assert_close(state["block_one.conv.1.running_mean"], first.mean((0, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["block_one.conv.1.running_var"], first.var(2).mean(0), rtol=1e-4, atol=1e-5)
    seed_iteration(1337, 5)
    torch.optim.swa_utils.update_bn(images, net)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------- what it learns from


@pytest.mark.parametrize("more", [[], ["--sparse"]])
def test_a_cut_off_pretraining_goes_on_to_the_same_bits(either, tmp_path, monkeypatch, more):
    (tmp_path / "val.list").write_text((either / "train.list").read_text().split()[-1])
    settings = {"val_list": tmp_path / "val.list", "val_freq": 1, "save_freq": 2, "network": "unet"}
    whole = pretrain(either, tmp_path / "whole", *more, **settings)
    with killed_after_saving(monkeypatch):
        pretrain(either, tmp_path / "cut", *more, **settings)
    resumed = pretrain(either, tmp_path / "cut", *more, "--resume", **settings)
    assert "resuming at iteration 2" in (resumed / "log.txt").read_text()
    assert same(weights(resumed), weights(whole))
    for name in ("loss", "held_out_loss"):
        assert column(resumed, name) == column(whole, name)


def test_labels_are_never_looked_at(data, tmp_path):
    (tmp_path / "val.list").write_text("case_5\n")
    first = pretrain(data, tmp_path / "first", val_list=tmp_path / "val.list")
    cases = (data / "train.list").read_text().split()
    set_volumes(data, cases[:3], lambda file: file["label"].write_direct(np.full(file["label"].shape, 7, np.uint8)))
    set_volumes(data, cases[3:], lambda file: file.pop("label"))
    second = pretrain(data, tmp_path / "second", val_list=tmp_path / "val.list")
    assert same(weights(first), weights(second))
    for name in ("loss", "held_out_loss"):
        assert column(first, name) == column(second, name)


def test_masks_are_never_looked_at(tmp_path):
    data = make_images(tmp_path / "images")
    first = pretrain(data, tmp_path / "first")
    for number, path in enumerate(sorted((data / "masks").iterdir())):
        path.write_text("no image") if number % 2 else path.unlink()
    second = pretrain(data, tmp_path / "second")
    assert same(weights(first), weights(second))
    assert config(second)["train_cases"] == [f"image_{number}" for number in range(6)]


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_without_lists_is_learned_from_but_for_its_test_cases(either, tmp_path, capsys, flat):
    cases = (either / "train.list").read_text().split()
    (either / "train.list").unlink()
    if flat and (either / "data").is_dir():  # the layout of BraTS
        for path in [*(either / "data").iterdir()]:
            (path / "mri_norm2.h5").rename(either / f"data/{path.name}.h5")
            path.rmdir()
    elif flat:  # a folder of images and nothing else
        for path in (either / "images").iterdir():
            path.rename(either / path.name)
        for name in ("images", "masks"):
            shutil.rmtree(either / name)
    folder = pretrain(either, tmp_path / "runs", max_iterations=1)
    assert config(folder)["train_cases"] == cases and "TRAINED ON" not in (folder / "log.txt").read_text()
    if (either / "data").is_dir():
        line = refused(capsys, tmp_path / "few", pretrain, either, tmp_path / "few", batch_size=7)
        assert "--batch_size 7 is more than the 6 cases" in line
    with open(either / "test.list", "a") as file:
        file.write("\n".join(cases))
    line = refused(capsys, tmp_path / "none", pretrain, either, tmp_path / "none")
    assert f"{either}: all its cases are in test.list" in line


def test_nnunets_test_images_are_not_learned_from(tmp_path):
    images, nnunet = make_images(tmp_path / "images"), tmp_path / "Dataset007_Steel"
    for number, path in enumerate(sorted((images / "images").glob("*.png"))):
        place = nnunet / ("imagesTr" if number < 6 else "imagesTs")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{path.stem}_0000.png")
    (nnunet / ".DS_Store").write_text("")
    folder = pretrain(nnunet, tmp_path / "runs", dims=2)
    assert config(folder)["train_cases"] == [f"image_{number}" for number in range(6)]


def test_a_training_list_that_is_all_held_out_ends_in_a_sentence(data, tmp_path, capsys):
    other = make_data(tmp_path / "other")
    for path in (other / "data").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    (other / "train.list").unlink(), (other / "test.list").unlink()
    more = {"unlabeled_root": other, "val_list": data / "train.list"}
    line = refused(capsys, tmp_path / "o", pretrain, data, tmp_path / "o", **more)
    assert "keeps all its cases out" in line


def test_a_folds_test_cases_are_kept_out_with_or_without_labels(data, tmp_path):
    cases = (data / "train.list").read_text().split()
    (data / "splits_final.json").write_text(json.dumps([{"train": cases[2:], "val": cases[:2]}]))
    set_volumes(data, cases, lambda file: file.pop("label"))
    folder = pretrain(data, tmp_path / "runs", fold=0)
    assert config(folder)["train_cases"] == cases[2:] and not config(folder)["unlabeled_cases"]


def test_test_cases_are_learned_from_where_a_list_says_so_and_all_descendants_are_marked(data, tmp_path):
    """Through two generations of fine-tuning; without that list, none is."""
    for listed in (False, True):
        if listed:
            (data / "unlabeled.list").write_text("case_6\n")
        out = tmp_path / f"listed_{listed}"
        first = pretrain(data, out)
        assert config(first)["unlabeled_cases"] == ["case_6"] * listed
        assert ("TRAINED ON" in (first / "log.txt").read_text()) == listed
        assert not {"case_6", "case_7"} & {*config(first)["train_cases"]}
        settings = {"max_iterations": 1, "exp": "second"}
        second = run("supervised", data, out, pretrained=first / "iter_4.pth", **settings)
        third = run("supervised", data, out, pretrained=second / "iter_1.pth", max_iterations=1, exp="third", seed=2)
        result = inference.main(["--model_path", str(third / "iter_1.pth"), "--gpu", "0"])
        assert result["trained_on"] == ["case_6"] * listed
        seen = [f"case_{number}" for number in range(6 + listed)]
        assert config(third)["pretrained_cases"] == config(second)["pretrained_cases"] == seen
        table, (row,) = report.report([third])
        assert row.trained_on == ({"case_6"} if listed else set())
        assert ("tested on 1 case that it was trained on" in report.to_text(table)) == listed


def test_the_held_out_loss_is_that_of_the_listed_cases_alone(data, tmp_path):
    """Of the same weights it is the same in every iteration, and another weight or case changes it."""
    (tmp_path / "val.list").write_text("case_4\n")
    settings = {"val_list": tmp_path / "val.list", "val_freq": 2, "base_lr": 0, "normalization": "groupnorm"}
    folder = pretrain(data, tmp_path / "first", **settings)
    first = column(folder, "held_out_loss")
    assert first[0] is first[2] is None and first[1] == first[3] and "case_4" not in config(folder)["train_cases"]
    net = VNet(1, 1, 2, "groupnorm", has_dropout=True)
    net.load_state_dict(weights(folder))
    with h5py.File(data / "data/case_4/mri_norm2.h5") as file:
        image = file["image"][:].astype(np.float64)
    image, samples = ((image - image.mean()) / image.std()).astype(np.float32), []
    for seed in (0, 1):
        sample = {"image": image, "label": np.zeros(image.shape, np.uint8), "rng": np.random.default_rng(seed)}
        samples.append(RandomCrop((16, 16, 16))(sample)["image"])
    x = torch.from_numpy(np.stack(samples)).view(2, 1, 16, 16, 16)
    torch.manual_seed(0)
    m = hidden_blocks(2, (16, 16, 16), 8, 0.75)
    with torch.no_grad():
        expected = (net.eval()(x * ~m) - x)[m].square().mean()
    assert first[1] == pytest.approx(expected.item(), rel=1e-4)

    def noise(file):
        file["image"][...] = np.random.default_rng(9).standard_normal(file["image"].shape)

    set_volumes(data, [f"case_{number}" for number in range(4)], noise)
    assert column(pretrain(data, tmp_path / "others", **settings), "held_out_loss") == first
    set_volumes(data, ["case_4"], noise)
    assert column(pretrain(data, tmp_path / "own", **settings), "held_out_loss")[1] != first[1]


def test_stacks_of_different_lengths_each_have_their_own_patches(tmp_path):
    data = make_stacks(tmp_path / "stacks", slices=2)  # of 2 and 3 slices
    folder = pretrain(data, tmp_path / "runs", max_iterations=1, dims=2, patch_size="16 16")
    args = flags.parse(pretrain_masked.PARSER, ["--config", str(folder / "config.json")])
    cases, source = sorted(config(folder)["train_cases"], key=lambda case: int(case[7:10]) % 2), Source(data)
    dataset = source.dataset(args, cases, labelnum=0)
    held_out = held_out_patches(args, source, dataset)
    assert len(held_out) == 2 * len(cases)
    for number, case in enumerate(cases):
        values = dataset.read(case)["image"]
        assert np.isin(held_out[2 * number : 2 * number + 2], values).all()
    cases = config(folder)["train_cases"][:3]
    shown = [axes.images[0].get_array() for axes in reconstructions(folder).axes if axes.images]
    middle = held_out_patches(args, source, source.dataset(args, cases, labelnum=0))[1::2, 0]
    assert len(shown) == 12 and all(map(np.array_equal, shown[::4], middle))


def test_a_pretrainings_settings_are_a_config_of_another_and_of_a_training(data, tmp_path, capsys):
    first = pretrain(data, tmp_path / "first", network="unet", mask_ratio=0.5)
    again = pretrain(data, tmp_path / "again", "--config", str(first / "config.json"))
    assert same(weights(first), weights(again))
    capsys.readouterr()
    folder = run("supervised", data, tmp_path / "runs", "--config", str(first / "config.json"), max_iterations=1)
    assert folder.parts[-2:] == ("LA_unet_3_labeled", "supervised") and config(folder)["network"] == "unet"
    assert "this script has no use for them: pretext" in capsys.readouterr().out.replace("mask_ratio, ", "")


def test_of_a_trainings_settings_pretraining_leaves_out_what_is_about_labels(data, tmp_path, capsys):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"class_weights": [1, 3], "foreground_patches": 0.5, "deep_supervision": False}))
    folder = pretrain(data, tmp_path / "first", "--config", str(settings))
    assert "no use for them: class_weights, foreground_patches\n" in capsys.readouterr().out
    assert config(folder)["class_weights"] is None and config(folder)["foreground_patches"] == 0
    line = refused(
        capsys, tmp_path / "none", pretrain, data, tmp_path / "none", "--config", str(settings), class_weights="1 3"
    )
    assert "--class_weights in pretraining" in line


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def first(data, tmp_path):
    """The weights of a pretraining on `data`."""
    return pretrain(data, tmp_path / "first") / "iter_4.pth"


@pytest.fixture
def any_weights(tmp_path):
    """A file with weights of the network of such a pretraining."""
    torch.save(VNet(1, 1, 2, "batchnorm").state_dict(), tmp_path / "any.pth")
    return tmp_path / "any.pth"


def parameters_of(state):
    return {name: value for name, value in state.items() if "running" not in name and "tracked" not in name}


def equal_names(state, other):
    return {name for name, value in parameters_of(state).items() if torch.equal(value, other[name])}


@pytest.mark.parametrize("parts", ["encoder", "all", "network"])
def test_the_asked_parts_are_loaded_and_the_rest_starts_as_without_them(data, tmp_path, parts):
    source = run("supervised", data, tmp_path / "source", seed=5)
    settings = {"base_lr": 0, "max_iterations": 1}
    folder = run(
        "supervised", data, tmp_path / "runs", pretrained=source / "iter_4.pth", pretrained_parts=parts, **settings
    )
    plain = run("supervised", data, tmp_path / "plain", **settings)
    state, names = weights(folder, "iter_1.pth"), names_of(VNet(1, 2, 2, "batchnorm"), parts)
    taken = {*names} & parameters_of(state).keys()
    assert equal_names(state, weights(source)) == taken
    assert equal_names(state, weights(plain, "iter_1.pth")) == parameters_of(state).keys() - taken
    assert f"{len(names)} weights of" in (folder / "log.txt").read_text()
    (entry,) = config(folder)["pretrained_from"]
    assert (entry["parts"], entry["loaded"], entry["left_out"]) == (parts, len(names), 0)


def test_from_scratch_is_a_run_without_the_weights_and_a_row_beside_it(data, tmp_path, first):
    settings = {"pretrained": first, "lr_schedule": "warmup", "max_iterations": 2}
    tuned = run("supervised", data, tmp_path / "runs", **settings)
    scratch = run("supervised", data, tmp_path / "runs", "--from_scratch", **settings)
    assert scratch != tuned and "from_scratch" in scratch.parent.name
    plain = run("supervised", data, tmp_path / "plain", lr_schedule="warmup", max_iterations=2)
    assert same(weights(scratch, "iter_2.pth"), weights(plain, "iter_2.pth"))
    assert not same(weights(tuned, "iter_2.pth"), weights(plain, "iter_2.pth"))
    assert "pretrained_from" in config(tuned) and "pretrained_from" not in config(scratch)
    for folder in (tuned, scratch):
        inference.main(["--model_path", str(folder / "iter_2.pth")])
    _, rows = report.report([tmp_path / "runs"])
    assert {row.method for row in rows} == {"supervised (pretrained)", "supervised (from scratch)"}


def test_an_encoder_of_rate_0_stays_while_the_decoder_learns(data, tmp_path, first):
    folder = run("supervised", data, tmp_path / "runs", pretrained=first, encoder_lr_factor=0)
    net = VNet(1, 2, 2, "batchnorm")
    encoder = {*names_of(net, "encoder")} & parameters_of(net.state_dict()).keys()
    assert equal_names({n: v for n, v in weights(folder).items() if n in encoder}, weights(first.parent)) == encoder
    assert not torch.equal(weights(folder)["block_six.conv.0.weight"], weights(first.parent)["block_six.conv.0.weight"])
    assert column(folder, "lr") == pytest.approx([0.01] * 4)
    decayed = run("supervised", data, tmp_path / "decayed", pretrained=first, layer_decay=0.5, max_iterations=1)
    whole = run("supervised", data, tmp_path / "whole", pretrained=first, max_iterations=1)
    start, (one, other) = weights(first.parent), (weights(folder, "iter_1.pth") for folder in (decayed, whole))
    for stage, name in enumerate(("block_one", "block_two", "block_three", "block_four", "block_five")):
        name = f"{name}.conv.0.weight"
        torch.testing.assert_close(
            one[name] - start[name], 0.5 ** (5 - stage) * (other[name] - start[name]), rtol=1e-2, atol=1e-7
        )


@pytest.mark.parametrize("model", ["supervised", "MT", "CPS"])
def test_frozen_parts_stay_until_they_are_let_go(data, tmp_path, first, model):
    settings = {"pretrained": first, "freeze": "encoder", "unfreeze_at": 2, "save_freq": 1, "keep_last": 9}
    folder = run(model, data, tmp_path / "runs", pretrained_parts="encoder", **settings)
    start, names = weights(first.parent), names_of(VNet(1, 2, 2, "batchnorm"), "encoder")
    for prefix in {"supervised": [""], "MT": ["", "ema_"], "CPS": ["", "second_"]}[model]:
        for iteration in range(1, 5):
            state = weights(folder, f"{prefix}iter_{iteration}.pth")
            stays = {
                name for name in names if torch.allclose(state[name].float(), start[name].float(), rtol=1e-6, atol=0)
            }
            if iteration < 3:
                assert stays == {*names}
            else:
                assert not any(name.endswith(("running_mean", "running_var", "tracked")) for name in stays)
                assert prefix or not any(name.endswith("weight") for name in stays)
            assert not torch.equal(state["block_six.conv.0.weight"], start["block_six.conv.0.weight"])


@pytest.mark.parametrize("model", ["supervised", "MT"])
@pytest.mark.parametrize("save_freq", [1, 2, 3])
def test_runs_go_on_to_the_same_bits_before_and_after_parts_are_let_go(
    data, tmp_path, monkeypatch, first, model, save_freq
):
    settings = {"pretrained": first, "freeze": "encoder", "unfreeze_at": 2, "save_freq": save_freq}
    whole = run(model, data, tmp_path / "whole", **settings)
    with killed_after_saving(monkeypatch):
        run(model, data, tmp_path / "cut", **settings)
    resumed = run(model, data, tmp_path / "cut", "--resume", **settings)
    assert same(weights(resumed), weights(whole))
    assert config(resumed)["pretrained_from"] == config(whole)["pretrained_from"]


@pytest.mark.parametrize("network", ["vnet", "unet"])
def test_a_sawtooth_moves_the_decoder_first(data, tmp_path, monkeypatch, network):
    first = pretrain(data, tmp_path / "first", network=network) / "iter_4.pth"
    settings = {"pretrained": first, "lr_schedule": "sawtooth", "max_iterations": 6, "save_freq": 1, "keep_last": 9}
    folder = run("supervised", data, tmp_path / "runs", network=network, **settings)
    start, names = weights(first.parent), names_of(NETWORKS[network](1, 2, 2, "batchnorm"), "encoder")
    for iteration in range(1, 7):
        state = weights(folder, f"iter_{iteration}.pth")
        assert all(torch.equal(state[name], start[name]) for name in names) == (iteration < 3)
    rates = [0.001, 0.001, 0.001, 0.001, 0.001 * (2 / 3) ** 0.9, 0.001 * (1 / 3) ** 0.9]
    assert column(folder, "lr") == pytest.approx(rates)
    assert (config(folder)["freeze"], config(folder)["unfreeze_at"]) == ("encoder", 2)
    for words, frozen in (["--max_iterations", "60"], ("encoder", 3)), (["--lr_schedule", "warmup"], (None, None)):
        again = [*words, "--config", str(folder / "config.json")]
        args = flags.parse(methods.parser_of(ROOT / "train_sup.py"), again)
        assert (args.freeze, args.unfreeze_at) == frozen
    with killed_after_saving(monkeypatch):
        run("supervised", data, tmp_path / "cut", network=network, **settings | {"save_freq": 2})
    resumed = run("supervised", data, tmp_path / "cut", "--resume", network=network, **settings | {"save_freq": 2})
    assert same(weights(resumed, "iter_6.pth"), weights(folder, "iter_6.pth"))


# ------------------------------------------------------------------------------------------------------------- ancestry


def test_the_chain_of_ancestors_stands_in_every_config(data, tmp_path, first):
    net = VNet(1, 2, 2, "batchnorm")
    second = run("MT", data, tmp_path / "second", pretrained=first, max_iterations=1)
    last = {"pretrained": second / "ema_iter_1.pth", "pretrained_parts": "encoder", "max_iterations": 1}
    third = run("CPS", data, tmp_path / "third", **last)  # whose two networks begin with the same file
    entry, *others = config(third)["pretrained_from"]
    assert others == config(second)["pretrained_from"] and len(others) == 1
    for one, file, parts in ((entry, second / "ema_iter_1.pth", "encoder"), (others[0], first, "all")):
        assert one["file"] == str(file) and one["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (one["parts"], one["loaded"], one["left_out"]) == (parts, len(names_of(net, parts)), 0)
        assert one["selection"] == "last iteration" and one["dataset_name"] == "LA"
    assert [one["model"] for one in (entry, *others)] == ["MT", "masked"]
    again = pretrain(data, tmp_path / "again", seed=2, save_freq=1)  # only another seed
    more = pretrain(data, tmp_path / "more", mask_ratio=0.5)
    told = [ancestry_of(run / "iter_4.pth", config(run))["pretrained_from"][0] for run in (first.parent, again, more)]
    assert told[0]["settings"] == told[1]["settings"] == others[0]["settings"] != told[2]["settings"]
    assert told[0]["sha256"] != told[1]["sha256"] and len({one["settings"] for one in (*told, entry)}) == 3
    assert config(third)["pretrained_cases"] == sorted({*config(third)["pretrained_cases"]})


def test_what_was_selected_on_the_test_set_descends(data, tmp_path, monkeypatch):
    (tmp_path / "val.list").write_text("case_6\n")
    source = run("supervised", data, tmp_path / "first", val_list=tmp_path / "val.list", max_iterations=1)
    settings = {"teacher_checkpoint": source / "iter_1.pth", "save_freq": 2}
    with killed_after_saving(monkeypatch):
        run("MT", data, tmp_path / "second", **settings)
    second = run("MT", data, tmp_path / "second", "--resume", **settings)
    third = run("supervised", data, tmp_path / "third", pretrained=second / "iter_4.pth", max_iterations=1)
    assert config(second)["selection"] == config(third)["selection"] == "test set"
    result = inference.main(["--model_path", str(third / "iter_1.pth")])
    assert result["selection"] == "test set"


def test_whatever_lies_beside_a_strangers_weights_is_no_ancestor(data, tmp_path, first):
    (tmp_path / "theirs").mkdir()
    shutil.copy(first, tmp_path / "theirs/weights.pth")
    strange = {"pretrained_from": 5, "train_cases": [["x"], 3, "y"], "unlabeled_cases": "z", "pretrained_cases": {}}
    for number, more in enumerate((strange, strange | {"pretrained_from": [1, {"a": "b"}, "c"]})):
        (tmp_path / "theirs/config.json").write_text(json.dumps(more))
        folder = run(
            "supervised",
            data,
            tmp_path / f"runs_{number}",
            pretrained=tmp_path / "theirs/weights.pth",
            max_iterations=1,
        )
        assert config(folder)["pretrained_cases"] == ["y"]
        assert config(folder)["pretrained_from"][1:] == [{"a": "b"}] * number


def test_other_intensities_than_those_of_the_pretraining_are_said(data, tmp_path, first):
    for intensity, said in (("zscore", False), ("none", True)):
        folder = run("supervised", data, tmp_path / intensity, pretrained=first, intensity=intensity, max_iterations=1)
        assert (
            "was trained with --intensity zscore, and this run has none" in (folder / "log.txt").read_text()
        ) == said


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ([], {"mask_block": 32}, ["--mask_block 32", "--patch_size 16 16 16", "such as 16"]),
        ([], {"mask_block": 6}, ["--mask_block 6", "does not divide", "such as 16"]),
        ([], {"mask_ratio": 0}, ["--mask_ratio 0.0", "none or all of the 8 blocks"]),
        ([], {"mask_ratio": 1}, ["--mask_ratio 1.0", "none or all of the 8 blocks"]),
        ([], {"mask_ratio": 1.5}, ["--mask_ratio", "between 0 and 1"]),
        ([], {"batch_size": 7}, ["--batch_size 7", "6 cases"]),
        ([], {"labelnum": 3}, ["--labelnum 3", "no label is looked at"]),
        (["--sparse"], {"pretext": "genesis"}, ["--sparse", "--pretext genesis"]),
        (["--sparse"], {"pretext": "autoencoder"}, ["--sparse", "--pretext autoencoder"]),
        ([], {"pretext": "genesis", "mask_ratio": 0.5}, ["--mask_ratio", "--pretext masked"]),
        (["--mask_block", "8"], {"pretext": "autoencoder"}, ["--mask_block", "--pretext masked"]),
        (["--sparse", "--gradient_checkpointing"], {}, ["--sparse", "--gradient_checkpointing"]),
        (["--deep_supervision"], {"network": "unet"}, ["--deep_supervision", "pretraining"]),
        (["--ignore_padding"], {}, ["--ignore_padding", "pretraining"]),
        ([], {"foreground_patches": 0.5}, ["--foreground_patches", "pretraining"]),
        ([], {"val_list": "train.list", "patience": 2}, ["--patience", "pretraining"]),
        ([], {"val_list": "train.list", "lr_schedule": "plateau"}, ["--lr_schedule plateau", "pretraining"]),
    ],
)
def test_wrong_flags_of_pretraining_end_in_a_sentence(data, tmp_path, capsys, words, changes, said):
    if "val_list" in changes:
        changes = changes | {"val_list": data / "train.list"}
    line = refused(capsys, tmp_path / "runs", pretrain, data, tmp_path / "runs", *words, **changes)
    assert all(word in line for word in said), line


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ([], {"network": "unet"}, ["only 0 of the encoder's 60 weights fit", "encoder.0.conv1.weight: not there"]),
        (
            [],
            {"n_filters": 4},
            ["only 0 of the encoder's 96 weights fit", "(2, 1, 3, 3, 3) there, (4, 1, 3, 3, 3)", "--n_filters"],
        ),
        ([], {"freeze": "network"}, ["--freeze 'network'", "every weight"]),
        ([], {"freeze": "conv"}, ["--freeze 'conv'", "fits no weight", "block_one.conv.0.weight"]),
        ([], {"freeze": "block("}, ["--freeze 'block('", "no regular expression"]),
        ([], {"freeze": "stem", "unfreeze_at": 4}, ["--unfreeze_at 4", "--max_iterations 4"]),
        ([], {"freeze": "stem", "lr_schedule": "sawtooth"}, ["--freeze stem", "sawtooth", "take one"]),
        ([], {"warmup_iterations": 1, "lr_schedule": "warmup"}, ["--warmup_iterations", "--lr_schedule warmup"]),
        ([], {"warmup_iterations": 1, "lr_schedule": "sawtooth"}, ["--warmup_iterations", "--lr_schedule sawtooth"]),
        ([], {"unfreeze_at": 2}, ["--unfreeze_at", "--freeze"]),
        ([], {"layer_decay": 0}, ["--layer_decay", "not above 0"]),
        ([], {"pretrained_parts": "decoder"}, ["--pretrained_parts", "invalid choice"]),
        (["--from_scratch"], {"pretrained": None}, ["--from_scratch", "--pretrained"]),
        (["--from_scratch"], {"freeze": "encoder"}, ["--freeze encoder with --from_scratch"]),
        ([], {"pretrained": None, "freeze": "encoder"}, ["--freeze encoder", "without --pretrained"]),
        ([], {"pretrained": None, "lr_schedule": "sawtooth"}, ["--lr_schedule sawtooth", "without --pretrained"]),
        ([], {"pretrained": None, "pretrained_parts": "all"}, ["--pretrained_parts", "--pretrained"]),
    ],
)
def test_wrong_flags_of_fine_tuning_end_in_a_sentence(data, tmp_path, capsys, any_weights, words, changes, said):
    changes = {name: value for name, value in ({"pretrained": any_weights} | changes).items() if value is not None}
    line = refused(capsys, tmp_path / "runs", run, "supervised", data, tmp_path / "runs", *words, **changes)
    assert all(word in line for word in said), line


def test_weights_of_half_an_encoder_are_refused_with_counts_and_names(data, tmp_path, capsys, any_weights):
    state = torch.load(any_weights, weights_only=True)
    torch.save({name: value for name, value in state.items() if not name.startswith("block_f")}, tmp_path / "half.pth")
    settings = {"pretrained": tmp_path / "half.pth", "max_iterations": 1}
    line = refused(capsys, tmp_path / "runs", run, "supervised", data, tmp_path / "runs", **settings)
    assert re.search(r"half\.pth: only 54 of the encoder's 96 weights fit \(block_four\S+: not there; block_four", line)


def test_frozen_parts_are_not_let_go_over_several_processes(data, tmp_path, capsys, monkeypatch, any_weights):
    @contextlib.contextmanager
    def two():
        yield Ranks(0, 2, 0)

    monkeypatch.setattr(run_module, "joined_ranks", two)
    settings = {"pretrained": any_weights, "freeze": "encoder", "unfreeze_at": 2}
    line = refused(capsys, tmp_path / "runs", run, "supervised", data, tmp_path / "runs", **settings)
    assert "--unfreeze_at with torchrun" in line


@pytest.mark.parametrize("schedule", ["warmup", "sawtooth"])
def test_schedules_of_fine_tuning_do_not_begin_late(data, tmp_path, capsys, any_weights, schedule):
    settings = {
        "pretrained": any_weights,
        "lr_schedule": schedule,
        "normalization": "batchnorm",
        "batch_size": 8,
        "labeled_bs": 4,
    }
    settings |= {"labelnum": 4, "pretrained_parts": "all"}
    data = make_data(data.parent / "more", train=8)
    line = refused(capsys, tmp_path / "runs", run, "BCP", data, tmp_path / "runs", **settings)
    assert f"--lr_schedule {schedule} would begin after 1 iterations" in line


def test_a_pretrainings_weights_give_no_segmentation(data, tmp_path, capsys, first):
    """They are no result either: nothing lies beside them that a report could find."""
    line = refused(capsys, tmp_path / "runs", inference.main, ["--model_path", str(first)])
    assert f"{first}: is of a pretraining" in line and "--pretrained" in line
    assert "--pretrained" in (first.parent / "log.txt").read_text().splitlines()[-1]
    with pytest.raises(SystemExit) as stopped:
        pretrain(data, tmp_path / "first", "--test_only")
    assert stopped.value.code == 2


def test_images_of_other_channels_are_refused_before_anything_is_written(tmp_path, capsys):
    data, other = make_data(tmp_path / "one"), make_data(tmp_path / "four", channels=4)
    shutil.copytree(other / "data/case_5", data / "data/four")
    (tmp_path / "val.list").write_text("four\n")
    line = refused(capsys, tmp_path / "runs", pretrain, data, tmp_path / "runs", val_list=tmp_path / "val.list")
    assert "--val_list" in line and "channels" in line


def test_a_killed_step_leaves_the_last_state(data, tmp_path, monkeypatch):
    """Cut off amid the last step: what was saved before it goes on to the same bits, statistics and all."""
    whole, step, steps = pretrain(data, tmp_path / "whole", save_freq=1), Updater.step, []

    def cut_off(updater, loss):
        steps.append(loss)
        if len(steps) == 4:
            raise KeyboardInterrupt
        step(updater, loss)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Updater, "step", cut_off)
        pretrain(data, tmp_path / "cut", save_freq=1)
    assert same(weights(pretrain(data, tmp_path / "cut", "--resume", save_freq=1)), weights(whole))


def test_sets_of_different_classes_are_learned_from_together(tmp_path, capsys):
    """No class counts there; whoever trains with labels on such an index is told that they differ."""
    two = {"classes": [{"name": "dark", "value": 0}, {"name": "bright", "value": 1}, {"name": "grey", "value": 2}]}
    make_images(tmp_path / "one"), make_images(tmp_path / "two", classes=two)
    index_images = methods.load_script(ROOT / "data/index_images.py")
    index_images.main([*map(str, (tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both/index.json"))])
    folder = pretrain(tmp_path / "both/index.json", tmp_path / "runs", dims=2)
    assert {case.split("__")[0] for case in config(folder)["train_cases"]} == {"one", "two"}
    line = refused(capsys, tmp_path / "o", run, "supervised", tmp_path / "both/index.json", tmp_path / "o", dims=2)
    assert "classes of set two are dark, bright, grey" in line


def test_a_run_does_not_go_on_with_other_weights_than_it_began_with(data, tmp_path, capsys):
    one, other = (run("supervised", data, tmp_path / str(seed), seed=seed) / "iter_4.pth" for seed in (1, 2))
    folder = run("supervised", data, tmp_path / "runs", pretrained=one, max_iterations=2)
    shutil.copy(one, tmp_path / "moved.pth")
    run("supervised", data, tmp_path / "runs", "--resume", pretrained=tmp_path / "moved.pth", max_iterations=3)
    with pytest.raises(SystemExit) as stopped:
        run("supervised", data, tmp_path / "runs", "--resume", pretrained=other)
    assert stopped.value.code == 2 and f"did not begin with {other}" in capsys.readouterr().err
    assert config(folder)["pretrained_from"][0]["file"] == str(one)
