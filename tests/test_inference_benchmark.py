"""The benchmark of speed and memory, on a tiny model: every row is there, and all of them are numbers that can be."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import inference  # noqa: E402
import inference_rows  # noqa: E402
from inference_memory import memory, stored_bytes  # noqa: E402
from inference_subjects import random_models  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "inference.py"), "--subject", "tiny", "--rounds", "1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


EXPECTED = {
    *(("decode", what, of, 4, batch) for batch in (1, 2) for what, of in (
        ("text", "base"), ("image, text", "base"), ("image, text", "original"), ("several media, text", "base"))),
    *(("prefill", state, "base" if state == "base" else "original", 4, batch)
      for batch in (1, 2) for state in ("base", "kept", "packed")),
    *(("first token", f"picture, sound and text, {state}", "sum of the plain parts", 4, 1)
      for state in ("kept", "packed")),
    *(("memory", what, "base and originals", 4, None) for what in ("packed", "1 kept", "2 kept")),
    *(("load", what, "base", 4, None) for what in ("load", "load, per byte")),
    *(("load", f"{what}, {state}, with encoders", "base × (1 + experts)", 4, None)
      for what in ("RssAnon", "resident") for state in ("packed", "1 kept", "2 kept")),
}  # fmt: skip


def test_every_row_is_there(tmp_path):
    file = tmp_path / "inference.json"
    done = run("--only", "decode", "prefill", "first token", "memory", "load", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    rows = found["rows"]
    keys = [tuple(row[name] for name in ("section", "what", "against", "experts", "batch")) for row in rows]
    assert sorted(map(str, keys)) == sorted(map(str, EXPECTED))
    for row in rows:
        for side in ("ours", "plain", "ratio"):
            median, least, largest = row[side]
            assert all(math.isfinite(value) for value in row[side])
            assert 0 < least <= median <= largest
        assert row["ratio"][0] == pytest.approx(row["ours"][0] / row["plain"][0])  # of one round
        assert row["dtype"] == "float32" and row["rounds"] == 1
    assert {"processor", "cores", "torch", "transformers", "threads", "device"} <= set(found["machine"])
    assert "several media" in done.stdout


def test_growth_repeats_the_sections_for_each_number_of_experts(monkeypatch, tmp_path):
    asked = []

    def from_disk(shape: str, number: int, setting: inference.Setting) -> list[dict]:
        asked.append((shape, number, setting.batch, setting.prompt))
        return [inference_rows.row(inference_rows.Way("load", "load", "base", "seconds", number), [1.0], [2.0])]

    monkeypatch.setattr(inference, "from_disk", from_disk)  # what it does is tested above, in processes of its own
    setting = inference.Setting("tiny", 1, 2, [1, 2], [8, 16, 1024], 64, torch.float32, "cpu", tmp_path)
    rows = list(inference.growth(setting, [1, 2]))
    assert asked == [("tiny", 1, [1], [16]), ("tiny", 2, [1], [16])]
    once = [
        ("decode: image, text", "base"), ("decode: image, text", "original"), ("prefill: packed", "original"),
        ("memory: packed", "base and originals"), ("memory: 1 kept", "base and originals"),
    ]  # fmt: skip
    second = [*once, ("memory: 2 kept", "base and originals"), ("load: load", "base")]
    expected = [(1, *key) for key in (*once, ("load: load", "base"))] + [(2, *key) for key in second]
    assert [(row["experts"], row["what"], row["against"]) for row in rows] == expected
    assert all(row["section"] == "growth" and math.isfinite(row["ratio"][0]) for row in rows)


def test_nothing_to_run_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", "--rounds", "0"])
    with pytest.raises(SystemExit):
        inference.main()
    assert "expected 1 or more" in capsys.readouterr().err


def test_a_ratio_is_of_two_numbers_of_one_round():
    way = inference_rows.Way("decode", "text", "base", "tokens/s", 1)
    # the medians are 2 and 2, but the ratios are 1/2, 1 and 4
    row = inference_rows.row(way, [1.0, 2.0, 8.0], [2.0, 2.0, 2.0])
    assert row["ours"] == [2.0, 1.0, 8.0] and row["plain"] == [2.0, 2.0, 2.0]
    assert row["ratio"] == [1.0, 0.5, 4.0]


def test_rounds_alternate_after_a_warm_up():
    calls: list[str] = []
    runs = {name: (lambda name=name: float(calls.append(name) or len(calls))) for name in "abc"}
    found = inference_rows.in_turn(runs, 2)
    assert calls == list("abc" + "abc" + "bca")
    assert found == {"a": [4.0, 9.0], "b": [5.0, 7.0], "c": [6.0, 8.0]}


def test_the_processors_clock_leaves_pauses_out(monkeypatch):
    def seconds(name: str) -> float:
        monkeypatch.setattr(inference_rows, "_used", name)
        started = inference_rows.now()
        time.sleep(0.2)
        return inference_rows.now() - started

    assert seconds("wall") >= 0.2 > 0.1 > seconds("cpu")
    monkeypatch.setattr(sys, "argv", ["inference.py", "--clock", "cpu", "--device", "cuda"])
    with pytest.raises(SystemExit):
        inference.main()


def test_other_machines_rows_are_refused(tmp_path):
    file = tmp_path / "rows.json"
    way = inference_rows.Way("decode", "text", "base", "tokens/s", 1)
    entry = {"subject": "tiny", "dtype": "float32", "clock": "wall", **inference_rows.row(way, [1.0], [2.0])}
    inference_rows.keep(file, {"machine": {"cores": 1}, "rows": [entry]})
    later = {**entry, "ours": [3.0, 3.0, 3.0]}
    others = [{**later, "dtype": "bfloat16"}, {**later, "clock": "cpu"}]
    inference_rows.keep(file, {"machine": {"cores": 1}, "rows": [later, *others]})
    assert [row["ours"][0] for row in json.loads(file.read_text())["rows"]] == [3.0, 3.0, 3.0]
    with pytest.raises(SystemExit, match="another machine"):
        inference_rows.keep(file, {"machine": {"cores": 2}, "rows": [entry]})


def test_tied_tensors_are_counted_once():
    first, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = nn.Parameter(first.weight.detach())  # another parameter, the same numbers
    assert stored_bytes(nn.ModuleList([first, other, tied])) == 4 * (16 + 8)


def test_memory_is_the_language_models_and_what_is_kept():
    base, ours = random_models("tiny", 2, torch.float32, "cpu")
    rows = {row["what"]: row for row in memory(base, ours)}
    assert list(rows) == ["packed", "1 kept", "2 kept"]
    llm = [base.model.embed_tokens, *(m for m in base.modules() if isinstance(m, nn.Linear) and m is not base.lm_head)]
    copy = sum(module.weight.nbytes for module in llm)  # of a route
    packed, one, two = (rows[what]["ours"][0] for what in ("packed", "1 kept", "2 kept"))
    assert two - one == one - packed == copy  # the tied head holds none of its own
    # the base, and a delta as large; masks and the rest are less than either here
    whole = sum(parameter.nbytes for parameter in base.parameters())
    assert rows["packed"]["plain"][0] // 3 - whole == sum(buffer.nbytes for buffer in base.buffers())
    assert whole + copy < packed < 2 * whole + 2 * copy


def test_random_models_share_the_base_and_differ_by_route():
    base, ours = random_models("tiny", 2, torch.float32, "cpu")
    ids = torch.arange(4, 14).unsqueeze(0)
    with torch.no_grad():
        logits = base(input_ids=ids).logits
        assert torch.equal(ours(input_ids=ids).logits, logits)
        routed = ours(input_ids=ids, text_route="image").logits[..., : logits.shape[-1]]
    assert torch.isfinite(routed).all() and not torch.equal(routed, logits)
    layer = ours.model.language_model.layers[0].mlp.up_proj
    assert layer.weight.data_ptr() == base.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert ours.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
