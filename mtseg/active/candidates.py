"""What can be annotated next, whole cases, slices or patches, and what a trained network says of each."""

import argparse
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from mtseg import averaging, uncertainty
from mtseg.datasets import UNKNOWN, read_list, slice_of
from mtseg.query import QueryError, opened, windows_of
from mtseg.script import fast, flags
from mtseg.script.inference_flags import inference_parser, parse_inference
from mtseg.script.runfolder import choose_device
from mtseg.script.scans import check_channels
from mtseg.script.segment import load_networks
from mtseg.script.sources import Source, data_root
from mtseg.script.windows import predict, through
from mtseg.seeding import seed_iteration
from mtseg.transforms import pad_to, resize_nearest
from mtseg.volumes import read_volume

WHOLE = 2**31 - 1  # as the side of a region: all of it
BLOCKS = 8  # along each axis: into so many a region's intensities are averaged where there is no network


class Cases:
    """The training cases of a data set, by name, as their files have their axes.

    `names`, less those in the file `val_list`; `sides`: their spatial axes, a tuple each. `axis`: along which slices
    follow each other. `table`: their classes, or None. `no_class`: the values of labels that are no class to look for.
    Raises DataError, and QueryError where some are images and others are stacks.
    """

    def __init__(self, root_path, val_list=None):
        data_root(root_path)
        self.source, known = Source(root_path), flags.data_settings(root_path)
        self.axis, self.table, self.background = self.source.axis, self.source.table, known["background"]
        self.no_class = (UNKNOWN,) if self.background is None else (self.background, UNKNOWN)  # in labels
        self.names = sorted(self.source.to_annotate(read_list(val_list) if val_list else ()))
        how = {"num_classes": None, "ignore_index": None, "intensity": known["intensity"], "snap": False}
        self.dataset = self.source.dataset(argparse.Namespace(**how, labelnum=0), self.names, labelnum=0)
        self.sides = [self.dataset.shapes[name] for name in self.names]
        if len({*map(len, self.sides)}) != 1:
            raise QueryError(
                f"{root_path}: holds {'no cases' * (not self.sides) or 'images and stacks'}; give one kind"
            )

    def image(self, number):
        """The image of a case, float32 (*spatial) or (C, *spatial)."""
        return self.dataset.read(self.names[number])["image"]

    def spacing(self, number):
        """The size of a volume's voxels, (3,) in mm, None where it is not known."""
        if self.source.files or len(self.sides[number]) == 2:
            return None
        return read_volume(self.dataset.path(self.names[number]), header_only=True).spacing


class Oracle:
    """The hidden labels of `cases`, a Cases, or of those `names`; `num_classes`: where it has no table."""

    def __init__(self, cases, num_classes=None, names=None):
        classes = len(cases.table.names) if cases.table else num_classes or 255
        how = {"num_classes": classes, "ignore_index": UNKNOWN, "intensity": "none", "snap": False}
        self.cases, self.dataset = cases, cases.source.dataset(argparse.Namespace(**how), names or cases.names)

    def label(self, number):
        return self.dataset.read(self.cases.names[number])["label"]

    def foreground(self):
        """Yields how many voxels of each case are of a class but the background."""
        for number in range(len(self.cases.names)):
            yield (~np.isin(self.label(number), self.cases.no_class)).sum()

    def answers(self, regions):
        """Yields (case, its label, UNKNOWN outside of the regions), for the cases of `regions`, (case, start, stop)."""
        for case in sorted({case for case, *_ in regions}):
            label = self.label(self.cases.names.index(case))
            answer = np.full_like(label, UNKNOWN)
            for other, *corners in regions:
                box = tuple(map(slice, *corners))
                if other == case:
                    answer[box] = label[box]
            yield case, answer


class Network:
    """Trained networks, and what they say of the `cases`, a Cases.

    `paths`: checkpoints, one or several. `members`: whose score maps are compared; network: each network alone;
    teacher: and the teacher or student beside it; flips: each of its mirror images; dropout: `samples` masks each.
    """

    def __init__(self, cases, paths, members="network", samples=10, gpu="0", network=None):
        words = ["--model_path", *paths, "--root_path", cases.source.root_path, "--gpu", gpu]
        words += ["--network", network] if network else []
        how = {"teacher": "teacher", "dropout": "mc_dropout"}
        words += ["--uncertainty", how[members]] if members in how else []
        self.args = parse_inference(inference_parser(""), [str(word) for word in words])
        self.cases, self.members_are, self.samples = cases, members, samples
        self.device = choose_device(self.args.gpu)
        fast.switch_on(self.args, self.device)
        self.trained = load_networks(self.args, self.device)
        self.args.uncertainty, self.num_classes = None, self.args.num_classes
        self.dataset = cases.source.dataset(self.args, cases.names, labelnum=0)
        check_channels(cases.source.root_path, self.dataset.n_channels, self.args)

    def members(self, number):
        """The score maps of a case, float32 (num_classes, *spatial), one by one."""
        image, args = self.dataset.read(self.cases.names[number])["image"], self.args
        nets, flips, repeated = [*self.trained.nets, *self.trained.partners], averaging.NO_FLIPS, 1
        if self.members_are == "flips":
            flips = averaging.plane_flips(through(image, self.cases.axis, args))
        if self.members_are == "dropout":
            repeated = self.samples

        def scores_of(net, image):
            return predict(net, image, self.cases.axis, args, args.weighting)

        for sample, net, flip in itertools.product(range(repeated), nets, flips):
            seed_iteration(0, sample)  # the same masks for every case
            with averaging.dropout_on([net] if repeated > 1 else []):
                scores = averaging.mean_score(scores_of, [net], image, [flip])
            yield np.moveaxis(scores, -1, -3) if args.slices_first else scores

    @torch.inference_mode()
    def features(self, number, starts, stops):
        """float (N, D): the mean of the first network's bottleneck over each region of a case, int (N, dims) each.

        The case is seen in patches side by side; a cell of their bottleneck counts by its overlap with the region.
        """
        total, volume = 0.0, 0.0
        for cells, edges in self.bottlenecks(self.dataset.read(self.cases.names[number])["image"]):
            shares = [
                np.maximum(np.minimum(stops[:, [a]], e[1:]) - np.maximum(starts[:, [a]], e[:-1]), 0)
                for a, e in enumerate(edges)
            ]
            axes = "abc"[: len(shares)]
            total += np.einsum(f"d{axes},{','.join(f'n{a}' for a in axes)}->nd", cells, *shares, optimize=True)
            volume += np.prod([share.sum(axis=1) for share in shares], axis=0)
        return total / volume[:, None]

    def bottlenecks(self, image):
        """Yields (cells, edges) of patches that cover a case: float (D, *cells), and, for each axis as the file has it,
        where its cells begin and the last ends, in voxels of the case."""
        net, args, axis = self.trained.nets[0], self.args, self.cases.axis
        stack = args.dims == 2 and len(self.cases.sides[0]) == 3
        for k in range(image.shape[axis - 3]) if stack else [None]:
            part = image if k is None else slice_of(image, k, axis, args.context)
            sides = part.shape[-args.dims :]
            part = resize_nearest(part, args.resize) if args.resize else part
            resized = part.shape[-args.dims :]
            part = pad_to(part.reshape(-1, *resized), args.patch_size)
            rows = [
                np.unique([*range(0, s - p, p), s - p]) for s, p in zip(part.shape[1:], args.patch_size, strict=True)
            ]
            for corner in itertools.product(*rows):
                window = tuple(slice(c, c + p) for c, p in zip(corner, args.patch_size, strict=True))
                patch = torch.from_numpy(np.ascontiguousarray(part[(slice(None), *window)], np.float32))
                cells = net.encode(patch[None].to(self.device))[-1][0].double().cpu().numpy()
                edges = [
                    (np.linspace(w.start, w.stop, n + 1) - (padded - r) // 2) * s / r
                    for w, n, padded, r, s in zip(window, cells.shape[1:], part.shape[1:], resized, sides, strict=True)
                ]
                if k is not None:
                    edges.insert(axis, np.array([k, k + 1]))
                    cells = np.expand_dims(cells, 1 + axis)
                if args.slices_first:
                    edges, cells = [edges[-1], *edges[:-1]], np.moveaxis(cells, -1, 1)
                yield cells, edges


class Pool:
    """What a strategy chooses from: regions of cases, those that are annotated, and what is known of both.

    `cases`: a Cases. `windows`: query.Windows of all candidates, the case a number in `cases.names`. `size`: the sides
    of a region, WHOLE for all of a case. `annotated`: Windows of what has labels, from `regions`, a (case, start, stop)
    each. `network`: a Network, or None before there is one. `truth(number)`: the label of a case, where an oracle
    answers. `round`: its number, from 0, of `rounds`. `of`: see `scores`. `per_case`: how many regions of a case a
    round has at most; 0 for any number, None for as few as the budget allows, see strategies.choose.
    """

    def __init__(
        self, cases, unit, size, stride, regions, network=None, truth=None, round=0, rounds=5, of="mean", per_case=None
    ):
        self.cases, self.network, self.truth, self.of, self.per_case = cases, network, truth, of, per_case
        self.round, self.rounds = round, rounds
        self.size = region_size(cases, unit, size)
        self.stride = [s if s in (1, WHOLE) else stride or s // 2 for s in self.size]
        number_of = {name: number for number, name in enumerate(cases.names)}
        regions = [(number_of[case], start, stop) for case, start, stop in regions if case in number_of]
        self.annotated = windows_of(regions, len(self.size))
        places = []
        for number, sides in enumerate(cases.sides):
            starts, stops = uncertainty.corners_of(sides, self.size, self.stride)
            places += zip([number] * len(starts), starts, stops, strict=True)
        self.windows, self.known = windows_of(places, len(self.size)), {}

    def labeled(self):
        """Indices of the candidates that share a voxel with what is annotated."""
        return np.flatnonzero(~opened(self.windows, 0, self.annotated))

    def scores(self, name):
        """(N,): the voxel scores `name`, of uncertainty.voxel_scores, of each candidate, as `of` says: their mean, the
        mean of the top twentieth, or the mean over its predicted boundary or foreground."""
        if self.network is None:
            raise QueryError("there is no network yet to be unsure: take random or typiclust, or name a --run")
        if name not in self.known:
            rows = [self.of_case(number, name) for number in range(len(self.cases.names))]
            self.known |= {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return self.known[name]

    def class_scores(self):
        """(K, N): the mean class entropy of each candidate, of every foreground class."""
        self.scores("entropy")
        first = 0 if self.cases.background is None else 1
        return np.stack([self.known[number] for number in range(first, self.network.num_classes)])

    def of_case(self, number, name):
        """{name: the scores of a case's candidates}; with the entropy {class number: its class entropy} as well."""
        members = [*self.network.members(number)]
        if name in uncertainty.OF_MEMBERS and len(members) == 1:
            raise QueryError(f"one network has no {name}: give --members teacher, flips or dropout, or several runs")
        mean = uncertainty.mean_map(members)
        maps = {name: uncertainty.voxel_scores(name, members if name in uncertainty.OF_MEMBERS else [mean])}
        if name == "entropy":
            maps |= dict(enumerate(maps[name] * mean))
        where, labels = None, averaging.label_map(mean)
        if self.of == "boundary":
            where = uncertainty.predicted_boundary(labels)
        elif self.of == "foreground":
            where = uncertainty.predicted_foreground(labels, self.cases.background)
        return {name: self.over_regions(values, where) for name, values in maps.items()}

    def over_regions(self, values, where):
        """(N,): the mean of `values` (*spatial) over every candidate of a case, in the bool region `where` of it."""
        means, starts, stops = uncertainty.window_means(values, self.size, self.stride)
        if self.of == "top":
            boxes = (values[tuple(map(slice, *corners))] for corners in zip(starts, stops, strict=True))
            return np.array([uncertainty.top_mean(box) for box in boxes])
        if where is None:
            return means
        shares = uncertainty.window_means(where, self.size, self.stride)[0]
        inside = uncertainty.window_means(values * where, self.size, self.stride)[0]
        return np.where(shares > 0, inside / np.maximum(shares, 1e-12), means)

    def features(self):
        """float (N, D): the mean of the network's bottleneck over each candidate; without one intensities in blocks."""
        found, sides = [], (self.windows.stop - self.windows.start).min(axis=0)
        for number in range(len(self.cases.names)):
            here = self.windows.case == number
            starts, stops = self.windows.start[here], self.windows.stop[here]
            if self.network is not None:
                found.append(self.network.features(number, starts, stops))
                continue
            image, dims = self.cases.image(number), starts.shape[1]
            for corners in zip(starts, stops, strict=True):
                part = torch.from_numpy(np.ascontiguousarray(image[(..., *map(slice, *corners))]))
                pool = (F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 2]
                blocks = tuple(np.minimum(BLOCKS, sides).tolist())
                found.append(pool(part.reshape(-1, *part.shape[-dims:]), blocks).double().numpy().reshape(1, -1))
        return np.concatenate(found)

    def labels_of(self, number):
        """uint8 (*spatial): the classes of a case, those that are known or, else, predicted."""
        if self.truth is not None:
            return self.truth(number)
        if self.network is None:
            raise QueryError("there is no network yet to tell foreground: take random or typiclust, or name a --run")
        return averaging.label_map(uncertainty.mean_map(self.network.members(number)))


def region_size(cases, unit, patch=None):
    """The sides of a region along the axes of a case, WHOLE for all of it; QueryError where there is no such."""
    dims = len(cases.sides[0])
    if patch is not None and unit != "patch":
        raise QueryError(f"--unit {unit} with --region, which is about patches: take --unit patch, or leave it out")
    if unit == "case":
        return (WHOLE,) * dims
    if unit == "slice":
        if dims == 2:
            raise QueryError("--unit slice: the cases are images, which have no slices; take case or patch")
        return tuple(1 if axis == cases.axis else WHOLE for axis in range(dims))
    if patch is None or len(patch) != dims:
        raise QueryError(f"--unit patch with cases of {dims} axes: give --region and {dims} sides in voxels")
    return tuple(patch)
