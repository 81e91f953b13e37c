"""Trains a lab expert: in go base, encoder and train split, out comes a folder like `evaluation_mmer/lab/image`.

    python benchmarks/lab/train.py --expert image --steps 3000 --out runs/image

The adapter (LoRA on every linear of the LLM), the connector and the rows of added tokens learn; encoder and base stay
frozen. With `--full` the linears themselves learn from the base's values, in place of an adapter; norms and embeddings
stay. The best checkpoint on the validation split is kept in OUT: connector.safetensors, expert.json (the run, with its
curve), and adapter_config.json, adapter_model.safetensors or linears.safetensors. The test split is never looked at.
See README.md.
"""

import argparse
import json
import math
import random
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sequences import Batch, Features, answer_logits, media_token, projector_of, shared_prefix
from torch import nn
from transformers import AutoProcessor, PreTrainedModel

from evaluation_mmer.lab.datasets import ANSWERS, QUESTIONS, load_items
from evaluation_mmer.lab.experts import ADAPTER_FILES, build_base, build_encoder
from evaluation_mmer.lab.layouts import LAYOUTS
from evaluation_mmer.lab.towers import new_connector, write_tower

FULL_FILE = "linears.safetensors"
LINEARS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", choices=sorted(LAYOUTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end earlier, the learning rate decayed by then"
    )
    parser.add_argument(
        "--start-from", type=Path, help="folder of an earlier run or a stored expert: what fits of it is gone on from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="all linears of the LLM learn, and no adapter")
    parser.add_argument(
        "--lr", type=float, help="of adapter (default 5e-4) or linears (default 1e-4); the connector's is twice that"
    )
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--validation-items", type=int, default=256)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    options.lr = options.lr or (1e-4 if options.full else 5e-4)
    return options


class Trainee:
    """The expert being trained: a stock model with a frozen encoder, and around its LLM an adapter, or none."""

    def __init__(self, options: argparse.Namespace) -> None:
        name, start = options.expert, options.start_from
        base, encoder = build_base(), build_encoder(name)
        connector = new_connector(name, base, encoder, options.seed)
        if start:
            earlier = load_file(start / "connector.safetensors")
            fitting = {k: v.float() for k, v in earlier.items() if k in connector and v.shape == connector[k].shape}
            print(f"from {start}: {sorted(fitting)}; new: {sorted(set(connector) - set(fitting))}", flush=True)
            connector |= fitting
        self.precision: torch.dtype = getattr(torch, options.precision)
        with tempfile.TemporaryDirectory() as tower:
            write_tower(name, base, encoder, connector, Path(tower))
            self.processor: Any = AutoProcessor.from_pretrained(tower)
            self.model: PreTrainedModel = LAYOUTS[name].model.from_pretrained(
                tower,
                dtype=self.precision,
                attn_implementation="eager",  # whose backward is faster than sdpa's on short sequences
            )
        self.model.requires_grad_(False)
        self.model.get_submodule(f"model.{LAYOUTS[name].encoder}").float()  # features as a float32 expert has them
        self.projector = projector_of(self.model).float()
        # what a layout's connector holds besides its projector (LLaVA-OneVision's newline)
        self.others = {
            key: nn.Parameter(connector[key].float())
            for key in LAYOUTS[name].shapes(1, 1)
            if not key.startswith(f"{LAYOUTS[name].projector}.")
        }
        for key, value in self.others.items():
            setattr(self.model.get_submodule("model"), key, value)
        self.prefix = LAYOUTS[name].projector
        self.added = nn.Parameter(connector["added_embeddings"])
        self.linears = linears_of(self.model) if options.full else {}
        for linear in self.linears.values():
            linear.float().requires_grad_(True)
        self.peft = None if options.full else self.adapted(options.rank, start)
        self.projector.requires_grad_(True)

    def adapted(self, rank: int, start: Path | None) -> PeftModel:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, bias="none")
        peft = get_peft_model(self.model, config)
        if start:
            found = set_peft_model_state_dict(peft, load_file(start / "adapter_model.safetensors"))
            lost = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
            if lost:
                raise SystemExit(f"{start}: {len(lost)} tensors of its adapter do not fit, such as {lost[0]}")
        return peft

    def logits(self, prefix: torch.Tensor, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return answer_logits(self.model, self.added, prefix, batch).float()

    def groups(self, lr: float) -> list[dict[str, Any]]:
        inside = [linear.weight for linear in self.linears.values()]
        if self.peft is not None:
            inside = [value for name, value in self.peft.named_parameters() if "lora_" in name]
        connector = [*self.projector.parameters(), *self.others.values(), self.added]
        return [{"params": inside, "lr": lr}, {"params": connector, "lr": 2 * lr}]

    def save(self, out: Path) -> None:
        """What ships, in bf16."""
        out.mkdir(parents=True, exist_ok=True)
        connector = {f"{self.prefix}.{key}": value for key, value in self.projector.state_dict().items()}
        connector.update(self.others, added_embeddings=self.added)
        save_half(connector, out / "connector.safetensors")
        if self.peft is None:
            save_half({f"{key}.weight": linear.weight for key, linear in self.linears.items()}, out / FULL_FILE)
        else:
            save_half(get_peft_model_state_dict(self.peft, save_embedding_layers=False), out / ADAPTER_FILES[1])


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The LLM's linears under the names of the base's own class."""
    found = {name: module for name, module in model.named_modules() if re.fullmatch(LINEARS, name)}
    return {name.replace("language_model.", ""): linear for name, linear in found.items()}


def save_half(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    half = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in sorted(tensors.items())}
    save_file(half, path, {"format": "pt"})


def validate(trainee: Trainee, features: Features, prefix: torch.Tensor) -> float:
    """Share of items of which every answer token is the most likely one: what greedy generation would get right."""
    right = 0
    trainee.model.eval()
    with torch.no_grad():
        for start in range(0, len(features), 16):
            rows = range(start, min(start + 16, len(features)))
            batch = features.batch(rows, len(prefix))
            hits = trainee.logits(prefix, batch).argmax(-1) == batch.targets[batch.targets >= 0]
            owners = (batch.targets >= 0).nonzero()[:, 0]
            right += len(rows) - len(owners[~hits].unique())
    trainee.model.train()
    return right / len(features)


def rate(done: float) -> float:
    """Factor of the learning rates when `done` of the run is over: linear for 3 %, then a cosine down to 2 %."""
    if done < 0.03:
        return max(done / 0.03, 0.02)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, (done - 0.03) / 0.97)))


def order(count: int, draws: int, seed: int) -> list[int]:
    """Item numbers for the whole run: permutation after permutation."""
    generator = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < draws:
        epoch = list(range(count))
        if drawn:  # items come shuffled: the first pass takes them in order, so that features are computed in chunks
            generator.shuffle(epoch)
        drawn += epoch
    return drawn[:draws]


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    trainee = Trainee(options)
    media_id = media_token(trainee.model)
    wanted = options.steps * options.batch
    items = load_items(options.expert, "train", seed=options.seed)[:wanted]
    held = load_items(options.expert, "validation")[: options.validation_items]
    train = Features(trainee.model, trainee.processor, items, media_id)
    validation = Features(trainee.model, trainee.processor, held, media_id)
    prefix = torch.tensor(shared_prefix(train[0][0], min(added_ids(options.expert, trainee.processor))))
    groups = trainee.groups(options.lr)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    drawn = order(len(items), wanted, options.seed)
    trainable = [value for group in groups for value in group["params"]]
    print(f"{sum(value.numel() for value in trainable):,} trainable of {len(items)} items", flush=True)

    curve: list[dict[str, float]] = []
    best, began, losses = -1.0, time.perf_counter(), []
    trainee.model.train()
    for step in range(1, options.steps + 1):
        done = max(step / options.steps, (time.perf_counter() - began) / 60 / options.minutes)
        for group, peak in zip(optimiser.param_groups, (options.lr, 2 * options.lr)):
            group["lr"] = peak * rate(done)
        batch = train.batch(drawn[(step - 1) * options.batch : step * options.batch], len(prefix))
        loss = nn.functional.cross_entropy(trainee.logits(prefix, batch), batch.targets[batch.targets >= 0])
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % options.validate_every == 0 or step == options.steps or done >= 1:
            accuracy = validate(trainee, validation, prefix)
            seconds = time.perf_counter() - began
            point = {"step": step, "loss": sum(losses) / len(losses), "validation": accuracy, "seconds": seconds}
            curve.append({key: round(value, 4) for key, value in point.items()})
            print(json.dumps(curve[-1]), flush=True)
            losses = []
            if accuracy >= best:
                best = accuracy
                write_out(options, trainee, curve, len(held))
        if done >= 1:
            break


def added_ids(name: str, processor: Any) -> list[int]:
    return processor.tokenizer.convert_tokens_to_ids(list(LAYOUTS[name].added_tokens))


def write_out(options: argparse.Namespace, trainee: Trainee, curve: list[dict[str, float]], held: int) -> None:
    trainee.save(options.out)
    if trainee.peft is not None:
        adapter = trainee.peft.peft_config["default"].to_dict()
        adapter.update(
            base_model_name_or_path=f"mmer-lab-{options.expert}", inference_mode=True, target_modules=LINEARS
        )
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.items()}
        (options.out / ADAPTER_FILES[0]).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
    kind = "full" if options.full else "rank"
    training = {key: getattr(options, key) for key in ("steps", "seed", "batch", kind, "lr", "precision")}
    if options.minutes < math.inf:
        training["minutes"] = options.minutes
    if options.start_from:
        training["after"] = json.loads((options.start_from / "expert.json").read_text())["training"]
    facts = {
        "name": options.expert,
        "question": QUESTIONS[options.expert],
        "answers": list(ANSWERS[options.expert]),
        "training": training,
        "validation_items": held,
        "best": curve[-1],
    }
    (options.out / "curve.json").write_text(json.dumps(curve, indent=2) + "\n")
    (options.out / "expert.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
