"""ProcessBench from file to F1: loading, boundaries, scores against plain logits, sweep, bootstrap, official mode."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer import cli
from ipvrm_core.trainer.config import Scratch
from ipvrm_core.trainer.data.processbench import load_processbench
from ipvrm_core.trainer.evaluation import official, processbench, processbench_results
from ipvrm_core.trainer.evaluation.bootstrap import bootstrap_f1, interval, resample_counts
from ipvrm_core.trainer.evaluation.localisation import Sweep, best_f1, f1_at
from ipvrm_core.trainer.evaluation.log_ratios import Pair, check_vocabulary
from ipvrm_core.trainer.evaluation.rendering import Format, render, token_steps
from ipvrm_core.trainer.evaluation.score_answers import score_stored
from ipvrm_core.trainer.evaluation.step_scores import step_sums, variants
from ipvrm_core.trainer.evaluation.stored_answers import Stored
from ipvrm_core.trainer.models import build_scratch, character_tokenizer, save_model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "processbench"
ALPHABET = "0123456789+-*=?;.:# \nSteparodbmnuswi<>|"
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<e>\n{% endfor %}"
ROWS = [
    {"problem": "1+2?", "steps": ["1+2=3.", "so 3"], "label": -1, "generator": "a", "final_answer_correct": True},
    {"problem": "2*3?", "steps": ["2*3=5.", "so 5", "5."], "label": 0, "generator": "a", "final_answer_correct": False},
    {"problem": "4-1?", "steps": ["4-1=3. ", "so 4"], "label": 1, "generator": "b", "final_answer_correct": False},
    {"problem": "9+9?", "steps": ["9+9=18.", "so 18"], "label": -1, "generator": "b", "final_answer_correct": 1},
]


def made_up(folder: Path, rows=ROWS, name: str = "gsm8k") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps([{"id": f"{name}-{i}", **row} for i, row in enumerate(rows)]))
    return path


def tokenizer(template: str | None = TEMPLATE):
    made = character_tokenizer(ALPHABET)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # newlines too
    made.chat_template = template
    return made


def model(seed: int, scale: float = 6.0):
    torch.manual_seed(seed)
    scratch = Scratch(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=64)
    made = build_scratch(scratch, tokenizer())
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return made.eval()


@pytest.fixture(scope="module")
def pair():
    return Pair(tokenizer(), model(1), model(2))


# ---- loading


def test_a_file_and_a_folder(tmp_path):
    made_up(tmp_path / "data", name="omnimath")
    path = made_up(tmp_path / "data", ROWS[:2])
    problems = load_processbench(path)
    assert [(p.subset, p.id, p.label, p.final_answer_correct) for p in problems] == [
        ("gsm8k", "gsm8k-0", -1, True),
        ("gsm8k", "gsm8k-1", 0, False),
    ]
    assert problems[0].steps == ("1+2=3.", "so 3")
    assert [p.subset for p in load_processbench(tmp_path / "data")] == ["gsm8k"] * 2 + ["omnimath"] * 4


def test_a_limit_keeps_both_kinds(tmp_path):
    rows = [ROWS[0]] * 9 + [ROWS[1]] * 3
    labels = [p.label for p in load_processbench(made_up(tmp_path, rows), limit=4)]
    assert labels == [-1, -1, -1, 0]
    assert [p.label for p in load_processbench(made_up(tmp_path, [ROWS[0]] * 50 + [ROWS[1]]), limit=2)] == [-1, 0]
    assert [p.id for p in load_processbench(made_up(tmp_path, [ROWS[0]] * 9), limit=3)] == [
        "gsm8k-0",
        "gsm8k-3",
        "gsm8k-6",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, r"row 0: label must be -1 or a step, 0 .. 1; got 2"),
        ({"label": -2}, "got -2"),
        ({"label": "1"}, "got '1'"),
        ({"label": True}, "got True"),
        ({"steps": []}, "steps must be a list of at least one text"),
        ({"steps": "1+2"}, "steps must be a list of at least one text"),
        ({"steps": ["a", " \n"]}, "step 1 must be a text"),
        ({"problem": " "}, "problem must be a text"),
        ({"final_answer_correct": 2}, "final_answer_correct must be true or false"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_processbench(made_up(tmp_path, [{**ROWS[0], **change}]))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.json"):
        load_processbench(tmp_path / "nothing")
    (tmp_path / "a.json").write_text('[{"problem": "x"}]')
    with pytest.raises(ValueError, match=r"row 0: no column steps, label; it has \['problem'\]"):
        load_processbench(tmp_path)
    with pytest.raises(ValueError, match="row 1: id 'gsm8k-0' is also that of row 0"):
        load_processbench(made_up(tmp_path / "b", [ROWS[0], {**ROWS[0], "id": "gsm8k-0"}]))


# ---- which token belongs to which step


def pieces_of(rendered, count):
    ids = [rendered.step_of.index(step) for step in range(count)]
    assert sorted(ids) == ids
    return [
        "".join(rendered.text[a:b] for (a, b), s in zip(rendered.offsets, rendered.step_of, strict=True) if s == step)
        for step in range(count)
    ]


def test_chat_boundaries():
    """The blank line closes its step; template and problem belong to none."""
    rendered = render(tokenizer(), "1+2?", ["1+2=3. ", "so 3"])
    assert rendered.text == "<u>1+2?<e>\n<a>1+2=3. \n\nso 3<e>\n"
    assert pieces_of(rendered, 2) == ["1+2=3. \n\n", "so 3"]
    assert rendered.text[rendered.offsets[rendered.start][0] :].startswith("1+2=3")
    assert rendered.text[rendered.offsets[rendered.end][0] :] == "<e>\n"
    numbered = render(tokenizer(), "1+2?", ["1+2", "so 3"], Format(step="Step {number}: {step}", system_prompt="so"))
    assert numbered.text.startswith("<s>so<e>\n<u>")
    assert pieces_of(numbered, 2) == ["Step 1: 1+2\n\n", "Step 2: so 3"]


def test_plain_boundaries():
    rendered = render(tokenizer(None), "1+2?", ["1+2=3", "so 3"])
    assert rendered.text == "1+2?\n\n1+2=3\n\nso 3"
    assert pieces_of(rendered, 2) == ["1+2=3\n\n", "so 3"]
    assert rendered.end == len(rendered.ids)


def test_a_template_that_strips_the_answer():
    strip = TEMPLATE.replace("m['content']", "m['content'] | trim")
    rendered = render(tokenizer(strip), "1+2?", [" 1+2", "so 3 "])
    assert rendered.text.endswith("<a>1+2\n\nso 3<e>\n")
    assert pieces_of(rendered, 2) == ["1+2\n\n", "so 3"]


def test_an_answer_that_repeats_the_problem():
    rendered = render(tokenizer(), "so 3", ["so 3"])
    assert rendered.start == len("<u>so 3<e>\n<a>")


@pytest.mark.parametrize(
    ("template", "steps", "message"),
    [
        (TEMPLATE.replace("m['content']", "m['content'] | upper"), ["so 3"], "p7: the chat template does not show"),
        ("{{ raise_exception('no roles') }}", ["so 3"], "p7: the chat template refuses the conversation: no roles"),
        ("<u>{{ messages[0]['content'] }}<a>", ["so 3"], "does not show the answer as it is: 'so 3'"),
        (TEMPLATE, ["so", "\n"], r"p7: step 1 leaves no text"),
    ],
)
def test_answers_that_do_not_render(template, steps, message):
    with pytest.raises(ValueError, match=message):
        render(tokenizer(template), "so 3", steps, where="p7")


def test_errors_of_the_format():
    with pytest.raises(ValueError, match=r"must contain '\{step\}'; got 'Step'"):
        Format(step="Step")
    with pytest.raises(ValueError, match="a system prompt needs a tokenizer with a chat template"):
        render(tokenizer(None), "1", ["2"], Format(system_prompt="so"))
    with pytest.raises(ValueError, match="need a fast tokenizer"):
        render(object(), "1", ["2"])


def test_straddling_tokens():
    """Text "pp|ab|cd|ee": problem 0-2, steps end at 4, 6, 8, template from 8. A token counts for its last character."""
    offsets = [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (7, 9), (9, 10), (0, 0)]
    assert token_steps(offsets, [4, 6, 8], 2, 8) == [-1, 0, 1, 1, 2, 2, -1, -1]
    assert token_steps([(2, 6), (6, 8)], [4, 6, 8], 2, 8) == [1, 2]  # step 0 is swallowed whole
    assert token_steps([(2, 3), (2, 3), (3, 4)], [4], 2, 4) == [0, 0, 0]  # the bytes of one character


def test_a_real_bpe_that_merges_over_the_boundary():
    """Merges " so" and "3.\\n\\n": the newline token that holds "3." stays with its step."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "1", "3", ".", "\n", "s", "o", " ", ".\n", ".\n\n", "3.\n\n", "so", "\nso", "3\nso"]
    merges = [(".", "\n"), (".\n", "\n"), ("3", ".\n\n"), ("s", "o"), ("\n", "so"), ("3", "\nso")]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    rendered = render(fast, "1", ["3.", "so"])
    assert [rendered.text[a:b] for a, b in rendered.offsets] == ["1", "\n", "\n", "3.\n\n", "so"]
    assert rendered.step_of == [-1, -1, -1, 0, 1]
    joined = render(fast, "1", ["3", "so"], Format(joiner="\n"))  # "3\nso" is one token: it knows step 1
    assert [rendered.text[a:b] for a, b in rendered.offsets][-1] == "so"
    assert joined.step_of == [-1, -1, -1, 1]


# ---- scores


def test_step_sums_and_variants_by_hand():
    sums, tokens = step_sums([9.0, 1.0, -2.0, 0.5, 4.0, 7.0], [-1, 0, 0, 1, 3, -1], 4)
    assert (sums, tokens) == ([-1.0, 0.5, 0.0, 4.0], [2, 1, 0, 1])
    assert variants(sums, tokens) == {
        "process": [-1.0, 0.5, 0.0, 4.0],
        "prefix": [-1.0, -0.5, -0.5, 3.5],
        "process_mean": [-0.5, 0.5, 0.0, 4.0],
        "prefix_mean": [-0.5, -0.5 / 3, -0.5 / 3, 3.5 / 4],
    }


def plain_log_ratios(pair, ids):
    """q of tokens 1.. from the models' own logits."""
    row = torch.tensor([ids])
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            for m in (pair.model, pair.reference)
        )
    return (ours - theirs).numpy()


def test_scores_against_plain_logits(pair, tmp_path):
    """Whole texts read by hand: the steps' characters are the tokens here."""
    problems = load_processbench(made_up(tmp_path))
    rows = processbench.score(pair, problems, official.FORMAT, max_tokens=150, with_official=True)
    for problem, row in zip(problems, rows, strict=True):
        steps = official.FORMAT.pieces(problem.steps)
        head = f"<u>{problem.problem}<e>\n<a>"
        q = plain_log_ratios(pair, pair.tokenizer(head + "\n\n".join(steps) + "<e>\n")["input_ids"])
        at, expected = len(head) - 1, []
        for number, step in enumerate(steps):
            size = len(step) + (2 if number < len(steps) - 1 else 0)
            expected.append(q[at : at + size].sum())
            at += size
        assert row["sums"] == pytest.approx(expected, abs=1e-4)
        assert sum(row["tokens"]) == row["answer_tokens"] == sum(map(len, steps)) + 2 * len(steps) - 2
        # Here the template closes a turn by four characters, "<e>\n", of which the script strips one and adds two: the
        # boundary of every step but the last lies len("<e>") tokens too far, and the sum starts at the third character.
        start = len(head) + 1
        ends = [len(head) + len("\n\n".join(steps[: k + 1])) + 3 for k in range(len(steps))]
        ends[-1] -= 2
        sums = [q[start : end + 1].sum() for end in ends]
        assert np.array(row["official_rewards"]) / official.COEFFICIENT == pytest.approx(sums, abs=1e-3)
        assert row["official_lengths"] == [end - start for end in ends]


def test_parquet_round_trip_and_mixing(pair, tmp_path):
    problems = load_processbench(made_up(tmp_path))
    rows = processbench.score(pair, problems, Format(), max_tokens=1000)
    (tmp_path / "s").mkdir()
    processbench.write_scores(tmp_path / "s" / "gsm8k.parquet", rows, {"model": "x"})
    again, origin = processbench.read_scores([tmp_path / "s"])
    assert again == rows
    assert origin == {"model": "x"}
    processbench.write_scores(tmp_path / "s" / "z.parquet", rows, {"model": "y"})
    with pytest.raises(ValueError, match="were scored differently: model"):
        processbench.read_scores([tmp_path / "s"])
    with pytest.raises(ValueError, match="hold 4 problems twice"):
        processbench.read_scores([tmp_path / "s" / "z.parquet", tmp_path / "s" / "z.parquet"])
    with pytest.raises(FileNotFoundError, match="no score files"):
        processbench.read_scores([tmp_path / "none"])


def test_long_texts_are_counted_never_lost(pair, tmp_path):
    """The second problem is the longest: "<u>2*3?<e>\\n<a>" is 14 tokens, its steps 8 + 6 + 2, blank lines included."""
    problems = load_processbench(made_up(tmp_path))
    with pytest.raises(ValueError, match=r"1 of 4 texts have more than 29 tokens, the longest 30 \(gsm8k-1\)"):
        processbench.score(pair, problems, Format(), max_tokens=1000, max_length=29)
    kept = processbench.score(pair, problems, Format(), max_tokens=1000, max_length=29, too_long="skip")
    assert [row["status"] for row in kept] == ["ok", "too_long", "ok", "ok"]
    assert kept[1]["sums"] is None
    counts = processbench_results.evaluate(kept, resamples=0)["counts"]["gsm8k"]
    assert counts == {"problems": 4, "erroneous": 2, "correct": 2, "truncated": 0, "too_long": 1}
    cut = processbench.score(pair, problems, Format(), max_tokens=1000, max_length=27, too_long="truncate")
    assert [row["status"] for row in cut] == ["ok", "truncated", "ok", "truncated"]
    whole = processbench.score(pair, problems, Format(), max_tokens=1000)
    assert cut[1]["tokens"] == [8, 5, 0]
    assert cut[1]["sums"][0] == pytest.approx(whole[1]["sums"][0], abs=1e-5)
    assert cut[1]["sums"][1] is not None
    assert cut[1]["sums"][2] is None
    assert "2 truncated" in processbench_results.markdown(processbench_results.evaluate(cut, resamples=0))


def test_the_same_model_twice_is_refused(pair, tmp_path):
    problems = load_processbench(made_up(tmp_path))
    with pytest.raises(ValueError, match="all log-ratios are 0: model and reference have the same weights"):
        processbench.score(pair._replace(reference=pair.model), problems, Format(), max_tokens=1000)


def test_another_vocabulary_is_refused():
    check_vocabulary(tokenizer(), tokenizer())
    with pytest.raises(ValueError, match="same vocabulary; got 41 and 4 tokens"):
        check_vocabulary(tokenizer(), character_tokenizer("ab"))


# ---- sweep and bootstrap

SCORES = [[0.9, 0.2, 0.5], [0.4, 0.8], [0.6, 0.7], [0.3, 0.9]]
LABELS = [1, 0, -1, -1]


def test_weights_are_repetitions():
    sweep = Sweep.make(SCORES, LABELS)
    weights = [2, 1, 3, 1]
    repeated = [row for row, n in zip(SCORES, weights, strict=True) for _ in range(n)]
    labels = [label for label, n in zip(LABELS, weights, strict=True) for _ in range(n)]
    assert sweep.best(np.array(weights)) == pytest.approx(best_f1(repeated, labels))
    for threshold in (0.1, 0.3, 0.35, 0.5, math.inf):
        assert sweep.at(threshold, np.array(weights)) == pytest.approx(f1_at(repeated, labels, threshold))


def test_ties_by_hand():
    """All scores equal: nothing is wrong (0, 1) or all is at its first step (1/2, 0). Both F1 are 0."""
    result = best_f1([[1.0, 1.0], [1.0, 1.0], [1.0]], [0, 1, -1])
    assert (result.f1, result.threshold) == (0.0, 1.0)
    assert (result.accuracy_erroneous, result.accuracy_correct) == (0.0, 1.0)
    # A step that ties with an earlier one can never be the first below a threshold.
    assert best_f1([[0.0, 0.0], [1.0]], [1, -1]).f1 == 0.0


def test_labels_and_scores_are_checked():
    with pytest.raises(ValueError, match="trace 1: label must be -1 or one of its 1 steps; got 1"):
        Sweep.make([[1.0], [2.0]], [-1, 1])
    with pytest.raises(ValueError, match="1 of 2 are nan"):
        Sweep.make([[1.0], [math.nan]], [-1, 0])


def test_resamples_keep_the_size_of_each_kind():
    erroneous = np.array([True, False, True, True, False])
    counts = resample_counts(erroneous, 200, np.random.default_rng(0))
    assert (counts[:, erroneous].sum(1) == 3).all()
    assert (counts[:, ~erroneous].sum(1) == 2).all()
    assert counts.mean(0) == pytest.approx(np.ones(5), abs=0.2)


def test_bootstrap_with_a_fixed_seed():
    """One erroneous trace (always found) and 100 correct ones, 80 of them called so: accuracy ~ Binomial(100, 0.8)."""
    scores = [[-1.0]] + [[1.0]] * 80 + [[-2.0]] * 20
    sweeps = {"gsm8k": Sweep.make(scores, [0] + [-1] * 100)}
    found = bootstrap_f1(sweeps, "gsm8k", 2000, seed=1)
    assert found["oracle"]["gsm8k"].tolist() == bootstrap_f1(sweeps, "gsm8k", 2000, seed=1)["oracle"]["gsm8k"].tolist()
    assert found["oracle"]["average"] == pytest.approx(found["oracle"]["gsm8k"])
    assert found["transferred"]["gsm8k"] == pytest.approx(found["oracle"]["gsm8k"])
    low, high = interval(found["oracle"]["gsm8k"])
    share_low, share_high = 0.72, 0.87  # quantiles 0.025 and 0.975 of Binomial(100, 0.8) / 100
    assert low == pytest.approx(2 * share_low / (1 + share_low), abs=0.011)
    assert high == pytest.approx(2 * share_high / (1 + share_high), abs=0.011)


def test_a_perfect_scorer_has_no_spread():
    sweeps = {"a": Sweep.make([[1.0, -1.0], [1.0], [-1.0], [2.0]], [1, -1, 0, -1])}
    assert interval(bootstrap_f1(sweeps, None, 50)["oracle"]["a"]) == (1.0, 1.0)


# ---- results


def rows_of(subset, scores, labels, generators=None):
    return [
        {
            "subset": subset,
            "id": str(i),
            "generator": generators[i] if generators else "g",
            "label": label,
            "status": "ok",
            "sums": list(row),
            "tokens": [1] * len(row),
        }
        for i, (row, label) in enumerate(zip(scores, labels, strict=True))
    ]


def test_transfer_by_hand():
    """gsm8k is perfect at thresholds in (-1, 1]; there math is called right throughout: (0, 1) -> F1 0, oracle 1."""
    rows = rows_of("gsm8k", [[1.0, -1.0], [1.0]], [1, -1]) + rows_of("math", [[9.0, 3.0], [9.0]], [1, -1])
    result = processbench_results.evaluate(rows, resamples=20)
    found = result["variants"]["process"]
    assert found["oracle"]["math"]["f1"] == found["oracle"]["average"]["f1"] == 1.0
    assert found["transferred"]["math"]["f1"] == 0.0
    assert found["transferred"]["math"]["accuracy_correct"] == 1.0
    assert found["transferred"]["average"] == {"f1": 0.5, "ci": (0.5, 0.5)}
    assert "transferred" not in processbench_results.evaluate(rows, "other", 0)["variants"]["process"]
    assert "| process | from gsm8k | 100.0 [100.0, 100.0] 100/100 | 0.0 [0.0, 0.0] 0/100 |" in (
        processbench_results.markdown(result)
    )


def test_a_step_behind_a_truncation_is_never_called_wrong():
    rows = rows_of("gsm8k", [[1.0, -5.0], [1.0, -9.0]], [1, -1])
    rows[1] |= {"sums": [1.0, None], "tokens": [1, 0], "status": "truncated"}
    found = processbench_results.evaluate(rows, resamples=0)["variants"]
    assert [found[variant]["oracle"]["gsm8k"]["f1"] for variant in found] == [1.0] * 4


def test_generators_by_hand():
    rows = rows_of("gsm8k", [[-1.0], [5.0], [1.0], [1.0]], [0, 0, -1, -1], ["a", "a", "a", "b"])
    found = processbench_results.evaluate(rows, resamples=0)["generators"]["process"]
    assert found["a"]["transferred"] == {"f1": pytest.approx(2 / 3), "accuracy_erroneous": 0.5, "accuracy_correct": 1.0}
    assert (found["a"]["erroneous"], found["a"]["correct"]) == (2, 1)
    assert found["b"]["oracle"] == {"f1": None, "accuracy_erroneous": None, "accuracy_correct": 1.0}


def test_one_kind_of_solutions_names_the_subset():
    with pytest.raises(ValueError, match="math: F1 needs erroneous and correct traces; got 0 and 1"):
        processbench_results.evaluate(rows_of("math", [[1.0]], [-1]))


# ---- the authors' script


def script(rewards, lengths, labels):
    """The published evaluation, written as plainly as it is: {its name: (threshold, F1)}."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def search(scores):
        best, best_f1 = None, 0.0
        for t in np.linspace(-1, 1, 1000):
            predicted = [next((i for i, s in enumerate(row) if s < t), -1) for row in scores]
            right = [p == label for p, label in zip(predicted, labels, strict=True)]
            a = np.mean([r for r, label in zip(right, labels, strict=True) if label == -1])
            b = np.mean([r for r, label in zip(right, labels, strict=True) if label != -1])
            f1 = 2 * a * b / (a + b) if a + b > 0 else 0.0
            if best is None or f1 > best_f1:
                best, best_f1 = t, f1
        return best, best_f1

    means = [
        [r / n if n > 0 else 0.0 for r, n in zip(row, ns, strict=True)]
        for row, ns in zip(rewards, lengths, strict=True)
    ]
    differences, mean_differences = [], []
    for row, mean in zip(rewards, means, strict=True):
        before, counts = [0.0, *row], [0]
        for r, m in zip(row, mean, strict=True):
            counts.append(round(r / m) if abs(m) > 1e-9 else counts[-1] + 1)
        own = [before[i + 1] - before[i] for i in range(len(row))]
        differences.append([sigmoid(d) for d in own])
        steps = [counts[i + 1] - counts[i] for i in range(len(row))]
        mean_differences.append([sigmoid(d / max(n, 1) / 0.001**0.5) for d, n in zip(own, steps, strict=True)])
    return {
        "prefix": search([[sigmoid(r) for r in row] for row in rewards]),
        "process": search(differences),
        "prefix_mean": search([[sigmoid(m / 0.001**0.5) for m in row] for row in means]),
        "process_mean": search(mean_differences),
    }


def test_official_against_its_own_loop():
    rng = np.random.default_rng(0)
    labels = [int(rng.integers(0, 4)) if i % 2 else -1 for i in range(30)]
    lengths = [np.cumsum(rng.integers(0, 30, 4)).tolist() for _ in labels]
    rewards = [(0.001 * rng.normal(0, 40, 4).cumsum()).astype(np.float32).tolist() for _ in labels]
    for row in rewards[::3]:
        row[1] = 0.0  # where the script cannot get the length back
    scored = [official.variants(r, n) for r, n in zip(rewards, lengths, strict=True)]
    for name, (threshold, f1) in script(rewards, lengths, labels).items():
        found = official.best_f1([item[name] for item in scored], labels)
        assert (found.threshold, found.f1) == pytest.approx((threshold, f1))


def test_official_lengths_behind_a_mean_of_zero():
    """The script recovers lengths as sum / mean; where both are 0 it counts one token: 10, 11, 30 for 10, 20, 30."""
    found = official.variants([0.01, 0.0, 0.03], [10, 20, 30])["process_mean"]
    exponents = np.array([0.01 / 10, -0.01 / 1, 0.03 / 19]) / 0.001**0.5
    assert found == pytest.approx(1 / (1 + np.exp(-exponents)))


def test_the_official_grid_is_coarse():
    """Two solutions told apart by 3 nats: the exact sweep separates them, the grid of about 8 nats cannot."""
    labels, nats = [0, -1], [[1.0], [4.0]]
    assert best_f1(nats, labels).f1 == 1.0
    probabilities = [official.variants([0.001 * row[0]], [10])["process"] for row in nats]
    assert official.best_f1(probabilities, labels).f1 == 0.0


def test_official_rewards_by_hand():
    rewards, lengths = official.rewards([1.0, 2.0, 3.0, -4.0, 5.0], [1, 2, 9])
    assert rewards == pytest.approx([0.005, 0.006])  # rows 1..2 and 1..4
    assert lengths == [1, 3]
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        official.boundaries(tokenizer(None), "1", ["2"])


# ---- stored answers


@pytest.mark.parametrize("closing", ["<e>\n", "<eos>\n"])
def test_scores_of_stored_answers(pair, closing):
    """ "<eos>" is the EOS token, which belongs to the answer; "<e>" is only text of the template."""
    template = TEMPLATE.replace("<e>\n", closing)
    stored = {"p": Stored(prompts=["1+2?"] * 2, texts=["1+2=3.\n\nso 3", " 5\n"])}
    score_stored(pair._replace(tokenizer=tokenizer(template)), stored, Format(), 2.0, 1000, None)
    scores = stored["p"].scores
    head = f"<u>1+2?{closing}<a>"
    ids = pair.tokenizer(f"{head}1+2=3.\n\nso 3{closing}")["input_ids"]
    start = len(pair.tokenizer(head)["input_ids"]) - 1
    q = plain_log_ratios(pair, ids)[start : start + 12 + (closing == "<eos>\n")]
    assert scores["sum"][0] == pytest.approx(2 * q.sum(), abs=1e-3)
    assert scores["vbar"][0] == pytest.approx(2 * q.mean(), abs=1e-3)
    steps = [2 * q[:8].sum(), 2 * q[8:12].sum()]
    assert scores["min_step"][0] == pytest.approx(min(steps), abs=1e-3)
    assert scores["last_step"][0] == pytest.approx(steps[1], abs=1e-3)
    assert len(scores["sum"]) == 2


def test_stored_answers_that_cannot_be_scored(pair):
    with pytest.raises(ValueError, match="problem 'p', answer 1: the answer is empty"):
        score_stored(pair, {"p": Stored(prompts=["1"] * 2, texts=["2", " \n"])}, Format(), 1.0, 1000, None)
    with pytest.raises(ValueError, match=r"answer 0: \d+ tokens, more than the limit of 5"):
        score_stored(pair, {"p": Stored(prompts=["1"], texts=["2"])}, Format(), 1.0, 1000, 5)


# ---- the command


def test_the_command(pair, tmp_path, capsys):
    for name, part in (("model", pair.model), ("reference", pair.reference)):
        save_model(part, pair.tokenizer, tmp_path / name)
    made_up(tmp_path / "data")
    made_up(tmp_path / "data", name="math")
    words = ["processbench", "--model", tmp_path / "model", "--reference", tmp_path / "reference"]
    words += ["--data", tmp_path / "data", "--device", "cpu", "--resamples", "20", "--official"]
    out = tmp_path / "out"
    assert cli.main([*map(str, words), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| process | from gsm8k |" in printed
    assert "| process | official |" in printed
    result = json.loads((out / "results.json").read_text())
    assert result["origin"]["format"]["step"] == "Step {number}: {step}"
    assert result["counts"]["math"]["problems"] == 4
    # Without the model, the same numbers.
    assert cli.main(["processbench", "--rescore", str(out), "--resamples", "20"]) == 0
    assert capsys.readouterr().out == printed
    # Old scores are neither overwritten nor mixed with others.
    assert cli.main([*map(str, words), "--out", str(out)]) == 2
    assert "already has scores (gsm8k.parquet); pass --resume" in capsys.readouterr().err
    (out / "math.parquet").unlink()
    assert cli.main([*map(str, words), "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main([*map(str, words), "--out", str(out), "--resume", "--limit", "2"]) == 2
    assert "made in another way" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "scoring needs --model, --reference, --data, --out; or pass --rescore"),
        (["--rescore", "x", "--model", "y"], "takes no --model"),
        (["--rescore", "/nowhere"], "no score files"),
        (["--rescore", "x", "--limit", "0"], "--limit must be >= 1; got 0"),
        (["--rescore", "x", "--resamples", "-1"], "--resamples must be >= 0; got -1"),
    ],
)
def test_errors_of_the_command(words, message, capsys):
    assert cli.main(["processbench", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_candidates_command(pair, tmp_path, capsys):
    save_model(pair.reference, pair.tokenizer, tmp_path / "policy")
    words = ["candidates", str(made_up(tmp_path / "data")), "--model", str(tmp_path / "policy"), "--device", "cpu"]
    words += ["--prompt", "problem", "--text", "steps", "--limit", "3"]
    assert cli.main([*words, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["answers"], found["tokens"]) == (3, 12 + 16 + 13)
    assert list(found["p_min"]) == ["0.05", "0.1", "0.2"]
    assert "3 answers, 41 tokens, temperature 1" in capsys.readouterr().out


# ---- the real files


def test_the_published_files():
    if not SHARED.is_dir():
        pytest.skip("needs shared/data/processbench beside the checkout")
    problems = load_processbench(SHARED)
    counts = {
        subset: tuple(sum(p.subset == subset and (p.label < 0) == kind for p in problems) for kind in (True, False))
        for subset in dict.fromkeys(p.subset for p in problems)
    }
    assert counts == {
        "gsm8k": (193, 207),
        "math": (406, 594),
        "olympiadbench": (339, 661),
        "omnimath": (241, 759),
    }
