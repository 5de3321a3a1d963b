"""What a network says of regions, against the network itself on whole cases and means by hand; and every strategy."""

import copy
import itertools
import types

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PHASES, TINY, TINY_2D, make_data, make_images, make_stacks, write_case
from scipy import ndimage

import train_mean_teacher
import train_sup
from mtseg import averaging, uncertainty
from mtseg.active.candidates import WHOLE, Cases, Network, Pool, region_size
from mtseg.active.strategies import STRATEGIES, choose, find_strategy
from mtseg.datasets import DataError
from mtseg.query import QueryError, Windows
from mtseg.script.checks import FlagError
from mtseg.volumes import VolumeError

MAKE = {"volumes": make_data, "stacks": make_stacks, "images": make_images, "slices": make_data}
ALONG = {"stacks": 0, "slices": 2}  # of what a network of images sees slice by slice
UNITS = [("volumes", "slice", None), ("volumes", "patch", [10, 8, 6]), ("volumes", "case", None)]
UNITS += [
    ("stacks", "slice", None),
    ("stacks", "patch", [2, 9, 9]),
    ("images", "patch", [9, 8]),
    ("images", "case", None),
    ("slices", "slice", None),
]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def train(script, root, out, kind, *more, **changes):
    """A run of a network whose bottom is a quarter as fine as the image, in windows larger than the cases."""
    given = (
        TINY | {"patch_size": "32 32 16", "network": "unet"} if kind == "volumes" else TINY_2D | {"patch_size": "32 32"}
    )
    given |= {
        "network": "unet",
        "strides": "2 2",
        "root_path": root,
        "output_dir": out,
        "labelnum": 3,
        "normalization": "groupnorm",
    }
    given |= {"max_iterations": 30, "base_lr": 0.1} | changes
    return script.main([*(word for k, v in given.items() for word in (f"--{k}", *str(v).split())), *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: (data, run)}: a Mean Teacher on each kind of data."""
    out = {}
    for kind, make in MAKE.items():
        root = make(tmp_path_factory.mktemp(kind) / "data")
        changes = {} if kind == "volumes" else {"optimizer": "adam", "base_lr": 0.02, "loss": "dice:1"}
        folder = train(train_mean_teacher, root, root.parent, kind, "--has_dropout", batch_size=4, **changes)
        out[kind] = root, folder / "iter_30.pth"
    return out


@pytest.fixture(scope="module")
def known(made):
    """{kind: (Cases, Network)}."""
    return {kind: (cases := Cases(root), Network(cases, [path])) for kind, (root, path) in made.items()}


def pool_of(known, kind, unit, region=None, annotated=(), network=True, **how):
    cases, net = known[kind]
    return Pool(cases, unit, region, None, [*annotated], net if network else None, **how)


def padded(image, size):
    missing = [(max(n - s, 0) // 2, max(n - s, 0) - max(n - s, 0) // 2) for n, s in zip(size, image.shape, strict=True)]
    return np.pad(image, missing), tuple(slice(a, a + s) for (a, _), s in zip(missing, image.shape, strict=True))


def direct(net, image, kind):
    """The softmax of the network on the whole case at once, or on each whole slice, zeros around it."""
    parts, found = np.moveaxis(image, ALONG[kind], 0) if kind in ALONG else [image], []
    for part in parts:
        part, inside = padded(part, (32, 32, 16) if kind == "volumes" else (32, 32))
        with torch.inference_mode():
            scores = F.softmax(net(torch.from_numpy(np.float32(part))[None, None]), dim=1)[0].numpy()
        found.append(scores[(slice(None), *inside)])
    return np.stack(found, axis=1 + ALONG[kind]) if kind in ALONG else found[0]


def boxes(pool, case):
    here = pool.windows.case == case
    return np.flatnonzero(here), [
        tuple(map(slice, *corners)) for corners in zip(pool.windows.start[here], pool.windows.stop[here], strict=True)
    ]


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("kind", "unit", "region"), UNITS)
def test_scores_are_those_of_the_network_on_the_whole_case(known, kind, unit, region):
    pool = pool_of(known, kind, unit, region)
    cases, network = known[kind]
    assert len(pool.windows.case) and set(pool.windows.case.tolist()) == set(range(6))
    for case in (0, 5):
        p = direct(network.trained.nets[0], cases.image(case), kind).astype(float)
        entropy = -(p * np.log(p)).sum(axis=0)
        ordered = np.sort(p, axis=0)
        expected = {"entropy": entropy, "least_confidence": 1 - ordered[-1], "margin": 1 - ordered[-1] + ordered[-2]}
        for name, values in expected.items():
            places, regions = boxes(pool, case)
            assert pool.scores(name)[places] == pytest.approx([values[box].mean() for box in regions], abs=2e-6)
        by_class = pool.class_scores()
        for number in range(1, len(p)):
            means = [(entropy * p[number])[box].mean() for box in regions]
            assert by_class[number - 1][places] == pytest.approx(means, abs=2e-6)
        background = np.array([(entropy * p[0])[box].mean() for box in regions])
        assert by_class[:, places].sum(axis=0) + background == pytest.approx(pool.scores("entropy")[places], abs=2e-6)


@pytest.mark.parametrize("of", ["top", "boundary", "foreground"])
@pytest.mark.parametrize(("kind", "unit", "region"), [UNITS[0], UNITS[4], UNITS[6]])
def test_scores_of_a_part_of_a_region(known, kind, unit, region, of):
    pool = pool_of(known, kind, unit, region, of=of)
    cases, network = known[kind]
    differ = 0
    for case in range(3):
        p = averaging.mean_score(lambda net, image: direct(net, image, kind), network.trained.nets, cases.image(case))
        labels, values = p.argmax(axis=0), -(p * np.log(p)).sum(axis=0, dtype=float)
        border = np.zeros(labels.shape, bool)
        for voxel in np.ndindex(*labels.shape):
            for axis, step in itertools.product(range(labels.ndim), (-1, 1)):
                other = np.array(voxel)
                other[axis] += step
                if 0 <= other[axis] < labels.shape[axis]:
                    border[voxel] |= labels[tuple(other)] != labels[voxel]
        near = ndimage.distance_transform_cdt(~border, metric="taxicab") <= 3 if border.any() else border
        where = {"top": None, "boundary": near, "foreground": labels != 0}[of]
        places, regions = boxes(pool, case)
        for score, box in zip(pool.scores("entropy")[places], regions, strict=True):
            if of == "top":
                largest = np.sort(values[box].ravel())[::-1][: max(values[box].size // 20, 1)]
                expected = largest.mean()
            else:
                expected = values[box][where[box]].mean() if where[box].any() else values[box].mean()
                differ += where[box].any() and not where[box].all()
            assert score == pytest.approx(expected, abs=5e-6)
    assert differ or of == "top"


# ------------------------------------------------------------------------------------------------------------- members


def as_is(net, image, network):
    from mtseg.script.windows import predict

    return predict(net, image, network.cases.axis, network.args)


@pytest.mark.parametrize(("kind", "count"), [("volumes", 4), ("stacks", 4), ("images", 4), ("slices", 4)])
def test_flips_are_those_of_test_time_augmentation(made, known, kind, count):
    cases, plain = known[kind]
    network = Network(cases, [made[kind][1]], "flips")
    members = [*network.members(1)]
    assert len(members) == count and not np.array_equal(members[0], members[1])
    assert np.array_equal(members[0], next(iter(plain.members(1))))
    through = {"volumes": -1, "stacks": -3, "slices": -1, "images": -3}[kind]
    axes = [axis for axis in (-3, -2, -1) if axis != through]
    mean = averaging.mean_score(
        lambda net, image: as_is(net, image, network), network.trained.nets, cases.image(1), averaging.all_flips(axes)
    )
    assert np.allclose(uncertainty.mean_map(members), mean, atol=1e-6)


def test_the_teacher_and_several_networks(made, known):
    cases, plain = known["images"]
    path = made["images"][1]
    student, teacher = Network(cases, [path], "teacher").members(2)
    assert np.array_equal(student, next(iter(plain.members(2)))) and not np.allclose(student, teacher, atol=1e-3)
    several = [*Network(cases, [path, path.with_name("ema_iter_30.pth")]).members(2)]
    assert len(several) == 2 and np.array_equal(several[0], student) and np.array_equal(several[1], teacher)
    pool = Pool(cases, "case", None, None, [], Network(cases, [path], "teacher"))
    p, q = (each.astype(float) for each in (student, teacher))

    def entropy(scores):
        return -(scores * np.log(scores)).sum(axis=0)

    expected = (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean()
    assert pool.scores("bald")[2] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert pool.scores("variance")[2] == pytest.approx(((p - q) ** 2 / 4).sum(axis=0).mean(), rel=1e-3, abs=1e-6)


def test_dropout_draws_the_same_masks_for_every_case(made):
    cases = Cases(made["images"][0])
    network = Network(cases, [made["images"][1]], "dropout", samples=3)
    members = [*network.members(3)]
    assert len(members) == 3 and not np.array_equal(members[0], members[1])
    [*network.members(0)]
    assert all(map(np.array_equal, members, network.members(3)))
    assert not any(module.training for module in network.trained.nets[0].modules())


def test_files_with_the_slices_first(made, tmp_path):
    """What the network says of volumes (S, H, W), and of the same ones with the slices last."""
    roots = [made["volumes"][0], make_data(tmp_path / "first", train=2, test=1)]
    for case in ("case_0", "case_1"):
        with h5py.File(roots[0] / f"data/{case}/mri_norm2.h5") as file:
            write_case(roots[1], case, *(np.moveaxis(file[name][...], -1, 0) for name in ("image", "label")))
    first = train(train_sup, roots[1], tmp_path, "volumes", "--slices_first", labelnum=2, max_iterations=2)
    torch.save(torch.load(made["volumes"][1], weights_only=True), first / "iter_2.pth")
    cases = [Cases(root) for root in roots]
    networks = [Network(cases[0], [made["volumes"][1]]), Network(cases[1], [first / "iter_2.pth"])]
    (last,), (turned,) = (network.members(1) for network in networks)
    assert turned.shape[1:] == cases[1].sides[1] == (14, 24, 20)
    assert np.allclose(np.moveaxis(last, -1, 1), turned, atol=1e-6)
    start, stop = np.array([[1, 2, 3], [0, 0, 0]]), np.array([[9, 14, 10], [24, 20, 14]])
    there = networks[0].features(1, start, stop)
    assert np.allclose(there, networks[1].features(1, start[:, [2, 0, 1]], stop[:, [2, 0, 1]]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ features


def spread(net, part, size):
    """The bottleneck of the padded `part`, each cell in all of its voxels."""
    part, inside = padded(part, size)
    with torch.inference_mode():
        cells = net.encode(torch.from_numpy(np.float32(part))[None, None])[-1]
        wide = F.interpolate(cells.double(), scale_factor=4, mode="nearest")[0].numpy()
    assert cells.shape[2:] == tuple(side // 4 for side in size)
    return wide[(slice(None), *inside)]


@pytest.mark.parametrize("kind", MAKE)
def test_features_are_means_of_the_bottleneck(known, kind):
    """Of small cases, which are padded; a voxel has what its cell has."""
    cases, network = known[kind]
    rng = np.random.default_rng(0)
    net, image = network.trained.nets[0], cases.image(2)
    size = (32, 32, 16) if kind == "volumes" else (32, 32)
    if kind in ALONG:
        parts = [spread(net, part, size) for part in np.moveaxis(image, ALONG[kind], 0)]
        wide = np.stack(parts, axis=1 + ALONG[kind])
    else:
        wide = spread(net, image, size)
    starts = np.array([rng.integers(0, side, 12) for side in image.shape]).T
    stops = np.array([rng.integers(start + 1, np.array(image.shape) + 1) for start in starts])
    found = network.features(2, starts, stops)
    for row, *corners in zip(found, starts, stops, strict=True):
        assert row == pytest.approx(wide[(slice(None), *map(slice, *corners))].reshape(len(wide), -1).mean(1), abs=1e-6)


def test_features_of_cases_larger_than_the_patch(tmp_path):
    """Patches side by side, the last moved back: what two of them cover counts twice."""
    root = make_images(tmp_path / "data", shape=(40, 36))
    path = train(train_sup, root, tmp_path, "images", patch_size="16 16", max_iterations=2) / "iter_2.pth"
    cases = Cases(root)
    network, image = Network(cases, [path]), cases.image(0)
    total, count = 0, np.zeros(image.shape)
    for y, x in itertools.product((0, 16, 24), (0, 16, 20)):
        wide = np.zeros((8, *image.shape))
        wide[:, y : y + 16, x : x + 16] = spread(network.trained.nets[0], image[y : y + 16, x : x + 16], (16, 16))
        count[y : y + 16, x : x + 16] += 1
        total = total + wide
    starts, stops = np.array([[0, 0], [3, 17], [30, 2]]), np.array([[40, 36], [27, 30], [31, 3]])
    for row, *corners in zip(network.features(0, starts, stops), starts, stops, strict=True):
        box = tuple(map(slice, *corners))
        assert row == pytest.approx(total[(slice(None), *box)].sum((1, 2)) / count[box].sum(), abs=1e-6)


def test_features_of_slices_that_are_resized(tmp_path):
    """Stacks (S, 22, 25), each slice in 32 x 40 pixels, so that every side of a cell is a multiple of 1/4 pixel."""
    root = make_stacks(tmp_path / "data", train=4)
    sides = ["--resize", "32", "40"]
    path = train(train_sup, root, tmp_path, "stacks", *sides, patch_size="32 40", max_iterations=2)
    cases = Cases(root)
    network, image = Network(cases, [path / "iter_2.pth"]), cases.image(1)
    from mtseg.transforms import resize_nearest

    wide = np.stack([spread(network.trained.nets[0], resize_nearest(part, (32, 40)), (32, 40)) for part in image], 1)
    starts, stops = np.array([[0, 0, 0], [1, 4, 3], [2, 21, 24]]), np.array([[4, 22, 25], [3, 15, 16], [3, 22, 25]])
    # 400 parts a side: x of 22 and of 25 pixels is where x * 32 / 22 and x * 40 / 25 is of the resized slice.
    rows, columns = ((np.arange(400) + 0.5) * n / 400 for n in (32, 40))
    fine = wide[:, :, rows.astype(int)][:, :, :, columns.astype(int)]
    y, x = (np.arange(400) + 0.5) * 22 / 400, (np.arange(400) + 0.5) * 25 / 400
    for row, a, b in zip(network.features(1, starts, stops), starts, stops, strict=True):
        part = fine[:, a[0] : b[0]][:, :, (y > a[1]) & (y < b[1])][:, :, :, (x > a[2]) & (x < b[2])]
        assert row == pytest.approx(part.mean((1, 2, 3)), abs=0.02 * np.abs(fine).max())


def test_features_without_a_network_are_means_of_blocks(known):
    pool = pool_of(known, "volumes", "patch", [16, 8, 12], network=False)
    found, image = pool.features(), known["volumes"][0].image(4)
    places, regions = boxes(pool, 4)
    for place, box in zip(places, regions, strict=True):
        blocks = image[box].reshape(8, 2, 8, 1, 12).mean((1, 3))
        # Twelve voxels in eight blocks: each begins at floor(i 12 / 8) and ends at ceil((i + 1) 12 / 8).
        blocks = np.stack([blocks[..., i * 12 // 8 : -(-(i + 1) * 12 // 8)].mean(-1) for i in range(8)], -1)
        assert found[place] == pytest.approx(blocks.ravel(), abs=1e-6)
    many = pool_of(known, "stacks", "case", network=False).features()  # of three slices or of four
    assert many.shape == (6, 3 * 8 * 8) and np.isfinite(many).all()


# ---------------------------------------------------------------------------------------------------------- strategies


def annotated_part(pool):
    """Some regions of the first three cases that are annotated already, as rounds name them."""
    places = [np.flatnonzero(pool.windows.case == case)[0] for case in range(3)]
    return [
        (pool.cases.names[pool.windows.case[p]], pool.windows.start[p].tolist(), pool.windows.stop[p].tolist())
        for p in places
    ]


@pytest.fixture(scope="module")
def pools(made, known):
    """A pool of each kind and unit, some of it annotated, by student and teacher."""
    found = {}
    for kind, unit, region in UNITS:
        cases = known[kind][0]
        network = Network(cases, [made[kind][1]], "teacher")
        before = annotated_part(Pool(cases, unit, region, None, []))
        found[kind, unit] = Pool(cases, unit, region, None, before, network)
    return found


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("kind", "unit", "_"), UNITS)
def test_every_strategy_chooses_what_is_free_and_the_same_for_a_seed(pools, kind, unit, _, name):
    pool, n = pools[kind, unit], 3 if unit == "case" else 5
    before = pool.annotated
    chosen = [choose(pool, STRATEGIES[name], n, np.random.default_rng(seed)) for seed in (0, 0)]
    assert all(np.array_equal(a, b) for a, b in zip(*chosen, strict=True)) and pool.annotated is before
    assert len(chosen[0].case) == n
    taken = [np.zeros(sides, int) for sides in pool.cases.sides]
    for case, start, stop in (*zip(*before, strict=True), *zip(*chosen[0], strict=True)):
        assert (start >= 0).all() and (stop <= pool.cases.sides[case]).all()
        assert (stop - start == np.minimum(pool.size, pool.cases.sides[case])).all()
        taken[case][tuple(map(slice, start, stop))] += 1
    assert max(each.max() for each in taken) == 1


@pytest.mark.parametrize("per_case", [1, 2])
@pytest.mark.parametrize("name", [*STRATEGIES, "own"])
def test_no_more_of_a_case_than_was_asked_for(pools, name, per_case):
    """Slices of six stacks, three of them annotated in part: all are full in the end, and one more is a sentence."""
    pool, rng = copy.copy(pools["stacks", "slice"]), np.random.default_rng(1)
    pool.per_case, before, n = per_case, pool.annotated, 6 * per_case
    strategy = STRATEGIES.get(name, lambda pool, n, rng: range(len(pool.windows.case)))
    found = choose(pool, strategy, n, rng)
    assert np.bincount(found.case).tolist() == 6 * [per_case] and pool.annotated is before
    message = f"^--budget {n + 1}, --per_case {per_case}: only {n} regions are left to choose; ask for so many$"
    with pytest.raises(QueryError, match=message):
        choose(pool, strategy, n + 1, rng)


@pytest.mark.parametrize("name", [*STRATEGIES, "own"])
def test_a_round_spreads_over_the_cases(pools, name):
    """Without a limit of one's own: as few slices of a stack as the budget allows, and more where others have none."""
    pool, free = copy.copy(pools["stacks", "slice"]), np.bincount(pools["stacks", "slice"].windows.case)
    for case in pool.annotated.case:  # a slice each
        free[case] -= 1
    strategy = STRATEGIES.get(name, lambda pool, n, rng: range(len(pool.windows.case)))
    for n, most in ((6, 1), (7, 2), (12, 2), (free.sum() - 1, free.max()), (free.sum(), free.max())):
        found = choose(pool, strategy, n, np.random.default_rng(1))
        assert len(found.case) == n and np.bincount(found.case).max() == most and pool.per_case is None
    with pytest.raises(QueryError, match=rf"^--budget {n + 1}: only {n} regions are left to choose; ask for so many$"):
        choose(pool, strategy, n + 1, np.random.default_rng(1))
    pool.per_case = 0  # any number
    if name == "own":
        assert np.bincount(choose(pool, strategy, 2, None).case).tolist() == [2]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_budget_above_what_is_left(pools, name):
    """All that is left is given, and one more is a sentence."""
    pool = pools["images", "case"]
    assert len(choose(pool, STRATEGIES[name], 3, np.random.default_rng(1)).case) == 3
    with pytest.raises(QueryError, match=r"^--budget 4: only 3 regions are left to choose; ask for so many$"):
        choose(pool, STRATEGIES[name], 4, np.random.default_rng(1))


def test_foreground_is_where_an_oracle_sees_it(known, tmp_path):
    cases = known["volumes"][0]
    label = np.zeros((24, 20, 14), np.uint8)
    label[20, 3, 11] = 1
    pool = Pool(cases, "patch", [3, 3, 3], None, [], truth=lambda number: label)
    found = choose(pool, find_strategy("foreground66"), 6, np.random.default_rng(3))
    around = (found.start == [19, 2, 10]).all(axis=1)
    assert around.sum() >= 2  # in some case by its class, in others by chance
    assert cases.no_class == (0, 255)
    nowhere = Cases(make_images(tmp_path / "data", classes=PHASES | {"background": None}))
    assert nowhere.no_class == (255,)  # every class is looked for, and what nobody labelled is none


OWN = """
import numpy as np
from mtseg.query import Windows

def last(pool, n, rng):
    "The last ones."
    return np.arange(len(pool.windows.case))[::-1]

def windows(pool, n, rng):
    return Windows(np.zeros(n, int), np.array([[k, 0] for k in range(n)]), np.array([[k + 1, 2] for k in range(n)]))

def first(pool, n, rng):
    return range(n)

def nothing(pool, n, rng):
    return []

def mask(pool, n, rng):
    return np.arange(len(pool.windows.case)) < n

def none(pool, n, rng):
    pass

def outside(pool, n, rng):
    return [len(pool.windows.case)]

def beyond(pool, n, rng):
    return Windows(np.array([0]), np.array([[20, 0]]), np.array([[28, 4]]))

number = 3
"""


def test_a_strategy_of_ones_own(tmp_path, pools):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    pool, rng = pools["images", "patch"], np.random.default_rng(0)
    found = choose(pool, find_strategy(f"{path}:last"), 4, rng)
    last = [np.array(part[-1]) for part in pool.windows]
    assert all(np.array_equal(a[0], b) for a, b in zip(found, last, strict=True)) and len(found.case) == 4
    free = Pool(pool.cases, "case", None, None, [])
    found = choose(free, find_strategy(f"{path}:windows"), 3, rng)
    assert isinstance(found, Windows) and found.start.tolist() == [[0, 0], [1, 0], [2, 0]]
    for name, count in ("nothing", 0), ("first", 1):  # candidates 0 and 1 overlap
        with pytest.raises(QueryError, match=f"^--budget 2: the strategy gives only {count} without overlap; ask for"):
            choose(Pool(pool.cases, "patch", pool.size, None, []), find_strategy(f"{path}:{name}"), 2, rng)
    with pytest.raises(QueryError, match="candidates have the indices 0 to"):
        choose(pool, find_strategy(f"{path}:outside"), 2, rng)
    for name, what in ("mask", "a bool array"), ("none", "an? object array"):
        with pytest.raises(QueryError, match=f"a strategy gives whole numbers, .*, not {what} of shape .*; mend it"):
            choose(pool, find_strategy(f"{path}:{name}"), 2, rng)
    with pytest.raises(QueryError, match="the strategy chose a region that does not lie in its case; mend it"):
        choose(free, find_strategy(f"{path}:beyond"), 1, rng)
    for word, error, sentence in (
        ("ranking", QueryError, "^there is no strategy ranking; there are clasp_pe, random, "),
        (f"{path}:number", QueryError, f"^--strategy {path}:number: {path} has no function of this name; mend it$"),
        (f"{path}:absent", QueryError, "has no function of this name"),
        (f"{tmp_path}/none.py:f", FlagError, f"--strategy {tmp_path}/none.py:f: there is no file {tmp_path}/none.py"),
    ):
        with pytest.raises(error, match=sentence):
            find_strategy(word)


# ------------------------------------------------------------------------------------------------ cases, and mistakes


def test_which_cases_are_asked_for(made, tmp_path):
    (tmp_path / "val.list").write_text("image_3\nimage_6\n")
    assert Cases(made["images"][0], tmp_path / "val.list").names == [f"image_{n}" for n in (0, 1, 2, 4, 5)]
    root = make_images(tmp_path / "data")
    (root / "train.list").unlink()
    for number in (1, 2, 7):  # the last is of test.list
        (root / f"masks/image_{number}.png").unlink()
    assert Cases(root).names == ["image_1", "image_2"]
    volumes = make_data(tmp_path / "volumes", train=2)
    (volumes / "train.list").unlink()
    with pytest.raises(DataError, match=r"train.list: no such list"):
        Cases(volumes)


def test_regions_that_there_are_not(known):
    def sides(kind, unit, region=None):
        return region_size(known[kind][0], unit, region)

    assert sides("volumes", "slice") == (WHOLE, WHOLE, 1) and sides("stacks", "slice") == (1, WHOLE, WHOLE)
    for wrong, sentence in (
        (("images", "slice"), "--unit slice: the cases are images, which have no slices; take case or patch"),
        (("images", "patch"), "--unit patch with cases of 2 axes: give --region and 2 sides in voxels"),
        (("volumes", "patch", [4, 4]), "--unit patch with cases of 3 axes: give --region and 3 sides"),
        (("volumes", "slice", [4, 4, 1]), "--unit slice with --region, which is about patches"),
    ):
        with pytest.raises(QueryError, match=sentence):
            sides(*wrong)


def test_what_cannot_be_told(known, made):
    for name, ask in (("unsure", lambda pool: pool.scores("entropy")), ("foreground", lambda pool: pool.labels_of(0))):
        with pytest.raises(QueryError, match=f"there is no network yet to .*{name}.*: take random or typiclust"):
            ask(pool_of(known, "images", "case", network=False))
    with pytest.raises(QueryError, match="one network has no bald: give --members teacher, flips or dropout"):
        pool_of(known, "images", "case").scores("bald")
    with pytest.raises(VolumeError, match="has 2 channels, the network takes 1; name others"):
        cases = types.SimpleNamespace(**vars(known["images"][0]))
        cases.source = types.SimpleNamespace(
            root_path=made["images"][0], dataset=lambda *a, **k: types.SimpleNamespace(n_channels=2)
        )
        Network(cases, [made["images"][1]])
