"""Step scores of problems against plain forward passes; their files, long texts, parts of an interrupted run."""

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer.data.processbench import load_processbench
from ipvrm_core.trainer.evaluation.processbench import official
from ipvrm_core.trainer.evaluation.processbench.files import Parts, read_scores, write_scores
from ipvrm_core.trainer.evaluation.processbench.results import evaluate
from ipvrm_core.trainer.evaluation.processbench.scores import score
from ipvrm_core.trainer.evaluation.processbench.tables import markdown
from ipvrm_core.trainer.evaluation.reward_model.step_scores import step_sums, variants
from ipvrm_core.trainer.text.steps import Format
from tests.tiny_models import ROWS, log_ratio_scorer, made_up, plain_scores, scorer_of


@pytest.fixture(scope="module")
def scorer():
    return log_ratio_scorer()


def test_step_sums_and_variants_by_hand():
    sums, tokens = step_sums([9.0, 1.0, -2.0, 0.5, 4.0, 7.0], [-1, 0, 0, 1, 3, -1], 4)
    assert (sums, tokens) == ([-1.0, 0.5, 0.0, 4.0], [2, 1, 0, 1])
    assert variants(sums, tokens) == {
        "process": [-1.0, 0.5, 0.0, 4.0],
        "prefix": [-1.0, -0.5, -0.5, 3.5],
        "process_mean": [-0.5, 0.5, 0.0, 4.0],
        "prefix_mean": [-0.5, -0.5 / 3, -0.5 / 3, 3.5 / 4],
    }


def test_scores_against_plain_logits(tmp_path, scorer):
    """Whole texts read by hand: the steps' characters are the tokens here."""
    problems = load_processbench(made_up(tmp_path))
    rows = score(scorer, problems, official.FORMAT, max_tokens=150, with_official=True)
    for problem, row in zip(problems, rows, strict=True):
        steps = official.FORMAT.pieces(problem.steps)
        head = f"<u>{problem.problem}<e>\n<a>"
        q = plain_scores(scorer, scorer.tokenizer(head + "\n\n".join(steps) + "<e>\n")["input_ids"], 1)
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


def test_official_hides_the_padding_token(tmp_path):
    """The "e" closes every turn and stands in "Step"; where it is the padding token, the script's mask hides it."""
    scorer, problems = log_ratio_scorer(), load_processbench(made_up(tmp_path))
    apart = score(scorer, problems, official.FORMAT, max_tokens=150, with_official=True)
    scorer.tokenizer.pad_token = "e"
    rows = score(scorer, problems, official.FORMAT, max_tokens=150, with_official=True)
    pad = scorer.tokenizer.pad_token_id
    for problem, row in zip(problems, rows, strict=True):
        text = f"<u>{problem.problem}<e>\n<a>" + "\n\n".join(official.FORMAT.pieces(problem.steps)) + "<e>\n"
        ids = scorer.tokenizer(text)["input_ids"]
        assert ids.count(pad) == 2 + len(problem.steps)
        edges = official.boundaries(scorer.tokenizer, problem.problem, problem.steps)
        q = plain_scores(scorer, ids, 1, unseen=pad)
        sums = [q[edges[0] : min(end, len(q) - 1) + 1].sum() for end in edges[1:]]
        assert np.array(row["official_rewards"]) / official.COEFFICIENT == pytest.approx(sums, abs=1e-3)
    assert [row["sums"] for row in rows] == [row["sums"] for row in apart]  # ours see every token
    assert [row["official_rewards"] for row in rows] != [row["official_rewards"] for row in apart]


def test_parquet_round_trip_and_mixing(tmp_path, scorer):
    problems = load_processbench(made_up(tmp_path))
    rows = score(scorer, problems, Format(), max_tokens=1000)
    (tmp_path / "s").mkdir()
    write_scores(tmp_path / "s" / "gsm8k.parquet", rows, {"model": "x"})
    again, origin = read_scores([tmp_path / "s"])
    assert again == rows
    assert origin == {"model": "x"}
    write_scores(tmp_path / "s" / "z.parquet", rows, {"model": "y"})
    with pytest.raises(ValueError, match="were scored differently: model"):
        read_scores([tmp_path / "s"])
    with pytest.raises(ValueError, match="hold 4 problems twice"):
        read_scores([tmp_path / "s" / "z.parquet", tmp_path / "s" / "z.parquet"])
    with pytest.raises(FileNotFoundError, match="no score files"):
        read_scores([tmp_path / "none"])


def test_long_texts_are_counted_never_lost(tmp_path, scorer):
    """The second problem is the longest: "<u>2*3?<e>\\n<a>" is 14 tokens, its steps 8 + 6 + 2, blank lines included."""
    problems = load_processbench(made_up(tmp_path))
    with pytest.raises(ValueError, match=r"1 of 4 texts have more than 29 tokens, the longest 30 \(gsm8k-1\)"):
        score(scorer, problems, Format(), max_tokens=1000, max_length=29)
    kept = score(scorer, problems, Format(), max_tokens=1000, max_length=29, too_long="skip")
    assert [row["status"] for row in kept] == ["ok", "too_long", "ok", "ok"]
    assert kept[1]["sums"] is None
    counts = evaluate(kept, resamples=0)["counts"]["gsm8k"]
    assert counts == {"problems": 4, "erroneous": 2, "correct": 2, "truncated": 0, "too_long": 1}
    cut = score(scorer, problems, Format(), max_tokens=1000, max_length=27, too_long="truncate")
    assert [row["status"] for row in cut] == ["ok", "truncated", "ok", "truncated"]
    whole = score(scorer, problems, Format(), max_tokens=1000)
    assert cut[1]["tokens"] == [8, 5, 0]
    assert cut[1]["sums"][0] == pytest.approx(whole[1]["sums"][0], abs=1e-5)
    assert cut[1]["sums"][1] is not None
    assert cut[1]["sums"][2] is None
    assert "2 truncated" in markdown(evaluate(cut, resamples=0))


@pytest.mark.parametrize("kind", ["log-prob", "value"])
def test_other_kinds_against_plain_forward_passes(tmp_path, kind):
    """Sums over the same tokens; the decay counts from the first token of the answer."""
    scorer, problems = scorer_of(kind), load_processbench(made_up(tmp_path))
    for problem, row in zip(problems, score(scorer, problems, Format(), max_tokens=70), strict=True):
        head, text = f"<u>{problem.problem}<e>\n<a>", "\n\n".join(problem.steps)
        plain = plain_scores(scorer, scorer.tokenizer(head + text)["input_ids"], len(head))
        ends = np.cumsum([len(step) + 2 for step in problem.steps])
        expected = [piece.sum() for piece in np.split(plain, ends[:-1])]
        assert row["sums"] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match=f"repeats a script that scores log-ratios; got {kind} scores"):
        score(scorer, problems, official.FORMAT, max_tokens=70, with_official=True)


def test_parts_go_on_and_are_checked(tmp_path, scorer):
    problems = load_processbench(made_up(tmp_path / "data"))
    whole = score(scorer, problems, Format(), max_tokens=60)
    parts = Parts(tmp_path / "gsm8k.parts", {"model": "x"})
    assert score(scorer, problems, Format(), max_tokens=60, parts=parts) == whole
    files = sorted(parts.folder.iterdir())
    assert [file.name for file in files] == ["00000.parquet", "00001.parquet"]
    files[1].unlink()
    assert sorted(row["id"] for row in read_scores(files[:1])[0]) == ["gsm8k-1", "gsm8k-3"]  # the longest came first
    assert score(scorer, problems, Format(), max_tokens=60, parts=parts) == whole
    assert len(read_scores([parts.folder])[0]) == 4
    other = [{**row, "steps": ["2*3=6.", *row["steps"][1:]]} if row is ROWS[1] else row for row in ROWS]
    problems = load_processbench(made_up(tmp_path / "other", other))
    with pytest.raises(
        ValueError, match=r"gsm8k.parts holds scores made in another way \(problems\); take another --out"
    ):
        score(scorer, problems, Format(), max_tokens=60, parts=parts)
    with pytest.raises(ValueError, match=r"made in another way \(model, problems\)"):
        Parts(parts.folder, {"model": "y"}).read()
    parts.remove()
    assert not parts.folder.exists()
