"""Trains and judges the tiny models that come with the package.

python jobs/tiny_model.py train --out out/tiny --stage vae --seconds 240
python jobs/tiny_model.py evaluate conf/tiny_t2v.yaml
"""

import sys

from tiny import evaluate, train

if __name__ == "__main__":
    what, *arguments = sys.argv[1:] or ["--help"]
    if what == "train":
        train.main(arguments)
    elif what == "evaluate":
        evaluate.main(arguments)
    else:
        sys.exit(__doc__)
