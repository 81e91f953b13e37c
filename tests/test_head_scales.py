"""Scales around the head: the merged model has them as the base's class has them, or the base is refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    OPTConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from merging_mmer import head_check
from merging_mmer.experts import Base
from merging_mmer.head_check import check_head
from merging_mmer.naming import class_on_meta

from .tiny_checkpoints import save
from .tiny_models import END_OF_IMAGE, FAMILIES, SIZES, mmer_config, mmer_model, text_config

MINICPM3 = dict(
    num_key_value_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=8,
    dim_model_base=10,  # hidden_size / dim_model_base is the scale: 3.2, which does round
    scale_emb=3.0,
)
FALCON_H1 = dict(
    mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, lm_head_multiplier=0.25
)


def minicpm3():
    return MiniCPM3Config(**{**SIZES, **MINICPM3, "tie_word_embeddings": False})


def base_and_merged(text, dtype):
    base = AutoModelForCausalLM.from_config(text).to(dtype).eval()
    model = mmer_model(mmer_config(text)).to(dtype)
    stock = {name.replace("model.", "model.language_model.", 1): v for name, v in base.state_dict().items()}
    assert not model.load_state_dict(stock, strict=False).unexpected_keys
    return base, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minicpm3_on_the_base_route_is_the_base_bit_for_bit(dtype):
    text = minicpm3()
    assert text.logits_scaling == 3.2
    base, model = base_and_merged(text, dtype)
    ids = torch.randint(9, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(ids).logits)


def test_added_tokens_are_scaled_like_all_others():
    _, model = base_and_merged(minicpm3(), torch.float32)
    ids = torch.tensor([[10, END_OF_IMAGE, 12]])
    with torch.no_grad():
        model.added_head.weight[2] = model.lm_head.weight[40]
        # on the merged route a row equal to that of token 40 gives token 40's logit
        logits = model(input_ids=ids, text_route=torch.tensor([1])).logits[0]
        torch.testing.assert_close(logits[:, END_OF_IMAGE], logits[:, 40])
        hidden = model.model(input_ids=ids, text_route=torch.tensor([1])).last_hidden_state[0]
        torch.testing.assert_close(logits[:, END_OF_IMAGE], hidden @ model.added_head.weight[2] / 3.2)


# the guard

KNOWN = {
    **{family: text_config(family) for family in FAMILIES},
    "minicpm3": minicpm3(),
    "hyperclovax": HyperCLOVAXConfig(**SIZES, logits_scaling=0.5),
    "falcon_h1 without a scale": FalconH1Config(**SIZES, **{**FALCON_H1, "lm_head_multiplier": 1.0}),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_merged_model_knows_is_taken(name, dtype):
    KNOWN[name].dtype = dtype
    model = class_on_meta(KNOWN[name], multimodal=False)
    check_head(model, KNOWN[name])
    assert "forward" not in vars(model.base_model) and "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize(
    ("name", "part"),
    [("minicpm3", "scaled_hidden"), *((n, "scaled_logits") for n in ("hyperclovax", "granite", "cohere", "gemma2"))],
)
def test_a_scale_that_is_left_out_is_seen(name, part, monkeypatch):
    monkeypatch.setattr(head_check, part, lambda text, states: states)
    with pytest.raises(ValueError, match="scales or caps its hidden states or logits"):
        check_head(class_on_meta(KNOWN[name], multimodal=False), KNOWN[name])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FalconH1Config(**SIZES, **FALCON_H1), r"FalconH1ForCausalLM .*'lm_head_multiplier': 0.25"),
        (RecurrentGemmaConfig(**SIZES), r"RecurrentGemmaForCausalLM .*'logits_soft_cap': 30.0"),
        (PhiConfig(**SIZES), "PhiForCausalLM .*head has a bias"),
        (
            OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4),
            "OPTForCausalLM .*compared",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_it_does_not_know_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_head(class_on_meta(config, multimodal=False), config)


class Halved(LlamaForCausalLM):
    """As code from the Hub may do it: by a number that is in no field."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


def test_a_class_of_somebodys_own_is_judged_by_what_it_does():
    config = LlamaConfig(**SIZES)
    with torch.device("meta"):
        stock, own = LlamaForCausalLM(config), Halved(config)
    check_head(stock, config)
    with pytest.raises(ValueError, match="Halved .*does not know"):
        check_head(own, config)


def test_such_a_base_is_refused_when_it_is_opened(tmp_path):
    model = AutoModelForCausalLM.from_config(FalconH1Config(**SIZES, **FALCON_H1))
    with pytest.raises(ValueError, match="base route would not give the base's logits"):
        Base(str(save(model, tmp_path / "base")))
    Base(str(save(AutoModelForCausalLM.from_config(minicpm3()), tmp_path / "other")))
