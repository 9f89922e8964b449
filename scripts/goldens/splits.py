"""Which split Hugging Face `datasets` takes a name of a directory or a file for: tests/data/splits.json.

python scripts/goldens/splits.py
"""

import json
import os
import tempfile
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

NAMES = """train training validation valid val dev test testing eval evaluation training_set test_set validation_set train_images
images_train train-images test.images train2017 val2014 2017val train_00 my_train_set data-test dev_set eval_1 cats_train_v2 train.v1
trainset testset traindata trains tested latest contest developer evaluate value valley attest devices set images cat train_test
test_tube train station""".split() + ["train set", "images test 2"]
FILES = """train.csv test.jsonl validation.tsv data_train.csv train-00000-of-00002.parquet test-00000-of-00001.parquet dev_0.tar valid_01.tar
shard-train-000.tar shard-000000.tar latest-1.tar 0000.parquet train2017.csv eval.csv training_data.csv""".split()


def split_of(path):
    """The split of `path` beside a file of training, since a split that is alone says nothing about names that match none."""
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
        try:
            patterns = get_data_patterns(root)
        except EmptyDatasetError:
            return None
        found = DataFilesDict.from_patterns(patterns, base_path=root)
        # Everything is "train" where no name says anything.
        if list(patterns.values()) == [["**"]]:
            return None
        splits = sorted(str(split) for split, files in found.items() if any(os.path.samefile(f, file) for f in files))
        return splits[0] if len(splits) == 1 else splits


def main():
    directories = {name: split_of(f"{name}/class/a.png") for name in NAMES}
    files = {name: split_of(name) for name in FILES}
    files.update({name: split_of(name) for name in ["test/0000.parquet", "train/test_0.tar", "data/test.csv", "a/train/b/0.tar"]})
    out = Path(__file__).parents[2] / "tests/data/splits.json"
    text = json.dumps({"datasets": datasets.__version__, "directories": directories, "files": files}, indent=1)
    out.write_text(text + "\n")


if __name__ == "__main__":
    main()
