"""The benchmark of speed and memory, on a tiny model: every row is there, and all of them are numbers that can be."""

import json
import math
import os
import subprocess
import sys
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
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


EXPECTED = {
    *(("decode", what, of, 4, batch) for batch in (1, 2) for what, of in (
        ("text", "base"), ("image, text", "base"), ("image, text", "original"), ("several media, text", "base"))),
    *(("prefill", state, "base" if state == "base" else "original", 4, batch)
      for batch in (1, 2) for state in ("base", "kept", "packed")),
    *(("first token", f"picture, sound and text, {state}", "sum of the plain parts", 4, 1)
      for state in ("kept", "packed")),
    *(("memory", what, "base and originals", 4, None) for what in ("packed", "1 kept", "2 kept")),
    *(("load", what, "base", 4, None) for what in ("load", "load, per byte")),
    *(("load", f"RssAnon, {what}, with encoders", "base × (1 + experts)", 4, None)
      for what in ("packed", "1 kept", "2 kept")),
    *(("growth", "decode: image, text", of, 2, 1) for of in ("base", "original")),
    ("growth", "prefill: packed", "original", 2, 1),
    *(("growth", f"memory: {what}", "base and originals", 2, None) for what in ("packed", "1 kept", "2 kept")),
    *(("growth", f"load: {what}", "base", 2, None) for what in ("load", "load, per byte")),
    *(("growth", f"load: RssAnon, {what}, with encoders", "base × (1 + experts)", 2, None)
      for what in ("packed", "1 kept", "2 kept")),
}  # fmt: skip


def test_every_row_is_there(tmp_path):
    file = tmp_path / "inference.json"
    done = run("--experts", "2", "--json", str(file))
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


def test_other_machines_rows_are_refused(tmp_path):
    file = tmp_path / "rows.json"
    way = inference_rows.Way("decode", "text", "base", "tokens/s", 1)
    entry = {"subject": "tiny", "dtype": "float32", **inference_rows.row(way, [1.0], [2.0])}
    inference_rows.keep(file, {"machine": {"cores": 1}, "rows": [entry]})
    later = {**entry, "ours": [3.0, 3.0, 3.0]}
    inference_rows.keep(file, {"machine": {"cores": 1}, "rows": [later, {**later, "dtype": "bfloat16"}]})
    assert [row["ours"][0] for row in json.loads(file.read_text())["rows"]] == [3.0, 3.0]
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
    assert two - one == one - packed
    assert copy <= one - packed <= copy + base.lm_head.weight.nbytes  # a tied head may hold its own
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
