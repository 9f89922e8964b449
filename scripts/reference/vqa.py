"""How answers are compared: ours against the VQA challenge's own code as salesforce-lavis 1.0.2 has it.

    pip download --no-deps salesforce-lavis==1.0.2 && python scripts/reference/vqa.py salesforce_lavis-1.0.2-py3-none-any.whl runs/answer

Recomputes `vqa_accuracy` of a run's predictions.jsonl from its data with `VQAEval`, and shows where an answer is written otherwise.
The run's recipe has to name a `data.table` (jsonl) with `question` and `answer` columns.
"""

import importlib.util
import json
import pathlib
import sys
import tempfile
import zipfile

SAMPLES = """The Dog.|two  dogs|black/white|black, white|1,000|3.5|dont know|yes!|t-shirt|none|An apple (red)|it's|its|can't|cant|
wouldnt|Mr. Smith|10:30|5 o'clock|a|the the|"quoted"|x_y|5-6|no - yes|U.S.A.|$5.00|50%|what?|hot dog;bun|youre|theyre|shes|lets go|
he s|st. louis|.5|7.|1.2.3|ten to one|zero|nothing|none of them|an hour|back-pack|left, right|a,b|3,000,000|whos there|im fine""".replace("\n", "").split("|")


def official(wheel):
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read("lavis/common/vqa_tools/vqa_eval.py")
    path = pathlib.Path(tempfile.mkdtemp()) / "vqa_eval.py"
    path.write_bytes(source)
    spec = importlib.util.spec_from_file_location("vqa_eval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    evaluator = module.VQAEval.__new__(module.VQAEval)
    module.VQAEval.__init__(evaluator)
    return lambda text: evaluator.processDigitArticle(evaluator.processPunctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def accuracy(answer, given):
    if len(given) < 4:
        return given.count(answer) / len(given)
    each = [min(1, (given[:i] + given[i + 1 :]).count(answer) / 3) for i in range(len(given))]
    return sum(each) / len(each)


def main():
    normalise = official(sys.argv[1])
    if len(sys.argv) < 3:
        print(json.dumps({s: normalise(s) for s in SAMPLES}, indent=0))
        return
    run = pathlib.Path(sys.argv[2])
    report = json.loads((run / "report.json").read_text())
    recipe = (run / "recipe.yaml").read_text()
    table = pathlib.Path(next(line.split(":", 1)[1].strip() for line in recipe.splitlines() if line.strip().startswith("path:")))
    if table.is_dir():
        table = table / "metadata.jsonl"
    given = {}
    for line in table.read_text().splitlines():
        row = json.loads(line)
        given[row.get("id") or row.get("image") or row.get("file_name"), row["question"]] = row["answer"]
    total = count = 0
    for line in (run / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers = next(a for (i, q), a in given.items() if row["id"].startswith(i) and (q in row["id"] or len(given) == count))
        answers = answers if isinstance(answers, list) else [answers]
        total += accuracy(normalise(row["prediction"]), [normalise(a) for a in answers])
        count += 1
    print("ours", report["after"]["metrics"]["vqa_accuracy"], "theirs", total / count)


main()
