"""Segment volumes with a trained network and measure the result against their labels, where there are any.

    python inference.py --model_path model/LA_vnet_25_labeled/MT/iter_6000.pth
    python inference.py --model_path model/LA_vnet_25_labeled/MT/ema_iter_6000.pth --save_result predictions
    python inference.py --model_path theirs.pth --root_path /data/LA --n_filters 16       # weights without config.json
    python inference.py --model_path model/Heart_vnet_8_labeled/MT/iter_6000.pth --input Task02_Heart/imagesTs
    python inference.py --model_path run1/iter_6000.pth run2/iter_6000.pth --tta --input scans

Without --input: the cases of a list, or of a run's fold, by the UA-MT protocol. Prints a row per case and mean
(standard deviation), and writes metrics.csv and metrics.json into <folder of the checkpoint>/<its name>_<split>/. With
--input: scans as they are; they are prepared as the training data was (the run's preprocessing), and predictions are
written on the scan's own grid, with the values its labels have, into <output_dir>/predictions/; a broken file is passed
over, named at the end, and makes the exit code 1. A case's folder, or one of its files, is an --input too. Settings
come from the flags, else from the run's config.json beside the checkpoint, else they are those of the UA-MT protocol:
windows of 112 x 112 x 80 voxels, strides 18 and 4. Weights of UA-MT, LASeg and MC-Net load as they are.
"""

from mtseg.script import flags
from mtseg.script.inference_flags import inference_parser, parse_inference

PARSER = inference_parser(__doc__)
flags.answer_help(PARSER, __name__)

from pathlib import Path

from tqdm import tqdm

from mtseg.allocator import keep_freed_memory
from mtseg.results import without_nan
from mtseg.script import fast, outcome, scans
from mtseg.script.caselog import CaseLog
from mtseg.script.runfolder import choose_device
from mtseg.script.segment import costs_only_the_case, infer_case, load_networks


def infer(args):
    """Segment, write and measure all cases; returns what metrics.json says."""
    # ------------------------------------------------------------------------------------------- networks and cases
    device = choose_device(args.gpu)
    if device.type == "cpu" and args.keep_memory:
        keep_freed_memory()
    for note in fast.switch_on(args, device):
        print(note)
    trained = load_networks(args, device)
    cases = scans.input_scans(args) if args.input else scans.listed_scans(args)
    folder = outcome.output_folder(args, cases.files)

    entries, log = {}, None
    if args.input or args.go_on:
        asked = {"checkpoint_sha256": trained.sha256, "protocol": outcome.protocol_of(args), "unit": cases.unit}
        place = args.input or Path(args.root_path, f"{args.split}.list")
        asked |= {"preprocessing": cases.settings, "input": str(place.resolve())}
        written = ("uncertainty", "mc_samples", "save_probabilities", "tolerance", "save_colors", "measure_largest")
        asked |= {flag: vars(args)[flag] for flag in (*written, "snap")}
        asked |= {name: vars(args)[name] and str(vars(args)[name].resolve()) for name in ("labels", "save_result")}
        asked["save_format"] = args.save_result and args.save_format
        log = CaseLog(folder / "cases.jsonl", asked, go_on=args.go_on, owner="input")
        for case, entry in log.done.items():
            if case in cases.readers and entry.get("source") == scans.state_of(cases.files[case]):
                if all((folder / path).is_file() for path in entry["files"]):
                    entries[case] = entry
    else:  # of a --continue before: the files that it tells of may be replaced now
        (folder / "cases.jsonl").unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------ segmentation
    for case in tqdm([case for case in cases.readers if case not in entries], unit="case", dynamic_ncols=True):
        try:
            source = scans.state_of(cases.files[case]) if log else None
            entries[case] = infer_case(case, cases.readers[case](), trained, cases.unit, folder, args)
        except Exception as error:
            if not (args.input and costs_only_the_case(error)):
                raise
            cases.failures[case] = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"failed: {case}: {cases.failures[case]}")
            continue
        if why := entries[case]["label_error"]:
            cases.failures[case] = f"segmented, but not measured: {why}"
            tqdm.write(f"failed: {case}: {cases.failures[case]}")
        elif log:
            entries[case]["source"] = source
            log.add(case, without_nan(entries[case]))

    # ----------------------------------------------------------------------------------------------------- results
    result = outcome.result_of(args, trained, cases, entries)
    outcome.write_and_print(args, result, cases, folder)
    return result


def main(argv=None):
    with flags.one_sentence():
        result = infer(parse_inference(PARSER, argv))
    if result.get("failures"):
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    main()
