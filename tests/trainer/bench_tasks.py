"""Task files and data for the tests of `anneal bench`: forty questions, documents, questions to write on."""

from pathlib import Path

from corpora import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
TINY_BASE = ROOT / "examples" / "tiny-base"

MODULES = (
    "json",
    "random",
    "pathlib",
    "socket",
    "threading",
    "decimal",
    "zipfile",
    "logging",
    "csv",
    "heapq",
)
VERBS = ("returns", "raises", "closes", "reads")
ENDINGS = (
    "the value",
    "an exception when it is called twice",
    "a file",
    "every line of the given text, in order",
)


def questions() -> list[dict]:
    """40 questions with two to four choices of different lengths."""
    records = []
    for number in range(40):
        first = number % 4
        choices = [ENDINGS[(first + step) % 4] for step in range(2 + number % 3)]
        text = f"In the module {MODULES[number % 10]}, a function that {VERBS[number // 10]} something gives"
        records.append({"question": text, "choices": choices, "gold": number % len(choices)})
    return records


MULTIPLE_CHOICE = """\
task: forty
dataset_path: json
dataset_kwargs: {data_files: {test: forty.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""

DOCUMENTS = """\
task: documents
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
metadata: {version: 1.0}
"""

WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: written.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def write_forty(directory: Path) -> Path:
    """The task `forty` with its data; returns the directory."""
    directory.mkdir(exist_ok=True)
    write_jsonl(directory / "forty.jsonl", questions())
    (directory / "forty.yaml").write_text(MULTIPLE_CHOICE, encoding="utf-8")
    return directory
