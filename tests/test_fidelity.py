"""The benchmark of fidelity per bit: each formula against a slow loop, and the script on a tiny lab."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import fidelity  # noqa: E402
import fidelity_formulas as formulas  # noqa: E402
import fidelity_plot  # noqa: E402
import fidelity_questions as questions  # noqa: E402
import fidelity_ways as ways  # noqa: E402

OUT, WIDE = 5, 7


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tau, other = torch.randn(2, OUT, WIDE, generator=generator)
    tau[1, 2] = 0.0
    return tau, (0.6 * tau + 0.5 * other).bfloat16().float()


def bf16(number: float) -> float:
    return torch.tensor(number).bfloat16().item()


def fit(tau: torch.Tensor, own: torch.Tensor, row: int) -> float:
    below = sum(float(own[row, j]) ** 2 for j in range(WIDE))
    return sum(float(tau[row, j]) * float(own[row, j]) for j in range(WIDE)) / below if below else 1.0


def paper_mask(tau: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(OUT, WIDE)
    for i in range(OUT):
        for j in range(WIDE):
            t, m = float(tau[i, j]), float(merged[i, j])
            mask[i, j] = float(t * m > 0 and abs(t) >= abs(m - t))
    return mask


def test_the_fitted_mask_and_its_scales():
    tau, merged = pair()
    mask = paper_mask(tau, merged)
    before = sum(float(tau[i, j] - mask[i, j] * merged[i, j]) ** 2 for i in range(OUT) for j in range(WIDE))
    for _ in range(4):
        for i in range(OUT):
            scale = fit(tau, mask * merged, i)
            for j in range(WIDE):
                mask[i, j] = float(abs(float(tau[i, j]) - scale * float(merged[i, j])) < abs(float(tau[i, j])))
    found, scales = formulas.fitted_mask(tau, merged)
    assert torch.equal(found.float(), mask)
    assert scales.tolist() == pytest.approx([fit(tau, mask * merged, i) for i in range(OUT)], rel=1e-5)
    after = (tau - scales[:, None] * found * merged).square().sum().item()
    assert after < before


def test_row_scales_are_stored_in_16_bits():
    tau, merged = pair(1)
    expected = [[bf16(fit(tau, merged, i)) * float(merged[i, j]) for j in range(WIDE)] for i in range(OUT)]
    torch.testing.assert_close(formulas.row_scaled(tau, merged), torch.tensor(expected))


def test_lambda_by_residual():
    tau, merged = pair(2)
    found = formulas.best_lambda(tau, merged, (0.5, 1.0, 2.0))
    for value, lam in zip(found.tolist(), (0.5, 1.0, 2.0), strict=True):
        total = 0.0
        for i in range(OUT):
            on = [
                float(tau[i, j]) * float(merged[i, j]) > 0
                and abs(float(tau[i, j])) >= lam * abs(float(merged[i, j] - tau[i, j]))
                for j in range(WIDE)
            ]
            own = torch.zeros(OUT, WIDE)
            own[i] = merged[i] * torch.tensor(on)
            scale = bf16(fit(tau, own, i))
            total += sum((float(tau[i, j]) - scale * float(own[i, j])) ** 2 for j in range(WIDE))
        assert value == pytest.approx(total, rel=1e-5)


def test_row_and_column_scales():
    tau, merged = pair(3)
    rows, columns = [1.0] * OUT, [1.0] * WIDE
    t, p = tau.tolist(), merged.tolist()
    for _ in range(3):
        for i in range(OUT):
            below = sum((p[i][j] * columns[j]) ** 2 for j in range(WIDE))
            rows[i] = sum(t[i][j] * p[i][j] * columns[j] for j in range(WIDE)) / below
        for j in range(WIDE):
            below = sum((p[i][j] * rows[i]) ** 2 for i in range(OUT))
            columns[j] = sum(t[i][j] * p[i][j] * rows[i] for i in range(OUT)) / below
    expected = [[bf16(rows[i]) * bf16(columns[j]) * p[i][j] for j in range(WIDE)] for i in range(OUT)]
    # a scale near the middle of two bf16 numbers may be rounded to either
    torch.testing.assert_close(formulas.row_column_scaled(tau, merged), torch.tensor(expected), rtol=8e-3, atol=1e-6)
    least = (tau - formulas.row_scaled(tau, merged)).square().sum()
    assert (tau - formulas.row_column_scaled(tau, merged)).square().sum() < least


def test_signs_and_the_second_bit():
    tau, merged = pair(4)
    mask, expected = paper_mask(tau, merged), torch.zeros(OUT, WIDE)
    for i in range(OUT):
        scale = bf16(fit(tau, mask * merged, i))
        off = [j for j in range(WIDE) if not mask[i, j]]
        unit = bf16(sum(abs(float(tau[i, j])) for j in off) / len(off))
        for j in range(WIDE):
            sign = -1.0 if tau[i, j] < 0 else 1.0
            expected[i, j] = unit * sign if j in off else scale * float(merged[i, j])
    torch.testing.assert_close(formulas.second_bit(tau, merged), expected)
    magnitudes = formulas.row_scaled(tau, formulas.signs(tau))
    for i in range(OUT):
        unit = bf16(sum(abs(float(v)) for v in tau[i]) / WIDE)
        assert magnitudes[i].tolist() == pytest.approx([unit * (-1 if v < 0 else 1) for v in tau[i]], rel=1e-5)


def test_ternary_is_the_nearest_of_three_values():
    tau, _ = pair(5)
    found = formulas.ternary(tau)
    for i in range(OUT):
        magnitudes = [abs(float(v)) for v in tau[i]]
        unit = sum(magnitudes) / WIDE
        for _ in range(6):
            kept = [v > unit / 2 for v in magnitudes]
            unit = sum(v for v, on in zip(magnitudes, kept, strict=True) if on) / sum(kept)
        expected = [bf16(unit) * on * math.copysign(1, float(v)) for v, on in zip(tau[i], kept, strict=True)]
        assert found[i].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_a_weighted_correction_is_the_best_for_its_inputs(kind):
    generator = torch.Generator().manual_seed(6)
    tau = torch.randn(OUT, WIDE, generator=generator)
    inputs = torch.randn(200, WIDE, generator=generator) * torch.arange(1.0, WIDE + 1)
    inputs[:, 0] += inputs[:, 1]
    moment = inputs.T @ inputs / len(inputs)
    used = {"none": None, "diagonal": moment.diagonal(), "full": moment}[kind]
    root = torch.eye(WIDE, dtype=torch.float64)
    if kind == "diagonal":
        root = torch.diag((moment.diagonal() + 0.01 * moment.diagonal().mean()).sqrt()).double()
    if kind == "full":
        values, vectors = torch.linalg.eigh(moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(WIDE))
        root = vectors * values.sqrt()
    left, values, right = torch.linalg.svd(tau.double() @ root)
    expected = (left[:, :2] * values[:2] @ right[:2] @ torch.linalg.inv(root)).float()
    b, a, energy = formulas.weighted_correct(tau, used, 2)
    torch.testing.assert_close(b @ a, expected, rtol=1e-3, atol=1e-4)
    assert energy.tolist() == pytest.approx(values[:2].square().tolist(), rel=1e-4)


def test_ranks_go_where_they_recover_most_within_the_budget():
    energy = {"wide": torch.tensor([8.0, 7.9, 0.1]), "small": torch.tensor([3.0, 1.0, 0.0])}
    # gains a number: .8 .79 .01 and .6 .2 0
    assert formulas.spread(energy, {"wide": 10, "small": 5}, 15) == {"wide": 1, "small": 1}
    assert formulas.spread(energy, {"wide": 10, "small": 5}, 25) == {"wide": 2, "small": 1}
    assert formulas.spread(energy, {"wide": 10, "small": 5}, 1000) == {"wide": 3, "small": 2}


def test_factors_of_few_bits():
    factor = torch.tensor([[0.9, -0.3, 0.12], [0.0, 0.0, 0.0]])
    step = bf16(0.9 / 7)
    expected = [[step * round(v / step) for v in (0.9, -0.3, 0.12)], [0.0] * 3]
    torch.testing.assert_close(formulas.rounded(factor, 4), torch.tensor(expected))
    assert torch.equal(formulas.rounded(factor, 16), factor.bfloat16().float())
    assert formulas.factor_bits(3, 10, 20, 16) == 3 * 30 * 16
    assert formulas.factor_bits(3, 10, 20, 4) == 3 * 30 * 4 + 3 * 2 * 16


VOCABULARY, HIDDEN = 30, 16


@pytest.fixture
def llm() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def asked(lengths: tuple[int, ...] = (3, 5, 2)) -> questions.Questions:
    """The right answer to every prompt is "1 2"; what is decoded are the ids as words, without the end (0)."""
    generator = torch.Generator().manual_seed(8)
    prompts = [torch.randn(length, HIDDEN, generator=generator) for length in lengths]
    words = lambda ids: " ".join(str(number) for number in ids if number)  # noqa: E731
    return questions.Questions(
        torch.tensor([4, 5]), prompts, [[1, 2, 0]] * len(lengths), ["1 2"] * len(lengths), words
    )


def alone(llm: LlamaForCausalLM, own: questions.Questions, i: int, answer: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of one item by itself, without a cache."""
    table = llm.get_input_embeddings()
    row = torch.cat([table(own.prefix), own.prompts[i], table(torch.tensor(answer, dtype=torch.long))])
    with torch.no_grad():
        return llm(inputs_embeds=row[None], use_cache=False).logits[0]


def test_batched_answers_are_those_of_each_item_alone(llm):
    own = asked()
    for i, row in enumerate(questions.answer_logits(llm, own.prefix, own.prompts, [[1, 2]] * 3)):
        torch.testing.assert_close(row, alone(llm, own, i, [1, 2])[-3:])
    for i, ids in enumerate(questions.greedy(llm, own.prefix, own.prompts, 0)):
        expected: list[int] = []
        while len(expected) < questions.NEW_TOKENS and 0 not in expected:
            expected.append(int(alone(llm, own, i, expected)[-1].argmax()))
        assert ids == expected


def test_the_original_keeps_everything_and_another_model_does_not(llm):
    own = asked()
    own.truth = [*questions.greedy(llm, own.prefix, own.prompts[:1], 0), [1, 2, 0], [1, 2, 0]]
    own.truth[0] = [*own.truth[0][: own.truth[0].index(0)], 0] if 0 in own.truth[0] else [*own.truth[0], 0]
    own.words[0] = own.decode(own.truth[0])
    questions.follow(llm, own)
    kept = questions.compare(llm, own, accuracy=True)
    assert (kept.n, kept.same, kept.right) == (3, 3, sum(own.right))
    assert kept.divergence == pytest.approx(0, abs=1e-6)
    before = [row.clone() for row in own.logits]
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(-0.7)
    changed = questions.compare(llm, own, accuracy=True)
    total, tokens, same = 0.0, 0, 0
    for i, answer in enumerate(own.answers):
        now = alone(llm, own, i, answer[:-1])[-len(answer) :].log_softmax(-1)
        total += sum(
            math.exp(float(before[i][t, v])) * float(before[i][t, v] - now[t, v])
            for t in range(len(answer))
            for v in range(VOCABULARY)
        )
        tokens += len(answer)
        same += now.argmax(-1).tolist() == answer
    assert changed.divergence == pytest.approx(total / tokens, rel=1e-4)
    assert changed.same == same < 3


def test_moments_leave_prefix_and_padding_out(llm):
    own = asked()
    names = {name: f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}
    found, expected = questions.moments(llm, own, names), dict.fromkeys(names, 0)
    tokens = 0
    for i in range(3):
        seen = {}
        hooks = [
            llm.get_submodule(module).register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0]})
            )
            for name, module in names.items()
        ]
        tokens += len(alone(llm, own, i, [])) - len(own.prefix)
        for hook in hooks:
            hook.remove()
        for name, inputs in seen.items():
            expected[name] = expected[name] + sum(torch.outer(x, x) for x in inputs[0, len(own.prefix) :])
    for name in names:
        torch.testing.assert_close(found[name], expected[name] / tokens, rtol=1e-4, atol=1e-5)


class Tuned:
    """An expert whose task vectors are given, as `fidelity.Lab` asks for them."""

    adapter = None

    def __init__(self, taus: dict[str, torch.Tensor], base: dict[str, torch.Tensor]):
        self.taus, self.base = taus, self
        self.tensor = base.__getitem__

    def task_vector(self, name: str, theta_0: torch.Tensor, tokens: int) -> torch.Tensor:
        return self.taus[name]


@pytest.fixture
def lab(llm) -> fidelity.Lab:
    generator = torch.Generator().manual_seed(9)
    linears = {n.removeprefix("model."): p.detach().clone() for n, p in llm.named_parameters() if "_proj" in n}
    experts = {
        name: Tuned({n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in linears.items()}, linears)
        for name in ("image", "audio")
    }
    return fidelity.Lab(experts, {}, linears, VOCABULARY, llm)


def test_every_way_gives_rows_once_and_more_bits_lose_less(lab, monkeypatch):
    monkeypatch.setattr(fidelity, "questions_of", lambda *_: asked())
    sets = {"7": ("image", "audio")}
    plan = fidelity.Plan("validation", 3, 0, ways.PLANS["screen"])
    rows = list(fidelity.rows_of(lab, "image", sets, plan, set()))
    found = {(row["set"], row["way"]): row for row in rows}
    wanted = {(ways.ALONE, way.label) for way in ways.ways_alone()}
    wanted |= {("7", way.label) for way in ways.ways_shared()}
    assert set(found) == wanted and len(rows) == len(wanted)
    known = {fidelity.key_of(row) for row in rows}
    assert list(fidelity.rows_of(lab, "image", sets, plan, known)) == []
    losses = [found[ways.ALONE, f"rank {rank}"]["residual"] for rank in (4, 8, 16)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.01  # the smaller side of all matrices is 16 or less
    for place, more, less in (
        ("7", "fitted mask, row scales", "mask, row scales"), ("7", "mask, row scales", "paper"),
        ("7", "fitted mask, row scales, rank 8", "fitted mask, row scales"), ("7", "mask, second bit", "paper"),
        (ways.ALONE, "ternary, row magnitudes", "sign, row magnitudes"),
        (ways.ALONE, "spread rank 4", "rank 4"),
    ):  # fmt: skip
        assert found[place, more]["residual"] < found[place, less]["residual"] + 1e-6, (more, less)
    assert found["7", "paper"]["bits"] == 1
    assert [row["data_free"] for row in rows] == ["by activations" not in row["way"] for row in rows]
    entries = sum(tensor.numel() for tensor in lab.theta_0.values())
    numbers = sum(4 * sum(tensor.shape) for tensor in lab.theta_0.values())
    assert found[ways.ALONE, "rank 4"]["bits"] == pytest.approx(16 * numbers / entries)


def test_what_is_put_is_the_base_and_the_way(lab):
    taus = {name: lab.tau("image", name) for name in lab.theta_0}
    subject = fidelity.Subject(lab, "image", taus, dict, ("image", "audio"))
    made = subject.make(ways.Way("paper"))
    lost, energy = 0.0, 0.0
    for name, theta_0 in lab.theta_0.items():
        tau, other = taus[name], lab.tau("audio", name)
        positive = (tau + other) >= 0
        agree = torch.stack([(tau > 0) == positive, (other > 0) == positive]).float()
        merged = ((torch.stack([tau, other]) * agree).sum(0) / agree.sum(0)).bfloat16().float()
        own = torch.where((tau * merged > 0) & (tau.abs() >= (merged - tau).abs()), merged, 0.0)
        torch.testing.assert_close(lab.llm.get_parameter(f"model.{name}").detach(), theta_0 + own)
        lost += (tau - own).square().sum().item()
        energy += tau.square().sum().item()
    assert made == {"bits": 1.0, "residual": pytest.approx((lost / energy) ** 0.5)}


def test_a_missing_full_expert_says_how_to_train_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MMER_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="(?s)'clothes' is not in .*Train it as benchmarks/lab/README.md says"):
        fidelity.full_tower("clothes")


def test_the_tables_show_each_ways_worst_expert(tmp_path):
    def row(expert: str, divergence: float, same: int, **more) -> dict:
        plain = {"set": "alone", "way": "rank 4", "split": "validation", "bits": 0.5, "residual": 0.1, "n": 10}
        return {**plain, "expert": expert, "divergence": divergence, "same": same, **more}

    rows = [row("image", 0.1, 9), row("audio", 0.2, 8), row("clothes", 0.3, 7)]
    rows.append(row("words", 0.0, 10, split="test", set="7", way="paper", right=6, right_original=8))
    (line,) = fidelity_plot.screen_table(rows)[2:]
    assert "0.2000 (audio, of 2) | 85.0% (64.0% – 94.8%)" in line and "0.3000 (clothes, of 1) | 70.0%" in line
    (line,) = fidelity_plot.final_table(rows)[2:]
    assert line.startswith("| 7 | paper | 0.50 | words | 10 | 60.0%") and "| 80.0% | 75.0% | 100.0%" in line
    fidelity_plot.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
