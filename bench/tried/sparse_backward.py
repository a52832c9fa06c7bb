"""`python -m ipvrm_core.bench.tried.sparse_backward --tensors FILE --json OUT`: dh from the columns that hold mass.

In a chunk of n rows most columns of dz = dLoss/dz hold almost nothing. With the active columns a and any vector w

    dh = dz[:, a] (W[a] - 1 w^T) + error,   |error_n| <= sum over dropped v of |dz_nv| * max_v |W_v - w|,

as each row of dz sums to 0. Plain: w = 0; centred: w = the mean row of W. Measured on h and W rounded to bfloat16 and
then taken as exact: active columns and errors against float64, beside those of the dense product of dz in bfloat16, for
four rules and for entries chosen row by row; and whole steps (logits, row work, gradients) with the rule `mass` and the
largest tolerance whose centred error (certified: its bound) is below bfloat16's error.

FILE holds {"hidden" [N, D], "weight" [V, D], "tokens" [N]} of real text; --model and --text make it with transformers.
Shape letters: N rows, n rows of a chunk, D hidden size, V vocabulary, A active columns, M entries.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ipvrm_core import PolicyBatch, PolicyLossConfig, select_candidates
from ipvrm_core.bench.device import Meter, measure
from ipvrm_core.bench.inputs import random_batch
from ipvrm_core.bench.machine import environment
from ipvrm_core.bench.measure import interleaved
from ipvrm_core.fused.distrl_loss import distrl_loss_over_logits, pack_batch, pack_config
from ipvrm_core.fused.head import HeadGradients, RowGradient
from ipvrm_core.fused.rows import row_work
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.types import METRICS

TOLERANCES = [2.0**-k for k in (6, 7, 8, 9, 10, 11, 13, 16)]


def read_text(args: argparse.Namespace) -> dict[str, Tensor]:
    """Hidden states of the answers (keys `question` and `answer` of the JSON lines), after the chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dense = {"gguf_file": args.gguf, "quantization_config": GgufConfig(dequantize=True)} if args.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **dense).eval()
    hidden, tokens, rows = [], [], map(json.loads, args.text.read_text().splitlines())
    while len(tokens) < args.rows:
        row = next(rows)
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer(row["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        states_LD = model.get_decoder()(torch.tensor([prompt + answer]), use_cache=False).last_hidden_state[0]
        hidden.append(states_LD[len(prompt) - 1 : -1])
        tokens += answer
    weight_VD = model.get_output_embeddings().weight.detach()
    return {"hidden": torch.cat(hidden).bfloat16(), "weight": weight_VD.bfloat16(), "tokens": torch.tensor(tokens)}


def make_batch(h_ND: Tensor, W_VD: Tensor, tokens_N: Tensor, args) -> PolicyBatch:
    """Normal advantages, candidates at P_min 0.1, an old policy 0.02 nats away."""
    if args.sampled == "model":
        torch.manual_seed(0)
        tokens_N = torch.multinomial(((h_ND @ W_VD.t()).float() / args.temperature).softmax(-1), 1)[:, 0]
    old = select_candidates(h_ND, W_VD, tokens_N, temperature=args.temperature)
    weights_N = torch.full_like(old.entropy_N, 1 / len(tokens_N))
    rng = torch.Generator(h_ND.device).manual_seed(0)
    return random_batch(old.ids_NS, old.logprobs_NS, rng, noise=0.02, weights_N=weights_N)


def by_mass(mass_V: Tensor, tolerance: float) -> Tensor:
    """Ids [A] that stay when the smallest columns go that together hold at most this share. Waits for a GPU."""
    mass, order = mass_V.sort()
    return order[(mass.cumsum(0) <= tolerance * mass_V.sum()).sum() :].sort().values


RULES = {  # of |dz| [n, V], p [n, V] (1 at the ids of the loss) and the tolerance
    "p": lambda size, p, t: (p >= t).any(0).nonzero()[:, 0],
    "row": lambda size, p, t: (size >= t * size.amax(1, keepdim=True)).any(0).nonzero()[:, 0],
    "chunk": lambda size, p, t: (size.amax(0) >= t * size.max()).nonzero()[:, 0],
    "mass": lambda size, p, t: by_mass(size.sum(0), t),
}


def relative(error: Tensor, exact: Tensor) -> dict[str, float]:
    """Of Frobenius norms, and over the rows (those without a gradient left out)."""
    rows_n = (error.norm(dim=1) / exact.norm(dim=1))[exact.norm(dim=1) > 0].float()
    result = {"all": error.norm() / exact.norm(), "row_median": rows_n.median(), "row_p99": rows_n.quantile(0.99)}
    return {name: value.item() for name, value in result.items()}


def errors(h_ND: Tensor, W_VD: Tensor, batch: PolicyBatch, args) -> Iterator[dict]:
    """bfloat16; then entries row by row; then every chunk size, rule and tolerance."""
    h_ND, W_VD, config = h_ND.double(), W_VD.double(), PolicyLossConfig(temperature=args.temperature)
    dz_NV = h_ND @ W_VD.t()
    p_NV = (dz_NV / args.temperature).float().softmax(-1).scatter_(1, batch.ids_NS.clamp(min=0), 1.0)
    distrl_loss_over_logits(dz_NV, pack_batch(batch), pack_config(config), 1 << 30, False)  # logits become dz
    dh_ND, dW_VD, mean_D = dz_NV @ W_VD, dz_NV.t() @ h_ND, W_VD.mean(0)
    most = {"plain": W_VD.norm(dim=1).max(), "centred": (W_VD - mean_D).norm(dim=1).max()}

    def found(product_ND: Tensor, kept_N: Tensor, dropped_N: Tensor) -> dict:
        each = {"plain": product_ND - dh_ND, "centred": product_ND - kept_N[:, None] * mean_D - dh_ND}
        bounds = {name: (dropped_N.norm() * most[name] / dh_ND.norm()).item() for name in most}
        return {name: relative(error, dh_ND) | {"bound": bounds[name]} for name, error in each.items()}

    rounded_NV = dz_NV.bfloat16().double()
    dW = relative(rounded_NV.t() @ h_ND - dW_VD, dW_VD)
    yield {"rule": "bf16", "dh": relative(rounded_NV @ W_VD - dh_ND, dh_ND), "dW": dW}
    for threshold in (2.0**-k * dz_NV.abs().max().item() for k in (9, 11, 13, 16, 18, 20)):
        kept_NV = rounded_NV.copy_(dz_NV).mul_(dz_NV.abs() >= threshold)
        entries_N, dropped_N = (kept_NV != 0).sum(1).double(), dz_NV.abs().sum(1) - kept_NV.abs().sum(1)
        row = {"rule": "entries", "tolerance": threshold, "entries": [entries_N.mean().item(), entries_N.max().item()]}
        yield row | found(kept_NV @ W_VD, kept_NV.sum(1), dropped_N)
    for n, rule, tolerance in product(args.chunks, RULES, TOLERANCES):
        product_ND, kept_VD, kept_N, dropped_N = (torch.zeros_like(x) for x in (dh_ND, dW_VD, h_ND[:, 0], h_ND[:, 0]))
        shares = []
        for rows in (slice(start, start + n) for start in range(0, len(dz_NV), n)):
            size_nV = dz_NV[rows].abs()
            active_A = RULES[rule](size_nV, p_NV[rows], tolerance)
            dz_nA = dz_NV[rows].index_select(1, active_A)
            product_ND[rows], kept_N[rows] = dz_nA @ W_VD[active_A], dz_nA.sum(1)
            dropped_N[rows] = size_nV.sum(1) - dz_nA.abs().sum(1)
            kept_VD.index_add_(0, active_A, dz_nA.t() @ h_ND[rows])
            shares.append(len(active_A) / len(W_VD))
        lost = (kept_VD == 0).all(1).double().mean().item()
        active = [min(shares), sorted(shares)[len(shares) // 2], max(shares)]
        row = {"rule": rule, "n": n, "tolerance": tolerance, "active": active, "dW rows lost": lost}
        yield row | {"dW": relative(kept_VD - dW_VD, dW_VD), **found(product_ND, kept_N, dropped_N)}


class Columns(HeadGradients):
    """The centred product with the active columns. `tolerance` and `mean_D` are set by the caller."""

    def add(self, rows: slice, dx_nV: Tensor) -> None:
        active_A = by_mass(torch.linalg.vector_norm(dx_nV, 1, 0, dtype=torch.float32), self.tolerance)
        dx_nA = dx_nV.index_select(1, active_A)
        product_nD = dx_nA @ self.head.weight.index_select(0, active_A)
        self.hidden[rows] = product_nD.addr_(dx_nA.sum(1), self.mean_D, alpha=-1)
        if self.weight is not None:
            self.weight.index_add_(0, active_A, (dx_nA.t() @ self.head.hidden_rows(rows)).to(self.weight.dtype))


class Entries(HeadGradients):
    """Every row's own entries, as bags of rows of W. A frozen head only."""

    def add(self, rows: slice, gradient: RowGradient) -> None:
        dx_nV = gradient.values_nV
        row_M, column_M = (dx_nV.abs() >= self.tolerance).nonzero(as_tuple=True)
        starts_n = torch.searchsorted(row_M, torch.arange(len(dx_nV), device=row_M.device))
        dx_M, sums_n = dx_nV[row_M, column_M], dx_nV.new_zeros(len(dx_nV))
        product_nD = torch.nn.functional.embedding_bag(
            column_M, self.head.weight, starts_n, mode="sum", per_sample_weights=dx_M
        )
        self.hidden[rows] = product_nD.addr_(sums_n.index_add_(0, row_M, dx_M), self.mean_D, alpha=-1)


def step(kind: type[HeadGradients], trained: bool, tolerance: float | None, n: int, problem: tuple, T: float) -> Tensor:
    """dh; all rows, n at a time. tolerance None: logits and row work alone."""
    h_ND, W_VD, mean_D, batch = problem
    work = row_work(h_ND.is_cuda, h_ND, W_VD, None, LogitTransform(T), 1 << 36)
    work.head.n, gradients = n, kind(work.head, [True, trained, False])
    gradients.tolerance, gradients.mean_D = tolerance, mean_D
    for rows, x_nV in work.head.chunks():
        target_nV = gradients.target(rows, x_nV)
        metrics_nM = x_nV.new_empty(len(x_nV), len(METRICS))
        gradient = work.policy(rows, x_nV, target_nV, batch, PolicyLossConfig(temperature=T), metrics_nM)
        if tolerance is not None:
            gradients.add(rows, gradient)
    return gradients.hidden


def times(h_ND: Tensor, W_VD: Tensor, batch: PolicyBatch, found: list[dict], args) -> Iterator[dict]:
    """Steps over max(n, 512) rows: seconds in float32 on a CPU, milliseconds in bfloat16 on a GPU."""
    mean_D = W_VD.float().mean(0).to(W_VD.dtype)

    def largest(rule: str, what: str, n: int) -> float:
        rows = (row for row in found if row["rule"] == rule and row.get("n", n) == n)
        return max((row["tolerance"] for row in rows if row["centred"][what] < found[0]["dh"]["all"]), default=0.0)

    for n in args.chunks:
        kinds = {"entries, frozen": (Entries, False, largest("entries", "all", n))}
        for head, trained in (("frozen", False), ("trained", True)):
            kinds[f"dense, {head}"] = HeadGradients, trained, 0.0
            kinds[f"columns, {head}"] = Columns, trained, largest("mass", "all", n)
            kinds[f"certified, {head}"] = Columns, trained, largest("mass", "bound", n)
        problem = h_ND[: max(n, 512)], W_VD, mean_D, batch.rows(slice(0, max(n, 512)))
        steps = {name: partial(step, *kind, n, problem, args.temperature) for name, kind in kinds.items()}
        dense_nD = steps["dense, frozen"]()
        from_dense = {name: relative(run() - dense_nD, dense_nD)["all"] for name, run in steps.items()}
        steps["no product"] = partial(step, HeadGradients, False, None, n, problem, args.temperature)
        if h_ND.is_cuda:
            timings = measure(Meter(h_ND.device), steps, seconds=20.0)
        else:
            timings = {name: timing._asdict() for name, timing in interleaved(steps, args.rounds).items()}
        tolerances = {name: kind[2] for name, kind in kinds.items()}
        yield {"n": n, "tolerances": tolerances, "from dense": from_dense, "times": timings}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tensors", type=Path, required=True, help="read, or written where a model is given")
    for name, kind in {"model": str, "gguf": str, "text": Path}.items():
        parser.add_argument(f"--{name}", type=kind)
    for name, default in {"rows": 2048, "temperature": 1.0, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256, 704, 2048])
    parser.add_argument("--sampled", choices=("model", "text"), default="model", help="who chose the sampled tokens")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.model:
        torch.save(read_text(args), args.tensors)
    saved = {name: tensor.to(device) for name, tensor in torch.load(args.tensors).items()}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    h_ND, W_VD = saved["hidden"][: args.rows].bfloat16().to(dtype), saved["weight"].bfloat16().to(dtype)
    batch = make_batch(h_ND, W_VD, saved["tokens"][: args.rows], args)
    report = {"arguments": {name: str(value) for name, value in vars(args).items()}, "V, D": list(W_VD.shape)}
    report |= {"candidates": (batch.ids_NS[:, 1:] >= 0).sum(1).float().mean().item()}
    report |= {"nll": -batch.old_logprobs_NS[:, 0].mean().item(), "environment": environment(device)}
    report["errors"] = list(errors(h_ND, W_VD, batch, args))
    report["times"] = list(times(h_ND, W_VD, batch, report["errors"], args))
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
