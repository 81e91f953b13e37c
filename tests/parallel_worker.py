"""One of two gloo processes of `in_two_processes`: `parallel_worker.py TASK FOLDER`, as torchrun starts it."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from modeling_mmer import MMERForConditionalGeneration
from tests.tiny_models import AUDIO, IMAGE, media

ROUTES = ["auto", "base", "merged", "audio"]
PLAIN = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=3)


def prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two samples of three routes in one batch."""
    ids = torch.tensor([[10, *[IMAGE] * 4, 11, *[AUDIO] * 5, 12, 13], [*range(14, 26), 26]])
    ids[:, -2:] += seed
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media(1, 1, seed)}


def answers(model) -> dict[str, torch.Tensor]:
    """{route: logits}, and {generate <route>: tokens}."""
    found = {}
    for route in ROUTES:
        with torch.no_grad():
            found[route] = model(**prompt(), text_route=route).logits
        found[f"generate {route}"] = model.generate(**prompt(), **PLAIN, text_route=route)
    return found


def step(model, batch) -> torch.Tensor:
    loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] >= 64, -100), use_cache=False).loss
    loss.backward()
    return loss.detach()


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def tensor_parallel(folder: Path) -> dict[str, dict[str, torch.Tensor] | str]:
    """{case: answers, or the error}, of the models in the folders of `folder`: a process costs more than a model."""
    from transformers.distributed import DistributedConfig

    found: dict[str, dict[str, torch.Tensor] | str] = {}
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        config = DistributedConfig(tp_size=2)
        try:
            model = MMERForConditionalGeneration.from_pretrained(case, distributed_config=config).eval()
            sharded = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
            assert any(name.endswith("delta") for name in sharded), "no delta is sharded: shows nothing"
            found[case.name] = answers(model)
        except (RuntimeError, ValueError, IndexError) as error:  # the same on both ranks
            found[case.name] = f"{type(error).__name__}: {error}"
    return found


def ddp(folder: Path):
    model = MMERForConditionalGeneration.from_pretrained(folder).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    loss = step(wrapped, prompt(dist.get_rank()))
    return {"loss": loss, **gradients(wrapped)}


def fsdp(folder: Path):
    from torch.distributed.fsdp import fully_shard

    model = MMERForConditionalGeneration.from_pretrained(folder).train()
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss = step(model, prompt(dist.get_rank()))
    masks = {n: p.full_tensor() for n, p in model.named_parameters() if n.endswith("masks")}
    return {"loss": loss, **gradients(model), **masks}


def main():
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"tp": tensor_parallel, "ddp": ddp, "fsdp": fsdp}[task](folder)
    loss = found.get("loss")
    if loss is not None:
        dist.all_reduce(loss)
        found["loss"] = loss / 2
    torch.save(found, folder / f"{task}-{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
