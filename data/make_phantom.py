"""Make the built-in data: synthetic volumes or images to try everything on, without downloading anything.

    python data/make_phantom.py data/Phantom                 # 123 training and 31 test volumes, seconds
    python data/make_phantom.py data/Electrode --dims 2      # 60 training and 20 test images

mtseg/phantom.py says what they show. The same seed gives the same data.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.phantom import PhantomError, make_phantom
from mtseg.script.flags import Parser, natural, one_sentence, positive


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3, help="3: volumes; 2: images")
    parser.add_argument("--train", type=positive, help="training cases (default: 123 volumes, or 60 images)")
    parser.add_argument("--test", type=positive, help="test cases (default: 31 volumes, or 20 images)")
    parser.add_argument("--seed", type=natural, default=2018, help="another seed, other data")
    args = parser.parse_args(argv)
    with one_sentence():
        if args.out.exists() and not (args.out / "train.list").is_file():
            raise PhantomError(f"{args.out}: exists and is no such data set; name another folder")
        there = ": was there already, and is left as it is" if args.out.exists() else ""
        print(f"{make_phantom(args.out, args.train, args.test, args.seed, args.dims)}{there}")


if __name__ == "__main__":
    main()
