"""Sampling: the log-probs that are kept, where answers end, greedy, seeds, and the distribution itself."""

import math

import pytest
import torch
import transformers

from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_lora, character_tokenizer
from ipvrm_core.trainer.phases.rollout import cost
from ipvrm_core.trainer.sampling.base import Drawing, Sample
from ipvrm_core.trainer.sampling.generate import Generate
from ipvrm_core.trainer.sampling.verified import Asker, right_share
from ipvrm_core.trainer.text import Text
from ipvrm_core.trainer.verify import Verdict

TOKENIZER = character_tokenizer("0123456789+-*=;#?")
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("1+2?", "7*3-4?", "5-5+0*9?", "8?")]
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def generate(model, prompts=PROMPTS, *, batch: int = 256, **drawing) -> list[Sample]:
    return Generate(LanguageModel(model), TOKENIZER, batch).sample(prompts, Drawing(**drawing))


@torch.no_grad()
def _forced(model, sample, temperature: float) -> torch.Tensor:
    """log pi of every token of the vocabulary at every response position, without padding: [T, V]."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("batch", [2, 64])
def test_kept_log_probs_are_those_of_a_forward_pass(tiny_model, temperature, batch):
    """Prompts of different lengths in one batch: the shorter ones are padded on the left."""
    model = tiny_model()
    torch.manual_seed(0)
    made = generate(model, samples=3, temperature=temperature, max_new_tokens=10, batch=batch)
    assert [sample.prompt_ids for sample in made] == [prompt for prompt in PROMPTS for _ in range(3)]
    for sample in made:
        expected = _forced(model, sample, temperature).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logprobs).double(), expected, rtol=0, atol=1e-4)
    assert len({tuple(sample.response_ids) for sample in made}) > len(PROMPTS)


def test_settings_of_the_model_itself_do_not_leak_in(tiny_model):
    """Published models carry top-k, penalties and a temperature in generation_config.json."""
    model = tiny_model()
    own = model.generation_config
    own.do_sample, own.top_k, own.repetition_penalty, own.temperature = True, 2, 1.9, 0.3
    torch.manual_seed(0)
    made = generate(model, samples=40, temperature=1.5, max_new_tokens=3)
    ranks = []
    for sample in made:
        logp = _forced(model, sample, 1.5)
        ids = torch.tensor(sample.response_ids)[:, None]
        torch.testing.assert_close(torch.tensor(sample.logprobs).double(), logp.gather(1, ids)[:, 0], rtol=0, atol=1e-4)
        ranks += (logp > logp.gather(1, ids)).sum(1).tolist()
    assert max(ranks) > 5  # top-k 2 would allow ranks 0 and 1
    assert model.generation_config is own
    assert own.top_k == 2


def test_adapters_take_part_in_sampling(tiny_model):
    model = add_lora(tiny_model(), Lora(rank=4, alpha=8.0)).eval()
    before = model.generation_config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    for sample in generate(model, samples=3, max_new_tokens=6):
        expected = _forced(model, sample, 1.0).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logprobs).double(), expected, rtol=0, atol=1e-4)
        plain = _forced(tiny_model(), sample, 1.0).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        assert (plain - expected).abs().max() > 0.01
    assert model.generation_config == before


def test_answers_stop_at_eos_and_include_it(tiny_model):
    model = tiny_model(scale=2.0)  # nearly uniform: EOS comes about every twentieth token
    torch.manual_seed(0)
    made = generate(model, samples=20, temperature=1.0, max_new_tokens=16)
    finished = [sample for sample in made if sample.finished]
    assert 10 < len(finished) < 70
    for sample in made:
        assert len(sample.logprobs) == len(sample.response_ids)
        assert EOS not in sample.response_ids[:-1]
        if sample.finished:
            assert sample.response_ids[-1] == EOS
        else:
            assert len(sample.response_ids) == 16
            assert sample.response_ids[-1] != EOS
    assert len({len(sample.response_ids) for sample in finished}) > 3


def test_a_model_may_have_more_than_one_end(tiny_model):
    model = tiny_model(scale=2.0)
    semicolon = TOKENIZER.convert_tokens_to_ids(";")
    model.generation_config.eos_token_id = [semicolon, EOS]
    torch.manual_seed(0)
    made = generate(model, samples=20, max_new_tokens=16)
    ends = {sample.response_ids[-1] for sample in made if sample.finished}
    assert ends == {semicolon, EOS}
    assert all(not {semicolon, EOS} & set(sample.response_ids[:-1]) for sample in made)


def test_greedy_takes_the_most_probable_token(tiny_model):
    model = tiny_model()
    made = generate(model, temperature=0, max_new_tokens=12)
    for sample in made:
        logp = _forced(model, sample, 1.0)
        assert logp.argmax(1).tolist() == sample.response_ids
        torch.testing.assert_close(torch.tensor(sample.logprobs).double(), logp.max(1).values, rtol=0, atol=1e-4)


def test_same_seed_same_samples(tiny_model):
    model = tiny_model()

    def draw(seed: int):
        torch.manual_seed(seed)
        return generate(model, samples=4, max_new_tokens=8, batch=5)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_prompts_of_like_lengths_share_a_batch(tiny_model):
    model, padding = tiny_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: padding.append((args[0] == PAD).sum().item()))
    long, short = PROMPTS[2], PROMPTS[3]
    made = generate(model, [short, long, short, long], max_new_tokens=1, batch=2)
    assert [sample.prompt_ids for sample in made] == [short, long, short, long]
    assert set(padding) == {0}


def test_a_prompt_is_computed_once_for_all_its_answers(tiny_model):
    model, tokens = tiny_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    prompt = PROMPTS[2]
    generate(model, [prompt], samples=5, max_new_tokens=1)
    assert tokens == [len(prompt) - 1, 5]


def test_prompts_of_one_token(tiny_model):
    made = generate(tiny_model(), [[3], [5]], samples=2, temperature=0, max_new_tokens=4)
    assert [sample.prompt_ids for sample in made] == [[3], [3], [5], [5]]
    assert made[0] == made[1] != made[2] == made[3]


@pytest.mark.parametrize("kind", ["MistralConfig", "Gemma3TextConfig", "MambaConfig", "FalconH1Config"])
def test_answers_that_share_a_prompt_are_those_of_one_answer_a_prompt(kind):
    """Windows shorter than the prompts, and models that keep a state instead of keys and values."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2}
    if kind != "MambaConfig":
        sizes |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    if kind == "FalconH1Config":
        sizes |= {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}
    elif kind != "MambaConfig":
        sizes |= {"sliding_window": 4}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=32, max_position_embeddings=64, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    once, thrice = (generate(model, samples=n, temperature=0, max_new_tokens=12) for n in (1, 3))
    for alone, together in zip([sample for sample in once for _ in range(3)], thrice, strict=True):
        assert alone.response_ids == together.response_ids
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(together.logprobs), rtol=0, atol=1e-5)


def test_the_mode_of_the_model_is_kept(tiny_model):
    model = tiny_model().train()
    generate(model, PROMPTS[:1], max_new_tokens=2)
    assert model.training


def _chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """Pearson's statistic with rare cells pooled, and the 99.9 % quantile (Wilson-Hilferty)."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    cells = [(counts[common], expected[common])]
    if (~common).any():
        cells.append((counts[~common].sum()[None], expected[~common].sum()[None]))
    observed, expected = (torch.cat(column) for column in zip(*cells, strict=True))
    freedom = len(observed) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return ((observed - expected).square() / expected).sum().item(), bound


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_first_tokens_follow_the_distribution(tiny_model, temperature):
    """Chi-square at 0.1 %, fixed seed; and the same samples are far from what a somewhat other temperature gives."""
    model = tiny_model(scale=15.0)
    prompts = [PROMPTS[1], PROMPTS[3]]
    torch.manual_seed(0)
    made = generate(model, prompts, samples=3000, temperature=temperature, max_new_tokens=1, batch=1000)
    for number, prompt in enumerate(prompts):
        mine = made[3000 * number : 3000 * (number + 1)]
        assert all(sample.prompt_ids == prompt for sample in mine)
        counts = torch.tensor([sample.response_ids[0] for sample in mine]).bincount(minlength=len(TOKENIZER)).double()
        statistic, bound = _chi_square(counts, _forced(model, mine[0], temperature)[0].exp())
        assert statistic < bound
        statistic, bound = _chi_square(counts, _forced(model, mine[0], temperature * 1.5)[0].exp())
        assert statistic > 2 * bound


def test_top_p_cuts_the_tail(tiny_model):
    model = tiny_model(scale=4.0)
    torch.manual_seed(0)
    made = generate(model, PROMPTS[:1], samples=500, top_p=0.5, max_new_tokens=1)
    p = _forced(model, made[0], 1.0)[0].exp().sort(descending=True)
    nucleus = p.indices[: int((p.values.cumsum(0) < 0.5).sum()) + 1].tolist()
    assert {sample.response_ids[0] for sample in made} == set(nucleus)
    assert 1 < len(nucleus) < len(TOKENIZER) - 2


# ---- the characters


def test_text_survives_the_character_tokenizer():
    for text in ("5*5=5;5-6=9;9-3=6;#6", "1+2?"):
        ids = TOKENIZER(text)["input_ids"]
        assert len(ids) == len(text)
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.decode([*ids, EOS, TOKENIZER.pad_token_id], skip_special_tokens=True) == text


def test_an_unknown_character_is_an_error():
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER("1/2?")


class Canned:
    """A sampler whose answers are given: prompt after prompt, `drawing.samples` each."""

    def __init__(self, answers: list[list[int]]):
        self.answers = answers

    def sample(self, prompts, drawing):
        prompts = [prompt for prompt in prompts for _ in range(drawing.samples)]
        return [Sample(prompt, ids, [], True) for prompt, ids in zip(prompts, self.answers, strict=True)]


def test_samples_of_a_task_are_verified(tiny_experiment):
    """Reference solutions, right and spoilt, as if the model had said them: verdicts in the order of the samples."""
    from ipvrm_core.trainer.evaluation.policy.accuracy import _all_steps

    experiment = tiny_experiment()
    examples = experiment.test_examples(2)
    texts = [example.solution for example in examples for _ in range(2)]
    texts[2] = texts[2][:-1] + str((int(texts[2][-1]) + 1) % 10)
    sampler = Canned([experiment.text.answer_ids(text) for text in texts])
    samples, verdicts = experiment.asker.ask(sampler, examples, Drawing(samples=2))
    assert [sample.prompt_ids for sample in samples] == [
        TOKENIZER(e.prompt)["input_ids"] for e in examples for _ in "12"
    ]
    assert [experiment.text.decode(sample.response_ids) for sample in samples] == texts
    assert [verdict.correct for verdict in verdicts] == [True, True, False, True]
    assert right_share(verdicts) == 0.75
    assert right_share([*verdicts, Verdict(False, "timeout")]) == 0.75  # says nothing
    assert right_share([Verdict(False, "error")]) == 0
    checked = _all_steps(experiment, [example for example in examples for _ in range(2)], samples)
    assert checked == [True, True, False, True]


def test_an_unfinished_answer_is_judged_or_not_looked_at():
    seen = []

    def verifier(responses, golds):
        seen.append(list(responses))
        return [Verdict(response == gold, "ok") for response, gold in zip(responses, golds, strict=True)]

    samples = [Sample([1], [2], [0.0], finished) for finished in (True, False, True)]
    for unfinished, statuses in (("judge", ["ok"] * 3), ("wrong", ["ok", "unfinished", "ok"])):
        verdicts = Asker(Text(TOKENIZER), verifier, unfinished).judge(samples, ["5", "5", "6"], ["5"] * 3)
        assert [verdict.status for verdict in verdicts] == statuses
        assert [verdict.correct for verdict in verdicts] == [True, unfinished == "judge", False]
    assert seen == [["5", "5", "6"], ["5", "6"]]


def test_the_sampler_takes_the_weights_it_is_given(tiny_model):
    first, second = (LanguageModel(tiny_model(number)) for number in (0, 1))
    sampler, greedy = Generate(first, TOKENIZER), Drawing(temperature=0, max_new_tokens=8)
    before = sampler.sample(PROMPTS, greedy)
    sampler.sync(second)
    assert sampler.sample(PROMPTS, greedy) == generate(second.model, temperature=0, max_new_tokens=8) != before
    sampler.close()


def test_texts_of_a_problem_and_of_a_demonstration():
    text = Text(TOKENIZER)
    answer = text.demonstration(Example("e-1", "1+2?", "3", solution="1+2=3;#3"))
    assert text.decode(answer.prompt_ids) == "1+2?"
    assert text.decode(answer.response_ids) == "1+2=3;#3"
    assert answer.response_ids[-1] == EOS
    assert text.prompt_ids(Example("e-1", "1+2?", "3")) == answer.prompt_ids
    with pytest.raises(ValueError, match="example e-2 has no solution to learn from"):
        text.demonstration(Example("e-2", "1+2?", "3"))


def test_cost_of_the_rollouts():
    """All shards together: tokens over seconds, not the mean of the shards' own speeds."""
    lines = [
        {"tokens": 100, "seconds": 1.0, "peak_memory_mb": 5.0},
        {"tokens": 20, "seconds": 3.0, "peak_memory_mb": 4.0},
    ]
    assert cost(lines) == {"tokens": 120, "seconds": 4.0, "tokens_per_second": 30.0, "peak_memory_mb": 5.0}
