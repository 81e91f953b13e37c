"""How fast the routed model is and how much memory it takes, beside plain transformers.

    python benchmarks/inference.py --subject lab                # SmolLM2-135M-Instruct and the lab's five experts
    python benchmarks/inference.py --subject 1b                 # a random llama of 1.04 B parameters, four experts
    python benchmarks/inference.py --subject 1b --only decode prefill --batch 1 --prompt 512
    python benchmarks/inference.py --subject lab --profile      # where the time of a decoding step goes

`decode`, `prefill` and `first token` run in this process, ours and plain in turn (decode: a step of each in turn),
each round starting with another, after one run of each that is not counted; `load` runs in fresh processes, with the
files in the page cache. Ratios, ours over plain, are taken round by round: of rates (tokens a second, more is better),
of seconds, bytes, and seconds a gigabyte. *plain* is the base by its stock class, or the first expert by its own
(`original`), of which the random subjects have the base's tensors; beside it stands what is aimed at. A kept route's
weights are made beforehand, a packed one's in the forward. `growth` repeats decode, packed prefill, memory and load on
random models of the subject's shape with ever more experts. `memory` counts the language models alone, `load` all that
is loaded. `--clock cpu` counts the processor's seconds of this process, for a machine that others use.
"""

import argparse
import cProfile
import dataclasses
import gc
import os
import pstats
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inference_memory import load, memory
from inference_rows import (
    CLOCKS,
    Way,
    decode_rates,
    first_token,
    generated,
    in_turn,
    keep,
    now,
    prefill_rate,
    rotated,
    row,
    rows,
    show,
    synchronise,
    use_clock,
)
from inference_subjects import LAB, Subject, lab, lab_folders, lengthened, random_folders, random_subject
from merge_speed import machine
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

SECTIONS = ("decode", "prefill", "first token", "memory", "load", "growth")
SUBJECTS = ("lab", "1b", "tiny")
EXPERTS = 4  # of a random subject
PROMPT = 64  # tokens in front of what is decoded as text
DEFAULTS: dict[str, dict[str, Any]] = {  # `tokens`: prompts of more, over the batch, are left out unless asked for
    "lab": dict(new=32, prompt=[128, 512, 1024], batch=[1, 8], tokens=4096),
    "1b": dict(new=12, prompt=[128, 512, 1024], batch=[1, 8], tokens=1024),
    "tiny": dict(new=4, prompt=[16], batch=[1, 2], tokens=64),
}


@dataclass
class Setting:
    subject: str
    rounds: int
    new: int
    batch: list[int]
    prompt: list[int]
    tokens: int
    dtype: torch.dtype
    device: str
    folder: Path
    clock: str = "wall"


# the sections


def decode(subject: Subject, setting: Setting, kinds: Iterable[str] = ("base", "one", "merged")) -> Iterator[dict]:
    """The same tokens on the base route, by our model and the base's: SystemExit where they differ."""
    base, ours, original = subject.base, subject.ours, subject.original
    ours.keep_routes([])
    for batch in setting.batch:
        text = subject.text(batch, PROMPT)
        if "base" in kinds:
            words = [generated(model, text, setting.new)[0].tokens[1:] for model in (base, ours)]
            if not all(map(torch.equal, *words)):
                raise SystemExit("the base route wrote other tokens than the base")
        for kind in kinds:
            inputs = {"base": lambda: text, "one": lambda: subject.prompt(batch)}.get(kind)
            made = inputs() if inputs else subject.mixed(batch) if subject.mixed else None
            if made is None:
                continue
            plain = subject.text(batch, made["input_ids"].shape[1])
            runs = {"ours": (ours, made), "base": (base, plain)}
            if kind == "one":
                runs["original"] = original, subject.original_prompt(batch)
            names = {"base": "text", "one": f"{subject.experts[0]}, text", "merged": "several media, text"}
            way = Way("decode", names[kind], "", "tokens/s", len(subject.experts), batch, plain["input_ids"].shape[1])
            aims = {"base": "≥ 0.97"}
            yield from rows(way, rotated(lambda turned: decode_rates(turned, setting.new), runs, setting.rounds), aims)


def prefill(subject: Subject, setting: Setting, states: Iterable[str] = ("base", "kept", "packed")) -> Iterator[dict]:
    ours, expert, plain = subject.ours, subject.experts[0], subject.original_llm
    for state in states:
        ours.keep_routes([expert] if state == "kept" else [])
        route = "base" if state == "base" else expert
        for batch in setting.batch:
            for length in setting.prompt:
                if batch * length > setting.tokens:
                    continue
                inputs = subject.text(batch, length)
                found = in_turn(
                    {
                        "ours": lambda: prefill_rate(ours, inputs, text_route=route),
                        "original": lambda: prefill_rate(subject.base if route == "base" else plain, inputs),
                    },
                    setting.rounds,
                )
                against = "base" if route == "base" else "original"
                aim = {"kept": "≥ 0.95", "packed": "≥ 0.6" if length >= 512 else "", "base": ""}[state]
                way = Way("prefill", state, against, "tokens/s", len(subject.experts), batch, length, aim)
                yield row(way, found["ours"], found["original"])
    ours.keep_routes([])


def first_tokens(subject: Subject, setting: Setting) -> Iterator[dict]:
    """A picture, a sound and text, on three routes, against the same encoders and a prefill of as many tokens."""
    if subject.mixed is None:
        return
    ours, base, routes = subject.ours, subject.base, ["image", "audio", "merged"]
    prompts = [subject.mixed(1)]
    prompts += [lengthened(prompts[0], subject.text(1, length)) for length in setting.prompt if length >= 512]
    for inputs in prompts:
        plain = subject.text(1, inputs["input_ids"].shape[1])

        def sum_of_parts() -> float:
            with torch.no_grad():
                synchronise(ours)
                started = now()
                ours.model.embed_media(inputs["input_ids"], ours.model.media_inputs(dict(inputs)))
                synchronise(ours)
            return now() - started + first_token(base, plain)

        for state in ("kept", "packed"):

            def whole() -> float:
                ours.keep_routes(routes if state == "kept" else [])
                return first_token(ours, inputs)

            found = in_turn({"ours": whole, "plain": sum_of_parts}, setting.rounds)
            way = Way("first token", f"picture, sound and text, {state}", "sum of the plain parts", "seconds",
                      len(subject.experts), 1, plain["input_ids"].shape[1])  # fmt: skip
            yield row(way, found["ours"], found["plain"])
    ours.keep_routes([])


def growth(setting: Setting, experts: list[int]) -> Iterator[dict]:
    shape = LAB if setting.subject == "lab" else setting.subject
    small = dataclasses.replace(setting, batch=[1], prompt=[length for length in setting.prompt if length <= 512][-1:])
    for number in experts:
        subject = random_subject(shape, number, setting.dtype, setting.device)
        found = [*decode(subject, small, ["one"]), *prefill(subject, small, ["packed"])]
        found += memory(subject.base, subject.ours)
        del subject
        gc.collect()
        found += from_disk(shape, number, small)
        yield from ({**entry, "what": f"{entry['section']}: {entry['what']}", "section": "growth"} for entry in found)


def from_disk(shape: str, number: int, setting: Setting) -> list[dict]:
    base, merged = random_folders(shape, number, setting.folder)
    gc.collect()
    found = list(load(base, merged, setting.rounds, setting.folder / "modules", setting.clock))
    shutil.rmtree(merged.parent)
    return found


# where a step's time goes


def profile(subject: Subject, setting: Setting):
    """Python's calls and torch's operators of a decoding step, by their own time: our first expert's, and the base."""
    prompt = subject.prompt(1)
    sides = {"ours": (subject.ours, prompt), "base": (subject.base, subject.text(1, prompt["input_ids"].shape[1]))}
    for name, (model, inputs) in sides.items():
        rates = rotated(lambda one: decode_rates(one, setting.new), {name: (model, inputs)}, setting.rounds)[name]
        print(f"\n{name}: {1e3 / statistics.median(rates):.2f} ms a step; calls of {setting.new + 1} steps in all")
        calls = cProfile.Profile()
        calls.runcall(generated, model, inputs, setting.new + 1)
        pstats.Stats(calls).strip_dirs().sort_stats("tottime").print_stats(25)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operators:
            generated(model, inputs, setting.new + 1)
        print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


def measured(setting: Setting, only: list[str], experts: list[int]) -> Iterator[dict]:
    subject = None
    if {"decode", "prefill", "first token", "memory"} & set(only):
        subject = made(setting)
        sections = {"decode": decode, "prefill": prefill, "first token": first_tokens}
        for name, section in sections.items():
            if name in only:
                yield from section(subject, setting)
        if "memory" in only:
            yield from memory(subject.base, subject.ours)
    del subject
    gc.collect()
    if "load" in only:
        if setting.subject == "lab":
            yield from load(*lab_folders(setting.folder), setting.rounds, setting.folder / "modules", setting.clock)
        else:
            yield from from_disk(setting.subject, EXPERTS, setting)
    if "growth" in only:
        yield from growth(setting, experts)


def made(setting: Setting) -> Subject:
    if setting.subject == "lab":
        return lab(setting.folder, setting.dtype, setting.device)
    return random_subject(setting.subject, EXPERTS, setting.dtype, setting.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", default="lab", choices=SUBJECTS, help="(default: lab)")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--batch", nargs="+", type=int, help="(default: 1 8)")
    parser.add_argument("--prompt", nargs="+", type=int, help="tokens of the prefills (default: 128 512 1024)")
    parser.add_argument("--new", type=int, help="tokens of a decoding (default: 32; of 1b 12)")
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 2, 4, 8], help="of growth (default: 1 2 4 8)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: this process's own seconds, on a machine of many"
    )
    parser.add_argument("--folder", type=Path, help="where models are made, the lab's kept (default: a temporary one)")
    parser.add_argument("--profile", action="store_true", help="only print where the time of a decoding step goes")
    parser.add_argument("--json", type=Path, help="put the rows into this file, in place of older ones of their kind")
    arguments = parser.parse_args()
    usual = dict(DEFAULTS[arguments.subject])
    if arguments.batch or arguments.prompt:
        usual["tokens"] = sys.maxsize
    for name in ("batch", "prompt", "new"):
        usual[name] = getattr(arguments, name) or usual[name]
    if min(arguments.rounds, usual["new"], *usual["batch"], *usual["prompt"], *arguments.experts) < 1:
        parser.error("--rounds, --new, --batch, --prompt and --experts: expected 1 or more")
    if arguments.clock == "cpu" and arguments.device != "cpu":
        parser.error(f"--clock cpu counts no work of {arguments.device}: leave it out")
    use_clock(arguments.clock)
    disable_progress_bar()
    where = {**machine(), "threads": torch.get_num_threads(), "device": arguments.device}
    if arguments.device != "cpu":
        where["device"] = torch.cuda.get_device_name(arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.path.abspath(arguments.folder or temporary))
        folder.mkdir(parents=True, exist_ok=True)
        dtype = getattr(torch, arguments.dtype)
        setting = Setting(
            arguments.subject,
            arguments.rounds,
            **usual,
            dtype=dtype,
            device=arguments.device,
            folder=folder,
            clock=arguments.clock,
        )
        if arguments.profile:
            profile(made(setting), setting)
            return
        found = []
        for entry in measured(setting, arguments.only, arguments.experts):
            found.append({"subject": arguments.subject, "dtype": arguments.dtype, "clock": arguments.clock, **entry})
            if arguments.json:
                keep(arguments.json, {"machine": where, "rows": found})
    Console(width=180).print(show(found))


if __name__ == "__main__":
    main()
