"""The Q-Former by value against BERT's formulas written out, its names, its mask, and what it refuses."""

import math

import pytest
import torch

from configuration_mmer.composed_config_mmer import ComposedConfig
from modeling_mmer.qformer_mmer import DEFAULTS, QFormer
from tests.tiny_models import text_config

TINY = dict(queries=3, layers=2, hidden_size=8, attention_heads=2, intermediate_size=12, positions=7)


def tiny_qformer(**changes):
    """All parameters random, so that each one counts."""
    model = QFormer({"kind": "qformer", "widths": [6, 10], **TINY, **changes}).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def erf_gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def slow_qformer(state, features):
    """features (tokens, in) of one item -> (queries, out), one number at a time where that can be read."""
    inside = "audio_Qformer.bert."

    def linear(name, rows):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return [
            [(weight[o] @ row + bias[o]).item() for o in range(len(weight))] for row in torch.tensor(rows).double()
        ]

    def norm(name, rows):
        made = []
        for row in rows:
            mean = sum(row) / len(row)
            spread = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-12)
            weight, bias = state[f"{name}.weight"].tolist(), state[f"{name}.bias"].tolist()
            made.append([(x - mean) / spread * w + b for x, w, b in zip(row, weight, bias)])
        return made

    def added(rows, others):
        return [[x + y for x, y in zip(row, other)] for row, other in zip(rows, others)]

    def attention(name, rows, source):
        query, key, value = (
            linear(f"{name}.self.{part}", given)
            for part, given in (("query", rows), ("key", source), ("value", source))
        )
        size = TINY["hidden_size"] // TINY["attention_heads"]
        mixed = [[0.0] * TINY["hidden_size"] for _ in rows]
        for head in range(TINY["attention_heads"]):
            mine = range(head * size, head * size + size)
            for i, one in enumerate(query):
                scores = [math.exp(sum(one[c] * other[c] for c in mine) / math.sqrt(size)) for other in key]
                for c in mine:
                    mixed[i][c] = sum(s * v[c] for s, v in zip(scores, value)) / sum(scores)
        return norm(f"{name}.output.LayerNorm", added(linear(f"{name}.output.dense", mixed), rows))

    places = state["audio_position_embedding.weight"][: len(features)]
    source = (features + places).tolist()
    hidden = norm(f"{inside}embeddings.LayerNorm", state["audio_query_tokens"][0].tolist())
    for layer in range(TINY["layers"]):
        here = f"{inside}encoder.layer.{layer}."
        hidden = attention(f"{here}attention", hidden, hidden)
        hidden = attention(f"{here}crossattention", hidden, source)
        inner = [[erf_gelu(x) for x in row] for row in linear(f"{here}intermediate_query.dense", hidden)]
        hidden = norm(f"{here}output_query.LayerNorm", added(linear(f"{here}output_query.dense", inner), hidden))
    return torch.tensor(linear("audio_llama_proj", hidden), dtype=torch.float64)


def test_it_is_berts_query_path():
    model = tiny_qformer()
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    got = model(features)
    assert got.shape == (2, 3, 10)
    for i in range(2):
        assert torch.allclose(got[i], slow_qformer(model.state_dict(), features[i]), atol=1e-10)


def test_masked_features_change_nothing_and_others_do():
    model = tiny_qformer()
    features = torch.randn(2, 6, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    got = model(features, mask)
    assert torch.allclose(got[:1], model(features[:1, :4]), atol=1e-12)
    assert torch.allclose(got[1:], model(features[1:]), atol=1e-12)
    louder = features.clone()
    louder[0, 4:] *= 100
    assert torch.allclose(model(louder, mask), got, atol=1e-12)
    assert not torch.allclose(model(louder), model(features), atol=1e-3)
    # places are learnt, so that order is heard
    assert not torch.allclose(model(features.flip(1)), model(features), atol=1e-3)


def test_its_names_are_model_composes():
    layer = "audio_Qformer.bert.encoder.layer.0."
    both = ["weight", "bias"]
    inside = [f"{layer}{a}.self.{p}" for a in ("attention", "crossattention") for p in ("query", "key", "value")]
    inside += [f"{layer}{a}.output.{p}" for a in ("attention", "crossattention") for p in ("dense", "LayerNorm")]
    inside += [f"{layer}{p}" for p in ("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")]
    modules = ["audio_Qformer.bert.embeddings.LayerNorm", *inside, "audio_llama_proj"]
    names = {f"{module}.{kind}" for module in modules for kind in both}
    names |= {"audio_query_tokens", "audio_position_embedding.weight"}
    with torch.device("meta"):
        full = QFormer({"widths": [768, 4096], "layers": 1})
    shapes = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    assert set(shapes) == names
    assert shapes["audio_query_tokens"] == (1, 32, 768) and shapes["audio_llama_proj.weight"] == (4096, 768)
    assert shapes["audio_position_embedding.weight"] == (1024, 768)
    assert shapes[f"{layer}intermediate_query.dense.weight"] == (3072, 768)
    assert DEFAULTS["layers"] == 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"gives 8 features an item, .*learnt 7 positions"):
        tiny_qformer()(torch.zeros(1, 8, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"unknown settings \['heads'\]"):
        tiny_qformer(heads=2)
    with pytest.raises(ValueError, match="heads that divide the hidden size"):
        tiny_qformer(attention_heads=3)
    with pytest.raises(ValueError, match="expected two widths"):
        tiny_qformer(widths=[6, 7, 10])


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        ({"kind": "perceiver", "widths": [8, 32]}, r"connectors\.audio\.kind: found 'perceiver', expected one of"),
        ({"kind": "qformer", "widths": [8, 16, 32]}, "expected two numbers for a Q-Former"),
        ({"kind": "qformer", "widths": [8, 31]}, "the last one 32"),
        ({"kind": "qformer"}, r"found \[\], expected two numbers"),
    ],
)
def test_a_config_with_a_connector_that_cannot_be_is_refused(connector, message):
    with pytest.raises(ValueError, match=message):
        ComposedConfig(
            text_config=text_config(), encoders={"audio": {"kind": "beats"}}, connectors={"audio": connector}
        )
