"""Make the Phantom data: synthetic volumes to try everything on, without downloading anything.

    python data/make_phantom.py data/Phantom            # 123 training and 31 test cases, seconds

mtseg/phantom.py says what the volumes show. The same seed gives the same volumes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for mtseg, installed or not

from mtseg.phantom import TEST, TRAIN, PhantomError, make_phantom
from mtseg.script.flags import Parser, natural, one_sentence, positive


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--train", type=positive, default=TRAIN, help="training cases")
    parser.add_argument("--test", type=positive, default=TEST, help="test cases")
    parser.add_argument("--seed", type=natural, default=2018, help="another seed, other volumes")
    args = parser.parse_args(argv)
    with one_sentence():
        if args.out.exists() and not (args.out / "train.list").is_file():
            raise PhantomError(f"{args.out}: exists and is no such data set; name another folder")
        print(make_phantom(args.out, args.train, args.test, args.seed))


if __name__ == "__main__":
    main()
