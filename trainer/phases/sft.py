"""Supervised fine-tuning on demonstrations: mean negative log-likelihood of the answer tokens."""

from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.optim import apply_step, make_optimizer
from ipvrm_core.trainer.phases.training import Training, phase_folder
from ipvrm_core.trainer.sampling.base import Sampler
from ipvrm_core.trainer.sampling.verified import right_share

CHECK_EVERY = 10  # steps between accuracy checks, where sft.stop_accuracy asks for them
CHECK_PROMPTS = 256


def run(experiment: Experiment, resume: bool = False) -> None:
    """Train from the base model; writes sft/model."""
    sft = experiment.config.sft
    if sft is None:
        raise ValueError("the configuration has no [sft] section")
    folder = experiment.run / "sft"
    with phase_folder(folder, "model", resume) as todo:
        if not todo:
            return
        model = experiment.trainable(experiment.base_model(), "sft").train()
        optimizer = make_optimizer(model.model, sft.optim)
        show = ("nll", "grad_norm", "accuracy")
        training = todo.enter_context(
            Training(experiment, folder, sft.steps, {"model": model.model}, {"model": optimizer}, show=show, every=10)
        )
        sampler = experiment.sampler(model) if sft.stop_accuracy else None
        if sampler:
            todo.callback(sampler.close)
            sampler.rest()
        for step in training.steps():
            experiment.seed("sft", step)
            examples = experiment.examples("sft", (step - 1) * sft.batch, sft.batch)
            answers = [experiment.text.demonstration(example) for example in examples]
            training.uses(answers, examples=[example.id for example in examples])
            tokens = sum(len(answer.response_ids) for answer in answers)
            total = 0.0
            for part in model.parts(answers):
                loss = -model.batch_logprobs(model.batch(answers[part])).sum() / tokens
                loss.backward()
                total += loss.item()
            norm = apply_step(optimizer, sft.optim, step, sft.steps)
            numbers = {}
            if sampler and step % CHECK_EVERY == 0:
                sampler.sync(model)
                experiment.seed("sft check", step)
                numbers["accuracy"] = sampled_accuracy(experiment, sampler)
                sampler.rest()
                training.state["stopped"] = numbers["accuracy"] >= sft.stop_accuracy
            training.log(step, nll=total, grad_norm=norm, tokens=tokens, **numbers)
        training.finish(model.model)


def sampled_accuracy(experiment: Experiment, sampler: Sampler) -> float:
    """Share of right answers to CHECK_PROMPTS training problems of a stream of their own, of those with a verdict."""
    examples = experiment.examples("sft check", 0, CHECK_PROMPTS)
    _, verdicts = experiment.asker.ask(sampler, examples, experiment.drawing(1))
    return right_share(verdicts)
