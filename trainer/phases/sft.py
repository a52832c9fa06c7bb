"""Supervised fine-tuning on demonstrations: mean negative log-likelihood of the answer tokens."""

from ipvrm_core import linear_logprobs
from ipvrm_core.trainer.batching import TokenBatch, micro_batches, response_hidden
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import head_of
from ipvrm_core.trainer.optim import apply_step, make_optimizer
from ipvrm_core.trainer.phases.training import Training, phase_folder


def run(experiment: Experiment, resume: bool = False) -> None:
    """Train from the base model; writes sft/model."""
    config, sft = experiment.config, experiment.config.sft
    if sft is None:
        raise ValueError("the configuration has no [sft] section")
    folder = experiment.run / "sft"
    with phase_folder(folder, "model", resume) as todo:
        if not todo:
            return
        model = experiment.trainable(experiment.base_model(), "sft").train()
        optimizer = make_optimizer(model, sft.optim)
        training = Training(
            experiment,
            folder,
            sft.steps,
            {"model": model},
            {"model": optimizer},
            show=("nll", "grad_norm"),
            every=10,
            state={"recent_nll": []},
        )
        for step in training.steps():
            experiment.seed("sft", step)
            examples = experiment.examples("sft", (step - 1) * sft.batch, sft.batch)
            answers = [experiment.demonstration(example) for example in examples]
            tokens = sum(len(answer.response_ids) for answer in answers)
            total = 0.0
            for part in micro_batches(answers, config.micro_batch_tokens):
                batch = TokenBatch.make(answers[part], experiment.device)
                with experiment.accelerator.autocast():
                    hidden = response_hidden(model, batch)
                weight, bias = head_of(model)
                logprobs = linear_logprobs(hidden, weight, batch.targets_N[:, None], bias=bias).logprobs_NK
                loss = -logprobs.sum() / tokens
                experiment.accelerator.backward(loss)
                total += loss.item()
            norm = apply_step(optimizer, sft.optim, step, sft.steps)
            training.log(step, nll=total, grad_norm=norm, tokens=tokens)
            recent = training.state["recent_nll"] = [*training.state["recent_nll"], total][-10:]
            if sft.stop_below and len(recent) == 10 and sum(recent) / 10 < sft.stop_below:
                training.state["stopped"] = True
        training.finish(model)
